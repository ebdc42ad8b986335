"""linear: values and gradients on oneDNN against float64 and a plain dot product, its routes, and the turning of operands."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import equal, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pyrlhf.ops import linear, linear_ref, pack_weight, packed_linear
from pyrlhf.ops._core import core

implementation = importlib.import_module("pyrlhf.ops.linear")
PRODUCT = "mkldnn::_linear_pointwise"
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 64, 48), (17, 33, 7), (31, 1023, 64), (1023, 37, 41)]  # rows, K, N
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="without oneDNN linear is F.linear throughout"
)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights take the way of large ones."""
    monkeypatch.setattr(implementation, "LARGE", 1)


def layer(rows: int, k: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))]


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """The output, then the gradients of x, weight and bias."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(t.grad for t in leaves if t is not None)]  # type: ignore[misc]


def in_order(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` by the plainest float32 dot product: one product after the other is added."""
    out = a.new_zeros(a.shape[0], b.shape[0])
    for k in range(a.shape[1]):
        out += a[:, k, None] * b[:, k]
    return out


def dot_products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """What `run` gives, with every sum taken in order."""
    ones = torch.ones(1, len(x))
    grads = (in_order(grad, weight.T), in_order(grad.T, x.T), in_order(grad.T, ones)[:, 0])
    return [in_order(x, weight) + bias, *grads]


class Called(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def called(function: Callable[..., Any], *args: Any) -> set[str]:
    with Called() as mode:
        function(*args)
    return mode.names


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_as_good_as_a_dot_product(
    any_size: None, shape: tuple[int, int, int], assert_as_good_as: Callable[..., None]
) -> None:
    inputs = layer(*shape)
    truth = run(linear_ref, *(t.double() for t in inputs))
    assert_as_good_as(run(linear, *inputs), dot_products(*inputs), truth, tiny=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_as_good_as_torchs(
    any_size: None, shape: tuple[int, int, int], assert_as_good_as: Callable[..., None]
) -> None:
    inputs = layer(*shape, torch.bfloat16)
    found = run(linear, *inputs)
    assert all(t.dtype == torch.bfloat16 for t in found)
    assert_as_good_as(found, run(F.linear, *inputs), run(linear_ref, *(t.double() for t in inputs)))


@pytest.mark.parametrize("k", [768, 3072])
def test_operands_are_not_rounded(k: int) -> None:
    """Numbers whose products and sums float32 holds exactly, and neither bfloat16 nor tf32 does."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-2047, 2048, (n, k), generator=generator).float() for n in (3, 512))
    x = torch.where(torch.arange(k) % (k // 3) == 0, x, torch.zeros(()))  # three products a sum: below 2 ** 24
    assert PRODUCT in called(linear, x, weight)
    assert torch.equal(linear(x, weight).double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("k", [192, 768, 3072, 8192])
def test_error_lies_within_that_of_sums_in_order(k: int) -> None:
    """Also where all products have one sign and every addition rounds the same way for a while."""
    for x, weight, *_ in (layer(16, k, 2048), [t.abs() for t in layer(16, k, 2048)]):
        truth = x.double() @ weight.double().T
        error, plain = ((y.double() - truth).square().mean().sqrt() for y in (linear(x, weight), in_order(x, weight)))
        assert error <= 1.01 * plain
        assert error <= math.sqrt(k) * 2**-24 * (x.abs().double() @ weight.abs().double().T).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_go_to_onednn_whatever_the_rows_and_small_ones_to_torch(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 oneDNN")
    for rows in (1, 2, 1100):
        inputs = layer(rows, 256, 256, dtype)
        assert PRODUCT in called(linear, *inputs[:3])
        assert not {"aten::mm", "aten::addmm"} & called(run, linear, *inputs)
        x, weight, bias, _ = layer(rows, 256, 255, dtype)
        assert PRODUCT not in called(linear, x, weight, bias)


def routes() -> dict[str, Callable[[pytest.MonkeyPatch], Any]]:
    return {
        "torch without oneDNN": lambda m: m.setattr(torch.backends.mkldnn, "is_available", lambda: False),
        "the reference": lambda m: m.setenv("PYRLHF_BACKEND", "ref"),
        "torch without the op": lambda m: m.setattr(implementation, "_has_product", lambda: False),
    }


@pytest.mark.parametrize("way", routes().values(), ids=routes().keys())
def test_ways_to_torchs_own(any_size: None, monkeypatch: pytest.MonkeyPatch, way: Callable[..., Any]) -> None:
    inputs = layer(40, 24, 16)
    way(monkeypatch)
    assert PRODUCT not in called(run, linear, *inputs)
    for ours, torchs in zip(run(linear, *inputs), run(F.linear, *inputs), strict=True):
        assert torch.equal(ours, torchs)


def test_onednn_switched_off_is_respected(any_size: None) -> None:
    inputs = layer(40, 24, 16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert PRODUCT not in called(run, linear, *inputs)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        for ours, torchs in zip(run(compiled, *inputs), run(F.linear, *inputs), strict=True):
            torch.testing.assert_close(ours, torchs)
    assert PRODUCT in called(run, linear, *inputs)


def test_bfloat16_without_the_instructions_is_torchs(any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_has_bfloat16", lambda: False)
    assert PRODUCT not in called(run, linear, *layer(40, 24, 16, torch.bfloat16))
    assert PRODUCT in called(run, linear, *layer(40, 24, 16))


def test_other_dtypes_and_autocast_are_torchs(any_size: None) -> None:
    for dtype in (torch.float64, torch.float16):
        inputs = layer(40, 24, 16, dtype)
        assert PRODUCT not in called(run, linear, *inputs)
        assert equal(run(linear, *inputs), run(F.linear, *inputs))
    x, weight, bias, _ = layer(40, 24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x.bfloat16(), weight, bias), F.linear(x.bfloat16(), weight, bias))
    assert torch.autograd.gradcheck(linear, [t.double().requires_grad_() for t in (x[:5], weight, bias)])


def test_any_shape_and_layout_of_x(any_size: None) -> None:
    _, weight, bias, _ = layer(1, 24, 16)
    plain = torch.randn(6, 24)
    for x in (
        plain[0],
        plain.view(2, 3, 24),
        plain.view(3, 2, 24).transpose(0, 1),
        plain.t().contiguous().t(),
        torch.cat([plain, plain], 1)[:, :24],
        torch.cat([plain, plain], 1)[:, ::2],
        plain[:1].expand(6, -1),
        plain[:0],
        plain.view(2, 3, 24)[:, :0],
    ):
        grad = torch.randn(*x.shape[:-1], 16)
        for ours, torchs in zip(run(linear, x, weight, bias, grad), run(F.linear, x, weight, bias, grad), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_any_layout_of_weight_and_gradient(any_size: None) -> None:
    x, weight, bias, grad = layer(40, 24, 16)
    wide = torch.cat([weight, weight], 1)
    views = (weight.t().contiguous().t(), wide[:, :24], wide[:, ::2], weight[:1].expand(16, -1), wide.view(-1, 24)[::2])
    for w in views:
        for g in (grad, grad.t().contiguous().t(), grad[:1].expand(40, -1), torch.ones(()).expand(40, 16)):
            leaves = [t.detach().requires_grad_() for t in (x, w, bias)]
            found = torch.autograd.grad(linear(*leaves), leaves, g)
            for ours, torchs in zip(found, torch.autograd.grad(F.linear(*leaves), leaves, g), strict=True):
                torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_needs_a_gradient_gets_one(any_size: None, compiled: bool) -> None:
    torch.compiler.reset()
    function = torch.compile(linear, fullgraph=True, backend="aot_eager") if compiled else linear
    *inputs, grad = layer(40, 24, 16)
    full = run(linear, *inputs, grad)[1:]
    for wanted in range(1, 8):
        leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        function(*leaves).backward(grad)
        for t, expected in zip(leaves, full, strict=True):
            assert t.grad is None if not t.requires_grad else torch.equal(t.grad, expected)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not function(*(t.requires_grad_() for t in inputs)).requires_grad


def test_a_frozen_layer_keeps_nothing_of_x(any_size: None) -> None:
    x, weight, bias, _ = layer(40, 24, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        linear(x.requires_grad_(), weight, bias)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(any_size: None, reentrant: bool) -> None:
    inputs = layer(40, 24, 16)

    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(linear(x, weight, bias).relu(), weight.t(), None)

    def recomputed(*given: Tensor) -> Tensor:
        out: Tensor = checkpoint(twice, *given, use_reentrant=reentrant)
        return out

    grad = torch.randn(40, 24)
    for a, b in zip(run(twice, *inputs[:3], grad), run(recomputed, *inputs[:3], grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat_on_any_number_of_threads(
    dtype: torch.dtype, same_bits_for_any_threads: Callable[..., None]
) -> None:
    inputs = layer(1030, 520, 512, dtype)  # large enough for oneDNN and both threads
    same_bits_for_any_threads(lambda: run(linear, *inputs), repeats=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    x, weight, bias, grad = layer(1100, 768, 600, dtype)
    out, grad_x, *_ = run(linear, x, weight, bias, grad)
    for at in [slice(0, n) for n in (1, 2, 3, 16, 63, 64, 65, 257, 1000)] + [slice(1099, 1100), slice(3, 70)]:
        some, some_grad, *_ = run(linear, x[at], weight, bias, grad[at])
        assert torch.equal(some, out[at])
        assert torch.equal(some_grad, grad_x[at])


def test_every_output_is_written(any_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(70, 40, 33)
    expected = run(linear, *inputs)
    empty = Tensor.new_empty
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda t, *shape, **options: empty(t, *shape, **options).fill_(torch.nan))
        assert equal(run(linear, *inputs), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_any_sizes(rows: int, k: int, n: int, biased: bool) -> None:
    x, weight, bias, grad = layer(rows, k, n, seed=rows * 71 + k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "LARGE", 1)
        given_bias = bias if biased else None
        for a, b in zip(
            run(linear, x, weight, given_bias, grad), run(F.linear, x, weight, given_bias, grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_wrong_inputs_are_named() -> None:
    x, weight, bias, _ = layer(8, 24, 16)
    with pytest.raises(TypeError, match=r"linear: x must be a torch.Tensor, found list"):
        linear([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear: x must be float32 or .*, found int64"):
        linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"linear: x must have shape \[..., K\], found a scalar"):
        linear(x[0, 0], weight)
    with pytest.raises(TypeError, match="linear: weight must be float32, found bfloat16"):
        linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"linear: weight must have shape \[any, 24\], found \[24, 16\]"):
        linear(x, weight.t())
    with pytest.raises(ValueError, match=r"linear: bias must have shape \[16\], found \[1\]"):
        linear(x, weight, bias[:1])
    with pytest.raises(ValueError, match="linear: bias must be on cpu"):
        linear(x, weight, bias.to("meta"))


def test_registration_and_compilation(any_size: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, grad = layer(30, 24, 16, dtype)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(torch.ops.pyrlhf.linear.default, (x, weight, bias))
        torch.library.opcheck(torch.ops.pyrlhf.linear.default, (x, weight, None))
        given = (grad, x.detach(), weight.detach(), [True, True, True])
        torch.library.opcheck(torch.ops.pyrlhf.linear_backward.default, given)

        def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(x.view(2, 15, 24) * 2, weight, bias).relu()

        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*leaves), chain(*leaves))
        found = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        for a, b in zip(found, torch.autograd.grad(chain(*leaves).sum(), leaves), strict=True):
            assert torch.equal(a, b)


# -- turning an operand over ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (16, 16), (17, 33), (129, 127), (1023, 260), (300, 515)])
def test_turned_is_the_transpose_with_its_column_sums(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = torch.cat([t, t], 1)
    sums = torch.full((shape[1],), torch.nan)
    for laid in (t, wide[:, : shape[1]], wide[:, shape[1] :], t.t().contiguous().t()):
        found = implementation._turned(laid, sums)
        assert found.is_contiguous()
        assert torch.equal(found, t.t())
        exact = t.double().sum(0)
        assert (sums - exact).abs().max() <= 2 * (t.float().sum(0) - exact).abs().max() + 1e-6 * (1 + exact.abs().max())
        sums.fill_(torch.nan)


def test_turned_writes_all_and_no_more(isa: str) -> None:
    rows, columns = 37, 53
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.randn(rows, columns).to(dtype)
        room = torch.full((columns * rows + 64,), torch.nan, dtype=dtype)
        sums = torch.full((columns + 32,), torch.nan)
        code = 0 if dtype == torch.float32 else 1
        place = room[32:].data_ptr()
        core().transpose(t.data_ptr(), code, rows, columns, columns, place, sums[16:].data_ptr(), 1)
        assert torch.equal(room[32:-32].view(columns, rows), t.t())
        assert torch.cat([room[:32], room[-32:]]).isnan().all()
        assert sums[16:-16].isfinite().all()
        assert torch.cat([sums[:16], sums[-16:]]).isnan().all()


def test_column_sums_of_many_rows_stay_exact_enough(isa: str) -> None:
    t = torch.rand(20_000, 130, generator=torch.Generator().manual_seed(3))
    found = []
    for count in (1, 2, 3):
        sums = torch.empty(130)
        with threads(count):
            implementation._turned(t, sums)
        found.append(sums)
    assert all(torch.equal(found[0], other) for other in found)
    exact = t.double().sum(0)
    assert ((found[0] - exact).abs() / exact).max() < 1e-6


def test_a_nan_stays_in_its_place(isa: str) -> None:
    t = torch.zeros(100, 70)
    t[40, 50] = torch.nan
    sums = torch.empty(70)
    assert implementation._turned(t, sums).isnan().nonzero().tolist() == [[50, 40]]
    assert sums.isnan().nonzero().flatten().tolist() == [50]


@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 33, 17), (3, 7, 64, 130), (70, 768, 512)], ids=str)
def test_values_of_a_packed_weight_have_the_gradient_of_the_layer(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    *rows, k, n = shape
    draw = torch.Generator().manual_seed(1)
    x, weight, bias, grad = (
        torch.randn(size, generator=draw).to(dtype) for size in ((*rows, k), (n, k), (n,), (*rows, n))
    )
    packed = pack_weight(weight, dtype)

    def run(**how: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = linear(*leaves, **how)
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    found, plain = run(packed=packed), run()
    assert equal(found[0], packed_linear(x.view(-1, k), packed, bias).view(*rows, n))
    with torch.no_grad():
        assert equal(found[0], linear(x, weight, bias, packed=packed))
    for a, b in zip(found[1:], plain[1:], strict=True):
        assert a.shape == b.shape
        assert float((a - b).float().norm()) <= (1e-6 if dtype is torch.float32 else 1e-2) * float(b.float().norm())
    frozen = linear(x.clone().requires_grad_(), weight, packed=packed)
    frozen.sum().backward()
    assert weight.grad is None


def test_a_packed_weight_of_another_layer_is_named() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    for shape in ((5, 9), (6, 8)):
        with pytest.raises(ValueError, match=r"linear: packed must be made of a weight \[5, 8\], found one of"):
            linear(x, weight, packed=pack_weight(torch.randn(shape), torch.float32))
