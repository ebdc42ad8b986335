"""What the tests of rms_norm and layer_norm share: both are the kernels of csrc/cuda/norm.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from checking import as_good_as, equal
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Rows of a warp and of a block, in 1 to 8 packs of 16 bytes a thread, read again where they are odd or too long; with
# no row at all, with more rows than a group of the backward holds, and with more groups than are summed at a time.
SHAPES = [
    *((0, 8), (1, 1), (70, 3), (33, 16), (19, 100), (5, 1023), (2, 37, 64), (16,), (9, 512), (17, 1024), (3, 2048)),
    (600, 12),
    *((1, 4096), (1, 4097), (2, 8192), (1, 16384), (1, 16400)),
]
# float16 goes the ways of bfloat16.
EVERY_WAY = [(s, dtype) for s in SHAPES for dtype in DTYPES if s[-1] < 4096 or dtype != torch.float16]


@dataclass
class Norm:
    """One of the two ops: ``(x, *parameters, residual=None) -> normalised, or (normalised, sum)``."""

    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    parameters: int


def inputs(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, *rest = ((torch.randn(shape, generator=generator) * 2).to(dtype) for _ in range(1 + residual))
    made = [torch.randn(shape[-1:], generator=generator) for _ in range(norm.parameters)]
    return [x, *(p.to(weight_dtype or dtype) for p in made), *rest]


def values_and_grads(function: Callable[..., Any], given: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(outs, [torch.randn(o.shape, generator=generator).to(o) for o in outs])
    return [t.detach().cpu() for t in (*outs, *(x.grad for x in leaves))]


def as_good_as_torch(
    norm: Norm,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    residual: bool = True,
    weight_dtype: torch.dtype | None = None,
) -> None:
    given = inputs(norm, shape, dtype, residual, weight_dtype)
    found = values_and_grads(norm.ours, [t.to(device) for t in given])
    exact = values_and_grads(norm.torchs, [t.double() for t in given])
    peers = values_and_grads(norm.torchs, [t.to(dtype) for t in given])
    outputs = 1 + residual
    assert [t.dtype for t in found] == [dtype] * outputs + [t.dtype for t in given]
    as_good_as(found, peers, exact, tiny=5e-6)


def bits_do_not_depend_on_other_rows(norm: Norm, device: torch.device, dim: int, dtype: torch.dtype) -> None:
    x, *parameters, residual = (t.to(device) for t in inputs(norm, (21, dim), dtype, True))
    leaf = x.clone().requires_grad_()
    every = norm.ours(leaf, *parameters, residual)
    (full,) = torch.autograd.grad(every, leaf, [residual, x])
    for rows in (slice(0, 1), slice(7, 10), slice(8, 21)):
        part = x[rows].clone().requires_grad_()
        some = norm.ours(part, *parameters, residual[rows])
        assert equal(some, [t[rows] for t in every])
        assert torch.equal(torch.autograd.grad(some, part, [residual[rows], x[rows]])[0], full[rows])


def bits_do_not_depend_on_the_run(norm: Norm, device: torch.device, dim: int) -> None:
    given = [t.to(device) for t in inputs(norm, (21, dim), torch.float32, True)]
    first = values_and_grads(norm.ours, given)
    assert all(equal(values_and_grads(norm.ours, given), first) for _ in range(4))


def every_input_may_be_a_view(norm: Norm, device: torch.device, dtype: torch.dtype) -> None:
    """Not contiguous, or contiguous but not on 16 bytes."""
    given = [t.to(device) for t in inputs(norm, (6, 64), dtype, True)]
    exact = values_and_grads(norm.torchs, [t.double().cpu() for t in given])
    peers = values_and_grads(norm.torchs, [t.cpu() for t in given])

    def shifted(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, dim=-1)[..., ::2]

    def seen_through(view: Callable[[Tensor], Tensor], which: int) -> Callable[..., tuple[Tensor, ...]]:
        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            out, summed = norm.ours(*(view(t) if i == which else t for i, t in enumerate(leaves)))
            return shifted(out), spread(summed)  # so that the gradients are views too

        return run

    for view in (shifted, spread):
        assert not any(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in map(view, given))
        for which in range(len(given)):
            as_good_as(values_and_grads(seen_through(view, which), given), peers, exact, tiny=5e-6)


def only_the_sum_is_used(norm: Norm, device: torch.device) -> None:
    x, *parameters, residual = (t.to(device).requires_grad_() for t in inputs(norm, (4, 8), torch.float32, True))
    norm.ours(x, *parameters, residual)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


def not_a_number_stays_in_its_row(norm: Norm, device: torch.device) -> None:
    for dim in (33, 64, 1600):
        x, *parameters = (t.to(device) for t in inputs(norm, (10, dim), torch.float32, False))
        x[7, 20] = torch.nan
        assert norm.ours(x, *parameters).isnan().any(1).nonzero().flatten().tolist() == [7]
