"""layer_norm, with and without a residual."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import layer_norm, layer_norm_ref

EPS = 1e-5


def truth(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own LayerNorm."""
    summed = x if residual is None else x + residual
    out = torch.nn.functional.layer_norm(summed, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return out if residual is None else (out, summed)


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps=EPS, residual=residual)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm_ref(x, weight, bias, eps=EPS, residual=residual)


def inputs(shape: tuple[int, ...], residual: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [shape, shape[-1:], shape[-1:]] + [shape] * residual
    return [(torch.randn(s, generator=generator) * 2).to(dtype) for s in shapes]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (5, 1023), (2, 3, 64), (16,)])
def test_as_good_as_torch(shape, dtype, residual, values_and_grads, assert_as_good_as):
    given = inputs(shape, residual, dtype)
    tiny = 2e-5  # for D = 1 the centred value is float32's rounding, times 1 / sqrt(eps) = 316
    exact = values_and_grads(truth, [x.double() for x in given])
    peers = values_and_grads(truth, given)
    assert_as_good_as(values_and_grads(ours, given), peers, exact, tiny=tiny)
    assert_as_good_as(values_and_grads(reference, given), peers, exact, tiny=tiny)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), dim=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape(rows, dim, scale):
    x, weight, bias = inputs((rows, dim), False)
    expected = truth(x.double() * scale, weight.double(), bias.double())
    torch.testing.assert_close(ours(x * scale, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_with_a_float32_weight():
    x, weight, bias = inputs((9, 64), False)
    exact = truth(x.bfloat16().double(), weight.double(), bias.double())
    assert (ours(x.bfloat16(), weight, bias).double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (33, 17), (5, 1023), (40, 67), (3, 2500), (2, 37, 64)])
def test_every_instruction_set(isa, poison, shape, dtype, values_and_grads, assert_as_good_as):
    for residual in (False, True):
        given = inputs(shape, residual, dtype)
        exact = values_and_grads(truth, [x.double() for x in given])
        peers = values_and_grads(truth, given)
        assert_as_good_as(values_and_grads(ours, given), peers, exact, tiny=2e-5)


def test_bfloat16_with_float32_parameters_on_every_instruction_set(isa, poison, values_and_grads, assert_as_good_as):
    given = inputs((70, 129), True)
    given = [given[0].bfloat16(), *given[1:3], given[3].bfloat16()]
    found = values_and_grads(ours, given)
    exact = values_and_grads(truth, [x.double() for x in given])
    peers = values_and_grads(truth, [x.bfloat16() for x in given])
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32] * 2 + [torch.bfloat16]
    assert_as_good_as(found, peers, exact, tiny=5e-6)


def test_a_large_mean_does_not_cost_the_variance(isa, values_and_grads, assert_as_good_as):
    x, weight, bias = inputs((20, 1023), False)
    for mean in (100.0, -3000.0):
        given = [x + mean, weight, bias]
        exact = values_and_grads(truth, [t.double() for t in given])
        assert_as_good_as(values_and_grads(ours, given), values_and_grads(truth, given), exact, tiny=5e-6)


def test_a_constant_row_is_its_bias(isa):
    _, weight, bias = inputs((1, 768), False)
    for value in (0.0, 1.0, -2.5, 1e10):
        assert torch.equal(ours(torch.full((3, 768), value), weight, bias), bias.expand(3, -1))


def test_bits_do_not_depend_on_threads(isa, values_and_grads, same_bits_for_any_threads):
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs((300, 129), True, dtype)  # enough for more than one thread
        same_bits_for_any_threads(lambda: values_and_grads(ours, given))  # noqa: B023


def test_large_outputs_have_the_bits_of_small_ones(isa):
    """Outputs larger than the caches are written past them."""
    x, weight, bias, residual = inputs((4096, 1024), True)
    every = ours(x, weight, bias, residual)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, weight, bias), leaf, residual)
    for rows in (slice(0, 3), slice(2047, 2050), slice(4000, 4096)):
        some = ours(x[rows], weight, bias, residual[rows])
        assert torch.equal(some[0], every[0][rows])
        assert torch.equal(some[1], every[1][rows])
        part = x[rows].clone().requires_grad_()
        (expected,) = torch.autograd.grad(ours(part, weight, bias), part, residual[rows])
        assert torch.equal(grad[rows], expected)


def test_not_a_number_stays_in_its_row(isa):
    x, weight, bias = inputs((40, 33), False)
    x[7, 20] = torch.nan
    assert ours(x, weight, bias).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_the_reference_backend_agrees(monkeypatch, values_and_grads):
    given = inputs((9, 130), True)
    fused = values_and_grads(ours, given)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(sys.modules["pyrlhf.ops.layer_norm"], "core", lambda: pytest.fail("the core was called"))
    for a, b in zip(values_and_grads(ours, given), fused, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    for residual in (False, True):
        given = [x.requires_grad_() for x in inputs((3, 5), residual, torch.float64)]
        assert torch.autograd.gradcheck(reference, given)
        op = torch.ops.pyrlhf.layer_norm
        outputs = slice(0, 2 if residual else 1)

        def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
            return op(x, weight, bias, residual, EPS)[outputs]  # noqa: B023

        assert torch.autograd.gradcheck(f, given)


def test_only_the_sum_is_used(values_and_grads):
    x, weight, bias, residual = (t.requires_grad_() for t in inputs((4, 8), True))
    ours(x, weight, bias, residual)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 33, 768])
def test_bits_do_not_depend_on_other_rows(dim, dtype, values_and_grads):
    x, weight, bias, residual = inputs((50, dim), True, dtype)
    every = ours(x, weight, bias, residual)
    for rows in (slice(0, 1), slice(7, 10), slice(13, 50)):
        some = ours(x[rows], weight, bias, residual[rows])
        assert torch.equal(some[0], every[0][rows])
        assert torch.equal(some[1], every[1][rows])
    leaf = x.clone().requires_grad_()
    (full,) = torch.autograd.grad(ours(leaf, weight, bias), leaf, residual)
    part = x[13:20].clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(part, weight, bias), part, residual[13:20])
    assert torch.equal(grad, full[13:20])


def test_same_bits_on_repeat(values_and_grads):
    runs = [values_and_grads(ours, inputs((65, 129), True)) for _ in range(1000)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_non_contiguous():
    x, weight, bias = inputs((33, 12), False)
    one = torch.ones(33)
    assert torch.equal(ours(x.T, one, one), ours(x.T.contiguous(), one, one))
    assert torch.equal(ours(x[:, ::2], weight[::2], bias[::2]), ours(x[:, ::2].contiguous(), weight[::2], bias[::2]))


def test_torch_library(values_and_grads):
    for residual in (False, True):
        x, weight, bias, *rest = (t.requires_grad_() for t in inputs((4, 8), residual))
        torch.library.opcheck(torch.ops.pyrlhf.layer_norm.default, (x, weight, bias, rest[0] if rest else None, EPS))
    compiled = torch.compile(lambda *t: ours(t[0] * 2, *t[1:]), fullgraph=True, backend="aot_eager")
    given = inputs((4, 8), True)
    expected = values_and_grads(lambda *t: ours(t[0] * 2, *t[1:]), given)
    for a, b in zip(values_and_grads(compiled, given), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [layer_norm, layer_norm_ref])
def test_wrong_calls_name_the_argument(function):
    x, weight, bias = inputs((4, 8), False)
    for error, message, change in (
        (TypeError, "x must be", {"x": 3}),
        (TypeError, "x must be float32", {"x": x.int()}),
        (ValueError, "x must have shape", {"x": torch.tensor(1.0)}),
        (ValueError, "weight must have shape", {"weight": weight[:7]}),
        (TypeError, "weight must be float32", {"weight": weight.half()}),
        (ValueError, "bias must have shape", {"bias": bias[:7]}),
        (TypeError, "bias must be float32", {"bias": bias.bfloat16()}),
        (ValueError, "eps must be in", {"eps": -1.0}),
        (TypeError, "eps must be a number", {"eps": None}),
        (ValueError, "residual must have shape", {"residual": x[:1]}),
        (TypeError, "residual must be float32", {"residual": x.bfloat16()}),
    ):
        with pytest.raises(error, match=message):
            function(**{"x": x, "weight": weight, "bias": bias, "eps": EPS, **change})
