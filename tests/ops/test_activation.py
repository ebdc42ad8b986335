"""activation, plain and gated, against float64, Hugging Face's functions, and the edges of the number range."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from checking import activation_in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.model.config import ACTIVATIONS
from pyrlhf.ops import activation, activation_ref
from pyrlhf.ops.activation import KINDS

SHAPES = [(1, 2), (7, 34), (5, 2046), (3, 2, 64), (2, 10000), (16,), (0, 8), (3, 0)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)


def call(function: Callable[..., Tensor], kind: str, gated: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, kind, gated=gated)


def test_the_model_config_knows_the_same_kinds() -> None:
    assert KINDS == ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_good_as_torch(isa, poison, kind, gated, dtype, values_and_grads, assert_as_good_as) -> None:
    for shape in SHAPES:
        x = inputs(shape, dtype)
        exact = values_and_grads(call(activation_ref, kind, gated), [x.double()])
        peers = values_and_grads(call(activation_ref, kind, gated), [x])
        found = values_and_grads(call(activation, kind, gated), [x])
        assert found[0].dtype == found[1].dtype == dtype
        assert_as_good_as(found, peers, exact)


@pytest.mark.parametrize("function", [activation, activation_ref])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_hugging_face(function, kind: str) -> None:
    functions = pytest.importorskip("transformers.activations").ACT2FN
    x = inputs((9, 130))
    torch.testing.assert_close(function(x, kind), functions[kind](x))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(function(x, kind, gated=True), functions[kind](gate) * up)


@pytest.mark.parametrize(("kind", "bound"), [("gelu", 2e-6), ("gelu_new", 7e-6), ("quick_gelu", 1e-6), ("silu", 3e-7)])
def test_small_values_keep_their_digits(isa, kind: str, bound: float) -> None:
    """To the left the functions fall to 1e-11 and less, where a form with 1 + erf or 1 + tanh has nothing left of them. The error
    is that of rounding the exponent, which is up to 36."""
    x = torch.linspace(-7, 7, 20_001)
    exact = activation_in_float64(kind, x.double())
    assert ((activation(x, kind).double() - exact).abs() <= bound * exact.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_edges_of_the_number_range(isa, kind: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 100.0, -200.0, 1e19, -1e19, 3e38, -3e38, torch.inf, torch.nan])
    x = x.repeat(3).requires_grad_()  # whole vectors and a part of one
    out = activation(x, kind)
    (slope,) = torch.autograd.grad(out.sum(), x)
    out, slope = out.detach().view(3, -1), slope.view(3, -1)
    big = x.detach()[4:11:2]
    for row, rise in zip(out, slope, strict=True):
        assert torch.equal(row[4:11:2], big)
        assert not row[5:10:2].any()
        assert row[:4].abs().max() <= 1e-40
        assert row[11].isnan()
        assert torch.equal(rise[4:9:2], torch.ones(3))
        assert not rise[5:10:2].any()
        assert kind == "relu" or torch.equal(rise[:2], torch.full((2,), 0.5))
        assert kind == "relu" or rise[11].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_place(isa, kind: str, values_and_grads) -> None:
    """An element has the same bits in a whole vector, in the last part of a row, alone, and in a row of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs((1, 6000), dtype)
        every = activation(x, kind)
        for at in (0, 1, 37, 4095, 4096, 5999):
            assert torch.equal(activation(x[:, at:], kind), every[:, at:])
            assert torch.equal(activation(x[:, at : at + 1], kind), every[:, at : at + 1])
        pairs = inputs((50, 66), dtype)
        gated, grads = values_and_grads(call(activation, kind, True), [pairs])
        for rows in (slice(0, 1), slice(7, 10), slice(13, 50)):
            assert torch.equal(activation(pairs[rows], kind, gated=True), gated[rows])
        gates = torch.cat((pairs[:, :33], torch.ones(50, 33, dtype=dtype)), dim=1)
        assert torch.equal(activation(gates, kind, gated=True), activation(pairs[:, :33], kind))
        assert grads.isfinite().all()


def test_bits_do_not_depend_on_threads(isa, values_and_grads, same_bits_for_any_threads) -> None:
    for kind in KINDS:
        for gated, shape in ((False, (3, 20_001)), (True, (300, 258)), (True, (2, 20_002))):
            same_bits_for_any_threads(lambda: values_and_grads(call(activation, kind, gated), [inputs(shape)]))  # noqa: B023


def test_large_outputs_have_the_bits_of_small_ones(isa) -> None:
    """Outputs larger than the caches are written past them."""
    x = inputs((4096, 2048)).requires_grad_()
    out = activation(x, "silu", gated=True)
    (grad,) = torch.autograd.grad(out, x, x.detach()[:, :1024])
    for rows in (slice(0, 1), slice(2047, 2050), slice(4000, 4096)):
        part = x.detach()[rows].clone().requires_grad_()
        some = activation(part, "silu", gated=True)
        assert torch.equal(some, out[rows])
        assert torch.equal(torch.autograd.grad(some, part, part.detach()[:, :1024])[0], grad[rows])
    flat = x.detach().flatten()[: 4096 * 1024 + 5]
    every = activation(flat, "relu")
    assert torch.equal(every, flat.clamp(min=0))


def test_same_bits_on_repeat(values_and_grads) -> None:
    x = inputs((65, 130))
    runs = [values_and_grads(call(activation, "gelu_new", True), [x]) for _ in range(1000)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 20),
    inner=st.integers(0, 70),
    kind=st.sampled_from(KINDS),
    gated=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_shape(rows: int, inner: int, kind: str, gated: bool, scale: float) -> None:
    x = scale * inputs((rows, 2 * inner if gated else inner))
    out = activation(x, kind, gated=gated)
    assert out.shape == (rows, inner)
    expected = activation_ref(x.double(), kind, gated=gated)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * scale**2)


def test_non_contiguous(values_and_grads) -> None:
    x = inputs((33, 24))
    for view in (x.T[:, :32], x[:, ::3], x[::2], x[:1].expand(5, 24)):
        for gated in (False, True):
            assert torch.equal(
                activation(view, "gelu", gated=gated), activation(view.contiguous(), "gelu", gated=gated)
            )
    leaf = x.clone().requires_grad_()
    activation(leaf, "silu", gated=True).sum().backward()  # an expanded gradient
    found = leaf.grad.clone()
    leaf.grad = None
    activation(leaf, "silu", gated=True).backward(torch.ones(33, 12))
    assert torch.equal(found, leaf.grad)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, gated: bool) -> None:
    x = inputs((3, 6), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call(activation_ref, kind, gated), (x,))
    assert torch.autograd.gradcheck(lambda t: torch.ops.pyrlhf.activation(t, kind, gated), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_backend_agrees(kind: str, dtype: torch.dtype, monkeypatch, values_and_grads) -> None:
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    for gated in (False, True):
        fused = values_and_grads(call(activation, kind, gated), [inputs((9, 130), dtype)])
        with monkeypatch.context() as patch:
            patch.setenv("PYRLHF_BACKEND", "ref")
            patch.setattr(sys.modules["pyrlhf.ops.activation"], "core", lambda: pytest.fail("the core was called"))
            reference = values_and_grads(call(activation, kind, gated), [inputs((9, 130), dtype)])
        for a, b in zip(reference, fused, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_torch_library(values_and_grads) -> None:
    for gated in (False, True):
        x = inputs((4, 8)).requires_grad_()
        torch.library.opcheck(torch.ops.pyrlhf.activation.default, (x, "gelu_new", gated))

        def f(t: Tensor) -> Tensor:
            return activation(t * 2, "silu", gated=gated)  # noqa: B023

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for a, b in zip(values_and_grads(compiled, [x]), values_and_grads(f, [x]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [activation, activation_ref])
def test_wrong_calls_name_the_argument(function) -> None:
    x = inputs((4, 8))
    for error, message, change in (
        (TypeError, "activation: x must be a torch.Tensor, found list", {"x": [1.0]}),
        (TypeError, "activation: x must be float32", {"x": x.int()}),
        (ValueError, "activation: kind must be one of gelu, .*, silu, found 'mish'", {"kind": "mish"}),
        (ValueError, "activation: kind must be one of .*, found None", {"kind": None}),
        (TypeError, "activation: gated must be True or False, found int", {"gated": 1}),
        (ValueError, r"activation: x must have shape \[..., 2 I\] where gated, found \[4, 7\]", {"x": x[:, :7]}),
        (ValueError, r"activation: x must have shape \[..., 2 I\] where gated, found \[\]", {"x": x[0, 0]}),
    ):
        with pytest.raises(error, match=message):
            function(**{"x": x, "kind": "silu", "gated": True, **change})
    with pytest.raises(TypeError, match="activation: x must be float32 or bfloat16, found float64"):
        activation(x.double(), "silu")
