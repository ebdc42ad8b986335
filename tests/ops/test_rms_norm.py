"""rms_norm, with and without a residual."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import rms_norm, rms_norm_ref

EPS = 1e-5


def truth(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own RMSNorm."""
    summed = x if residual is None else x + residual
    out = torch.nn.functional.rms_norm(summed, weight.shape, weight.to(x.dtype), EPS)
    return out if residual is None else (out, summed)


def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, eps=EPS, residual=residual)


def reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm_ref(x, weight, eps=EPS, residual=residual)


def inputs(shape: tuple[int, ...], residual: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [shape, shape[-1:]] + [shape] * residual
    return [(torch.randn(s, generator=generator) * 2).to(dtype) for s in shapes]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (0, 8), (5, 1023), (2, 3, 64), (16,)])
def test_as_good_as_torch(shape, dtype, residual, values_and_grads, assert_as_good_as):
    given = inputs(shape, residual, dtype)
    exact = values_and_grads(truth, [x.double() for x in given])
    peers = values_and_grads(truth, given)
    assert_as_good_as(values_and_grads(ours, given), peers, exact, tiny=5e-6)
    assert_as_good_as(values_and_grads(reference, given), peers, exact, tiny=5e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), dim=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape(rows, dim, scale):
    x, weight = inputs((rows, dim), False)
    expected = truth(x.double() * scale, weight.double())
    torch.testing.assert_close(ours(x * scale, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_with_a_float32_weight():
    x, weight = inputs((9, 64), False)
    exact = truth(x.bfloat16().double(), weight.double())
    assert (ours(x.bfloat16(), weight).double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (33, 17), (5, 1023), (40, 67), (3, 2500), (2, 37, 64)])
def test_every_instruction_set(isa, poison, shape, dtype, values_and_grads, assert_as_good_as):
    for residual in (False, True):
        given = inputs(shape, residual, dtype)
        exact = values_and_grads(truth, [x.double() for x in given])
        peers = values_and_grads(truth, given)
        assert_as_good_as(values_and_grads(ours, given), peers, exact, tiny=5e-6)


def test_bfloat16_with_a_float32_weight_on_every_instruction_set(isa, poison, values_and_grads, assert_as_good_as):
    given = inputs((70, 129), True)
    given = [given[0].bfloat16(), given[1], given[2].bfloat16()]
    found = values_and_grads(ours, given)
    exact = values_and_grads(truth, [x.double() for x in given])
    peers = values_and_grads(truth, [x.bfloat16() for x in given])
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16]
    assert_as_good_as(found, peers, exact, tiny=5e-6)


def test_the_sum_is_rounded_like_torchs(isa):
    """Every bfloat16 number plus another one; NaN and infinity too."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    for other in (x.flip(0), x.roll(12345), x * 1.7, torch.full_like(x, 3e38)):
        found, expected = ours(x, torch.ones(256), other)[1], x + other
        assert torch.equal(found.isnan(), expected.isnan())
        normal = expected.abs() >= 2.0**-126  # AVX512_BF16 rounds to 0 below
        assert torch.equal(found[normal], expected[normal])
        small = ~normal & ~expected.isnan()
        assert ((found.double() - expected.double()).abs()[small] < 2.0**-126).all()


def test_bits_do_not_depend_on_threads(isa, values_and_grads, same_bits_for_any_threads):
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs((300, 129), True, dtype)  # enough for more than one thread
        same_bits_for_any_threads(lambda: values_and_grads(ours, given))  # noqa: B023


def test_large_outputs_have_the_bits_of_small_ones(isa):
    """Outputs larger than the caches are written past them."""
    x, weight, residual = inputs((4096, 1024), True)
    every = ours(x, weight, residual)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, weight), leaf, residual)
    for rows in (slice(0, 3), slice(2047, 2050), slice(4000, 4096)):
        some = ours(x[rows], weight, residual[rows])
        assert torch.equal(some[0], every[0][rows])
        assert torch.equal(some[1], every[1][rows])
        part = x[rows].clone().requires_grad_()
        (expected,) = torch.autograd.grad(ours(part, weight), part, residual[rows])
        assert torch.equal(grad[rows], expected)


def test_not_a_number_stays_in_its_row(isa):
    x, weight = inputs((40, 33), False)
    x[7, 20] = torch.nan
    assert ours(x, weight).isnan().any(1).nonzero().flatten().tolist() == [7]


def test_the_reference_backend_agrees(monkeypatch, values_and_grads):
    given = inputs((9, 130), True)
    fused = values_and_grads(ours, given)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(sys.modules["pyrlhf.ops.rms_norm"], "core", lambda: pytest.fail("the core was called"))
    for a, b in zip(values_and_grads(ours, given), fused, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    for residual in (False, True):
        given = [x.requires_grad_() for x in inputs((3, 5), residual, torch.float64)]
        assert torch.autograd.gradcheck(reference, given)
        op = torch.ops.pyrlhf.rms_norm
        outputs = slice(0, 2 if residual else 1)

        def f(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
            return op(x, weight, residual, EPS)[outputs]  # noqa: B023

        assert torch.autograd.gradcheck(f, given)


def test_only_the_sum_is_used(values_and_grads):
    x, weight, residual = (t.requires_grad_() for t in inputs((4, 8), True))
    ours(x, weight, residual)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 33, 768])
def test_bits_do_not_depend_on_other_rows(dim, dtype, values_and_grads):
    x, weight, residual = inputs((50, dim), True, dtype)
    every = ours(x, weight, residual)
    for rows in (slice(0, 1), slice(7, 10), slice(13, 50)):
        some = ours(x[rows], weight, residual[rows])
        assert torch.equal(some[0], every[0][rows])
        assert torch.equal(some[1], every[1][rows])
    leaf = x.clone().requires_grad_()
    (full,) = torch.autograd.grad(ours(leaf, weight), leaf, residual)
    part = x[13:20].clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(part, weight), part, residual[13:20])
    assert torch.equal(grad, full[13:20])


def test_same_bits_on_repeat(values_and_grads):
    runs = [values_and_grads(ours, inputs((65, 129), True)) for _ in range(1000)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_non_contiguous():
    x, weight = inputs((33, 12), False)
    assert torch.equal(ours(x.T, torch.ones(33)), ours(x.T.contiguous(), torch.ones(33)))
    assert torch.equal(ours(x[:, ::2], weight[::2]), ours(x[:, ::2].contiguous(), weight[::2].contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 3, 16), (5, 4, 33), (700, 2, 64)])
def test_heads_among_others_have_the_bits_of_heads_alone(isa, poison, values_and_grads, tokens, heads, dim, dtype):
    """Queries in the middle of what a fused projection gives are read where they lie; what surrounds them is not."""
    wide, weight = torch.full((tokens, heads + 3, dim), torch.nan, dtype=dtype), torch.randn(dim, dtype=dtype)
    wide[:, 2 : 2 + heads] = torch.randn(tokens, heads, dim)
    among = values_and_grads(lambda x, w: ours(x[:, 2 : 2 + heads], w), [wide, weight])
    alone = values_and_grads(lambda x, w: ours(x[:, 2 : 2 + heads].contiguous(), w), [wide, weight])
    assert all(torch.equal(a, b) for a, b in zip(among, alone, strict=True))
    assert not among[0].isnan().any()
    assert ours(wide[:, 2 : 2 + heads], weight).is_contiguous()


def test_torch_library(values_and_grads):
    for residual in (False, True):
        x, weight, *rest = (t.requires_grad_() for t in inputs((4, 8), residual))
        torch.library.opcheck(torch.ops.pyrlhf.rms_norm.default, (x, weight, rest[0] if rest else None, EPS))
    compiled = torch.compile(lambda *t: ours(t[0] * 2, *t[1:]), fullgraph=True, backend="aot_eager")
    given = inputs((4, 8), True)
    expected = values_and_grads(lambda *t: ours(t[0] * 2, *t[1:]), given)
    for a, b in zip(values_and_grads(compiled, given), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [rms_norm, rms_norm_ref])
def test_wrong_calls_name_the_argument(function):
    x, weight = inputs((4, 8), False)
    for error, message, change in (
        (TypeError, "x must be", {"x": 3}),
        (TypeError, "x must be float32", {"x": x.int()}),
        (ValueError, "x must have shape", {"x": torch.tensor(1.0)}),
        (ValueError, "weight must have shape", {"weight": weight[:7]}),
        (TypeError, "weight must be float32", {"weight": weight.half()}),
        (ValueError, "eps must be in", {"eps": -1.0}),
        (TypeError, "eps must be a number", {"eps": None}),
        (ValueError, "residual must have shape", {"residual": x[:1]}),
        (TypeError, "residual must be float32", {"residual": x.bfloat16()}),
    ):
        with pytest.raises(error, match=message):
            function(**{"x": x, "weight": weight, "eps": EPS, **change})
