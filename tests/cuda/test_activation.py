"""The CUDA kernels of activation against float64, and at the edges of the number range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import activation_in_float64, as_good_as, equal
from torch import Tensor

from pyrlhf.ops import activation, activation_ref
from pyrlhf.ops.activation import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# plain sizes around a pack, a block, and what a block takes; gated sizes that are whole packs and that are not
SHAPES = [(1, 2), (7, 34), (5, 2046), (3, 2, 64), (1, 8194), (16,), (0, 8), (3, 0), (2, 4128)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)


def call(function: Callable[..., Tensor], kind: str, gated: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, kind, gated=gated)


def value_and_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach().cpu(), torch.autograd.grad(out, leaf, grad)[0].cpu()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_good_as_torch(device: torch.device, poison: None, kind: str, gated: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = inputs(shape, dtype)
        exact = value_and_grad(call(activation_ref, kind, gated), x.double())
        peers = value_and_grad(call(activation_ref, kind, gated), x)
        found = value_and_grad(call(activation, kind, gated), x.to(device))
        assert found[0].dtype == found[1].dtype == dtype
        as_good_as(found, peers, exact)


@pytest.mark.parametrize(
    ("kind", "bound"), [("gelu", 3e-6), ("gelu_new", 7e-6), ("quick_gelu", 1.2e-6), ("silu", 5e-7)]
)
def test_small_values_keep_their_digits(device: torch.device, kind: str, bound: float) -> None:
    """To the left the functions fall to 1e-11 and less, where a form with 1 + erf or 1 + tanh has nothing left of them. The error
    is that of rounding the exponent, which is up to 36, and of the hardware's approximations."""
    x = torch.linspace(-7, 7, 20_001)
    exact = activation_in_float64(kind, x.double())
    assert ((activation(x.to(device), kind).cpu().double() - exact).abs() <= bound * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_edges_of_the_number_range(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 100.0, -200.0, 6e4, -6e4, most, -most, torch.inf, torch.nan], dtype=dtype)
    x = x.repeat(3).to(device).requires_grad_()  # whole packs and a part of one
    out = activation(x, kind)
    (slope,) = torch.autograd.grad(out.sum(), x)
    big = x.detach().cpu()[4:11:2]
    for row, rise in zip(out.detach().cpu().view(3, -1), slope.cpu().view(3, -1), strict=True):
        assert torch.equal(row[4:11:2], big)
        assert not row[5:10:2].any()
        assert row[:4].abs().max() <= 1.2e-7
        assert row[11].isnan()
        assert torch.equal(rise[4:9:2], torch.ones(3, dtype=dtype))
        assert not rise[5:10:2].any()
        assert kind == "relu" or torch.allclose(rise[:2].double(), torch.tensor(0.5).double(), rtol=0, atol=1e-6)
        assert kind == "relu" or rise[11].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_place(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """An element has the same bits in a pack, after the last one, in an array that is not aligned, and in a row of its own."""
    x = inputs((1, 4200), dtype).to(device)
    every = activation(x, kind)
    for at in (0, 1, 37, 4095, 4096, 4199):
        assert torch.equal(activation(x[:, at:], kind), every[:, at:])
        assert torch.equal(activation(x[:, at : at + 1], kind), every[:, at : at + 1])
    for inner in (33, 64):
        pairs = inputs((20, 2 * inner), dtype).to(device)
        gated, grads = value_and_grad(call(activation, kind, True), pairs)
        assert grads.isfinite().all()
        for rows in (slice(0, 1), slice(7, 10), slice(13, 20)):
            assert torch.equal(activation(pairs[rows], kind, gated=True).cpu(), gated[rows])
        gates = torch.cat((pairs[:, :inner], torch.ones(20, inner, dtype=dtype, device=device)), dim=1)
        assert torch.equal(activation(gates, kind, gated=True), activation(pairs[:, :inner], kind))


def test_agrees_with_the_reference_on_views(device: torch.device) -> None:
    x = inputs((33, 24)).to(device)
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(33, 24)  # contiguous, not on 16 bytes
    for view in (x.T[:, :32], x[:, ::3], x[::2], x[:1].expand(5, 24), shifted):
        for gated in (False, True):
            expected = value_and_grad(call(activation_ref, "gelu", gated), view.cpu())
            for found, want in zip(value_and_grad(call(activation, "gelu", gated), view), expected, strict=True):
                torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-6)
            assert torch.equal(
                activation(view, "gelu", gated=gated), activation(view.contiguous(), "gelu", gated=gated)
            )
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(activation(leaf, "silu", gated=True).sum(), leaf)  # an expanded gradient
    (want,) = torch.autograd.grad(activation(leaf, "silu", gated=True), leaf, torch.ones(33, 12, device=device))
    assert torch.equal(found, want)


def test_same_bits_on_repeat(device: torch.device) -> None:
    x = inputs((65, 130)).to(device)
    first = value_and_grad(call(activation, "gelu_new", True), x)
    assert all(equal(value_and_grad(call(activation, "gelu_new", True), x), first) for _ in range(3))
