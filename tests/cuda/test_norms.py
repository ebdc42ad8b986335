"""The CUDA kernels of rms_norm and layer_norm (csrc/cuda/norm.h) against torch in float64, at every way a row is spread over threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checking import as_good_as, equal, values_and_grads
from torch import Tensor

from pyrlhf.ops import layer_norm, rms_norm

EPS = 1e-5
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


def rms(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, eps=EPS, residual=residual)


def torchs_rms(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    out = torch.nn.functional.rms_norm(summed, weight.shape, weight.to(x.dtype), EPS)
    return out if residual is None else (out, summed)


def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps=EPS, residual=residual)


def torchs_layer(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    out = torch.nn.functional.layer_norm(summed, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return out if residual is None else (out, summed)


NORMS = {"rms_norm": Norm(rms, torchs_rms, parameters=1), "layer_norm": Norm(layer, torchs_layer, parameters=2)}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Norm:
    return NORMS[request.param]


def inputs(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, *rest = ((torch.randn(shape, generator=generator) * 2).to(dtype) for _ in range(1 + residual))
    made = [torch.randn(shape[-1:], generator=generator) for _ in range(norm.parameters)]
    return [x, *(p.to(weight_dtype or dtype) for p in made), *rest]


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


@pytest.mark.parametrize(("shape", "dtype"), EVERY_WAY, ids=str)
def test_as_good_as_torch(
    norm: Norm, device: torch.device, poison: None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    as_good_as_torch(norm, device, shape, dtype)
    if shape[-1] < 2048:
        as_good_as_torch(norm, device, shape, dtype, residual=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [7, 64, 2048])
def test_a_float32_weight(norm: Norm, device: torch.device, poison: None, dim: int, dtype: torch.dtype) -> None:
    as_good_as_torch(norm, device, (11, dim), dtype, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 96, 1023, 2048])
def test_bits_do_not_depend_on_other_rows(norm: Norm, device: torch.device, dim: int, dtype: torch.dtype) -> None:
    x, *parameters, residual = (t.to(device) for t in inputs(norm, (21, dim), dtype, True))
    leaf = x.clone().requires_grad_()
    every = norm.ours(leaf, *parameters, residual)
    (full,) = torch.autograd.grad(every, leaf, [residual, x])
    for rows in (slice(0, 1), slice(7, 10), slice(8, 21)):
        part = x[rows].clone().requires_grad_()
        some = norm.ours(part, *parameters, residual[rows])
        assert equal(some, [t[rows] for t in every])
        assert torch.equal(torch.autograd.grad(some, part, [residual[rows], x[rows]])[0], full[rows])


@pytest.mark.parametrize("dim", [3, 96, 2048])
def test_bits_do_not_depend_on_the_run(norm: Norm, device: torch.device, dim: int) -> None:
    given = [t.to(device) for t in inputs(norm, (21, dim), torch.float32, True)]
    first = values_and_grads(norm.ours, given)
    assert all(equal(values_and_grads(norm.ours, given), first) for _ in range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_input_may_be_a_view(norm: Norm, device: torch.device, dtype: torch.dtype) -> None:
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


def test_only_the_sum_is_used(norm: Norm, device: torch.device) -> None:
    x, *parameters, residual = (t.to(device).requires_grad_() for t in inputs(norm, (4, 8), torch.float32, True))
    norm.ours(x, *parameters, residual)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


def test_not_a_number_stays_in_its_row(norm: Norm, device: torch.device) -> None:
    for dim in (33, 64, 1600):
        x, *parameters = (t.to(device) for t in inputs(norm, (10, dim), torch.float32, False))
        x[7, 20] = torch.nan
        assert norm.ours(x, *parameters).isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dim", [5, 96, 2048])
def test_a_mean_far_from_zero(device: torch.device, dim: int) -> None:
    """The variance is taken around the mean: as E[x^2] - E[x]^2 nothing would be left of it. What is lost is the rounding of the
    mean to float32."""
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(1)) + 3000
    weight, bias = torch.ones(dim), torch.zeros(dim)
    exact = torch.nn.functional.layer_norm(x.double(), (dim,), eps=EPS)
    found = layer_norm(x.to(device), weight.to(device), bias.to(device), eps=EPS)
    deviation = x.double().std(-1, correction=0, keepdim=True)
    assert ((found.cpu().double() - exact).abs() * deviation).max() <= 1.1 * 2**-13  # half an ulp of 3000
