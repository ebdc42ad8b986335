"""pack_weight and packed_linear: values, every activation, layout and update of a packed weight, independence of rows."""

from __future__ import annotations

import functools

import pytest
import torch
from checking import equal, running_on, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pyrlhf.ops import PackedWeight, pack_weight, packed_linear, packed_linear_ref
from pyrlhf.ops import activation as activated
from pyrlhf.ops._core import core


def quick_gelu(y: Tensor) -> Tensor:
    """As torch does the others: bfloat16 by way of float32."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(y.dtype)


ACTIVATIONS = {
    None: lambda y: y,
    "gelu": functional.gelu,
    "gelu_new": lambda y: functional.gelu(y, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": functional.silu,
    "relu": functional.relu,
}
DTYPES = (torch.float32, torch.bfloat16)


def inputs(rows: int, features: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + out)
    shapes = ((rows, features), (out, features), (out,))
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight * max(features, 1) ** -0.5, bias


def exact(
    x: Tensor, weight: Tensor, packed: torch.dtype, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """In float64, but for x and weight, which are rounded to the packed dtype."""
    y = x.to(packed).double() @ weight.to(packed).double().T
    return ACTIVATIONS[activation](y if bias is None else y + bias.double())


# -- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [packed_linear, packed_linear_ref])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "out"), [(1, 1, 1), (64, 33, 65), (3, 256, 127), (0, 8, 4), (33, 16, 3)])
def test_as_good_as_torch(rows, features, out, dtype, activation, function, assert_as_good_as):
    x, weight, bias = inputs(rows, features, out, dtype)
    act = ACTIVATIONS[activation]
    packed = pack_weight(weight, dtype)
    for b in (bias, None):
        y = function(x, packed, b, activation)
        assert y.dtype == dtype
        truth = exact(x, weight, dtype, b, activation)
        # at least float32's rounding of a sum of that many terms, whatever order the peer adds in
        assert_as_good_as([y], [act(functional.linear(x, weight, b))], [truth], tiny=1e-6 + features * 2**-24)


SHAPES = [(1, 1, 1), (1, 1023, 251), (2, 3, 5), (5, 7, 63), (64, 1023, 65), (65, 257, 191), (3, 64, 64), (127, 2, 131)]


@functools.cache
def solved(rows: int, features: int, out: int, dtype: torch.dtype, biased: bool) -> tuple[Tensor, ...]:
    """x, weight, bias, torch's product and the exact one, made once for all instruction sets and activations."""
    x, weight, bias = inputs(rows, features, out, dtype)
    bias = bias if biased else None
    return x, weight, bias, functional.linear(x, weight, bias), exact(x, weight, dtype, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, poison, dtype, activation, assert_as_good_as):
    act = ACTIVATIONS[activation]
    for shape in (*SHAPES, (0, 5, 7), (5, 7, 0)):
        for biased in (True, False):
            x, weight, bias, product, truth = solved(*shape, dtype, biased)
            y = packed_linear(x, pack_weight(weight, dtype), bias, activation)
            assert_as_good_as([y], [act(product)], [act(truth)], tiny=1e-6 + shape[1] * 2**-24)


@pytest.mark.parametrize("packed_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_through_each_weight(isa, poison, dtype, packed_dtype):
    """One rounding of the inputs to the packed dtype, sums in float32, one rounding of the result."""
    for rows, features, out in SHAPES:
        x, weight, bias = inputs(rows, features, out)
        x = x.to(dtype)
        packed = pack_weight(weight, packed_dtype)
        assert packed.dtype == packed_dtype
        for b in (bias.to(dtype), bias, None):
            y = packed_linear(x, packed, b)
            assert y.dtype == dtype
            relative = 2**-8 if dtype == torch.bfloat16 else 2**-22
            torch.testing.assert_close(
                y.double(), exact(x, weight, packed_dtype, b), rtol=relative, atol=2e-6 + features * 2**-24
            )


@pytest.mark.parametrize("packed_dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_a_float32_result_of_bfloat16_is_rounded_less(isa, poison, backend, packed_dtype, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    for rows, features, out in SHAPES:
        x, weight, bias = inputs(rows, features, out, torch.bfloat16)
        packed = pack_weight(weight, packed_dtype)
        for b in (bias, bias.float(), None):
            for activation in ("gelu_new", None):
                wide = packed_linear(x, packed, b, activation, dtype=torch.float32)
                assert wide.dtype == torch.float32
                as_wide = packed_linear(x.float(), packed, None if b is None else b.float(), activation)
                assert torch.equal(wide, as_wide)
                narrow = packed_linear(x, packed, b, activation, dtype=torch.bfloat16)
                assert torch.equal(narrow, packed_linear(x, packed, b, activation))
            if packed_dtype == torch.float32 or backend == "auto":  # torch's own GEMM rounds in another place
                assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_is_the_op_that_would_follow(isa, poison, dtype, kind):
    """Bit for bit, and so of the rounded sums."""
    for shape in SHAPES:
        x, weight, bias = inputs(*shape, dtype)
        packed = pack_weight(weight * 4, dtype)
        for wanted in {dtype, torch.float32}:
            plain = packed_linear(x, packed, bias, dtype=wanted)
            assert torch.equal(packed_linear(x, packed, bias, kind, dtype=wanted), activated(plain, kind))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 70),
    features=st.integers(0, 150),
    out=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    packed_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    isa=st.sampled_from(core().isas_available()),
)
def test_any_shape(rows, features, out, dtype, packed_dtype, bias, activation, isa):
    x, weight, b = inputs(rows, features, out, dtype)
    b = b if bias else None
    with running_on(isa):
        packed = pack_weight(weight, packed_dtype)
        plain, y = packed_linear(x, packed, b), packed_linear(x, packed, b, activation)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(plain.double(), exact(x, weight, packed_dtype, b), rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(y.double(), ACTIVATIONS[activation](plain.double()), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_features_the_bias_is_left(isa, poison, dtype):
    x, weight, bias = inputs(67, 0, 70, dtype)
    y = packed_linear(x, pack_weight(weight, dtype), bias, "relu")
    assert torch.equal(y, bias.relu().expand(67, 70))
    assert not packed_linear(x, pack_weight(weight, dtype)).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_over_the_whole_line(isa, activation, assert_as_good_as):
    """One feature of weight 1: the sum is exact, so this is the activation alone."""
    one = pack_weight(torch.ones(1, 1), torch.float32)
    act = ACTIVATIONS[activation]
    usual = torch.linspace(-20, 20, 4001)[:, None]
    assert_as_good_as([packed_linear(usual, one, None, activation)], [act(usual)], [act(usual.double())], tiny=2e-7)
    for sign in (1, -1):
        far = (
            sign * torch.tensor([0.0, 1e-38, 1e-30, 1e-10, 30.0, 90.0, 1e4, 1e20, 3e38, torch.inf, torch.nan])[:, None]
        )
        found = packed_linear(far, one, None, activation)
        # e^z of a z = 1.702 * 30 that is rounded to 2^-24 of itself
        relative = 51 * 2**-24 if activation == "quick_gelu" else 1e-6
        torch.testing.assert_close(found, act(far.double()).float(), rtol=relative, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_are_as_good_as_torch(isa, dtype, assert_as_good_as):
    x, weight, _ = inputs(9, 16_385, 67)
    x, weight = x.to(dtype), weight.to(dtype)
    y = packed_linear(x.float(), pack_weight(weight, dtype))  # float32: the sum itself, before its rounding
    # torch adds in many chains, this in one, whose expected error grows with the root of its length
    one_chain = torch.zeros(9, 67)
    for a, b in zip(x.float().T, weight.float().T, strict=True):
        one_chain = torch.addcmul(one_chain, a[:, None], b[None])
    assert_as_good_as([y], [one_chain], [exact(x, weight, dtype)], tiny=0)


# -- the packed weight -------------------------------------------------------------------------------------------------------


def panels_by_hand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Element by element as PackedWeight's docstring says it."""
    n, k = weight.shape
    per = 1 if dtype == torch.float32 else 2
    panels = torch.zeros(-(-n // 64), -(-k // per), 64, per, dtype=dtype)
    row, column = (x.reshape(-1) for x in torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij"))
    panels[row // 64, column // per, row % 64, column % per] = weight.to(dtype)[row, column]
    return panels.squeeze(3) if per == 1 else panels


WEIGHTS = [(1, 1), (63, 5), (64, 64), (65, 7), (131, 257), (1023, 1), (1, 1023), (300, 501)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_layout_and_that_all_of_it_is_written(isa, poison, source, dtype):
    for n, k in WEIGHTS:
        weight = inputs(1, k, n, source)[1]
        expected = panels_by_hand(weight, dtype)
        packed = pack_weight(weight, dtype)
        assert (packed.out_features, packed.in_features, packed.dtype) == (n, k, dtype)
        assert same_bits(packed.panels, expected)
        none = torch.zeros(len(expected), dtype=torch.int64)
        spoilt = PackedWeight(torch.full_like(expected, torch.nan), n, k, finite=False, fingerprints=none)
        spoilt.update(weight)
        assert same_bits(spoilt.panels, expected)


def flip_a_bit(rows: Tensor) -> None:
    bits = rows.view(torch.int16 if rows.dtype == torch.bfloat16 else torch.int32)
    place = [int(torch.randint(size, (1,))) for size in rows.shape]
    bits[tuple(place)] ^= 1 << int(torch.randint(8 * bits.itemsize - 1, (1,)))


CHANGES = {
    "a bit": flip_a_bit,
    "every sign": lambda rows: rows.neg_(),
    "the signs of a column": lambda rows: rows[:, -1].neg_(),
    "two signs of a row": lambda rows: rows[0, :: max(1, rows.shape[1] - 1)].neg_(),
    "the order of rows": lambda rows: rows.copy_(rows.flip(0)),
    "the order of columns": lambda rows: rows.copy_(rows.roll(8, 1)),
    "the first": lambda rows: rows[0, :1].neg_(),
    "the last": lambda rows: rows[-1, -1:].neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_an_update_writes_the_panels_whose_rows_have_changed(isa, source, dtype, change):
    """In ways that a weak sum would not see, too; and no other panel."""
    for n, k in ((130, 40), (66, 257), (192, 96), (70, 9)):
        weight = torch.randn(n, k).to(source)
        packed, panel, before = pack_weight(weight, dtype), (n - 1) // 64, weight.clone()
        CHANGES[change](weight[64 * panel :])
        assert not same_bits(before, weight)
        packed.panels[:panel] = torch.nan  # which nobody has been told
        packed.update(weight)
        assert same_bits(packed.panels[panel:], panels_by_hand(weight, dtype)[panel:])
        assert packed.panels[:panel].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_known(isa, dtype):
    weight = torch.randn(130, 20).to(dtype)
    weight[70, 3] = torch.nan
    packed = pack_weight(weight, dtype)
    packed.update(weight)
    assert not packed.finite
    weight[:64] += 1
    packed.update(weight)
    assert not packed.finite
    weight[70, 3] = 0.0
    packed.update(weight)
    assert packed.finite


def test_an_update_by_plain_torch_is_noticed_by_the_next(isa, monkeypatch):
    first, second = torch.randn(2, 70, 9)
    packed = pack_weight(first, torch.float32)
    with monkeypatch.context() as plain:
        plain.setenv("PYRLHF_BACKEND", "ref")
        packed.update(second)
    packed.update(first)
    assert same_bits(packed.panels, panels_by_hand(first, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_an_update_is_packing_anew_in_the_same_memory(isa, source, dtype):
    for n, k in WEIGHTS:
        x, first, bias = inputs(5, k, n, source)
        second = first.flip(0) * 1.5 - 0.25
        packed, anew = pack_weight(first, dtype), pack_weight(second, dtype)
        panels, at = packed.panels, packed.panels.data_ptr()
        before = packed_linear(x, packed, bias)
        packed.update(second)
        assert packed.panels is panels
        assert panels.data_ptr() == at
        assert same_bits(panels, anew.panels)
        assert torch.equal(packed_linear(x, packed, bias, "silu"), packed_linear(x, anew, bias, "silu"))
        packed.update(first.requires_grad_())  # as an optimizer holds it
        assert not panels.requires_grad
        assert torch.equal(packed_linear(x, packed, bias), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_may_be_any_view(isa, dtype):
    generator = torch.Generator().manual_seed(4)
    large = torch.randn(140, 150, generator=generator).to(dtype)
    for view in (
        large[3:134, 5:142],
        large[::2],
        large[:, ::2],
        large[::3, 1::3],
        large.T,
        large.T[7:90, 3:76],
        large[:1].expand(70, 150),
        large[:, :1].expand(140, 9),
        large[:, :1],
        large.view(70, 300)[:, 100:250],
    ):
        copied = view.clone(memory_format=torch.contiguous_format)
        for packed_dtype in DTYPES:
            packed = pack_weight(view, packed_dtype)
            assert same_bits(packed.panels, panels_by_hand(copied, packed_dtype))
            packed.panels.fill_(torch.nan)
            packed.fingerprints.zero_()
            packed.update(view)
            assert same_bits(packed.panels, panels_by_hand(copied, packed_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_it_says_whether_all_is_finite(isa, backend, source, dtype, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    for n, k in WEIGHTS:
        weight = inputs(1, k, n, source)[1]
        around = torch.full((n + 2, k + 2), torch.nan, dtype=source)
        around[1:-1, 1:-1] = weight
        packed = pack_weight(around[1:-1, 1:-1], dtype)
        assert packed.finite
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            for place in (0, n * k // 2, n * k - 1):
                spoilt = weight.clone()
                spoilt.view(-1)[place] = bad
                packed.update(spoilt)
                assert not packed.finite
                assert not pack_weight(spoilt, dtype).finite
        packed.update(weight)
        assert packed.finite
    largest = torch.full((3, 5), torch.finfo(torch.float32).max)
    assert pack_weight(largest, dtype).finite == (dtype == torch.float32)  # infinite once it is rounded
    assert pack_weight(torch.full((3, 5), torch.finfo(source).max, dtype=source), source).finite


def test_x_and_bias_may_be_any_view(isa):
    x, weight, bias = inputs(40, 96, 70)
    packed = pack_weight(weight[:, :48], torch.float32)
    for view in (x[:, :48], x[:, ::2], x[:, 1:49], x.view(80, 48)[::2], x[:48, :40].T[:, :40].expand(40, 40)):
        if view.shape[1] != 48:
            packed = pack_weight(weight[:, :40], torch.float32)
        expected = packed_linear(view.clone(memory_format=torch.contiguous_format), packed, bias)
        assert torch.equal(packed_linear(view, packed, bias), expected)
        two_apart = torch.stack((bias, bias * torch.nan), 1)[:, 0]
        assert torch.equal(packed_linear(view, packed, two_apart), expected)


def test_packing_copies():
    weight = torch.ones(1, 5)
    packed = pack_weight(weight, torch.float32)
    weight.zero_()
    assert packed_linear(torch.ones(1, 5), packed).item() == 5.0


def test_a_refused_update_writes_nothing():
    weight = inputs(1, 8, 6)[1]
    packed = pack_weight(weight, torch.float32)
    before = packed.panels.clone()
    for error, message, wrong in (
        (TypeError, "weight must be a torch.Tensor, found list", weight.tolist()),
        (TypeError, "weight must be float32 or bfloat16, found float64", weight.double()),
        (ValueError, r"weight must have shape \[6, 8\], found \[6, 7\]", weight[:, :7]),
        (ValueError, r"weight must have shape \[6, 8\], found \[8, 6\]", weight.T),
        (ValueError, r"weight must have shape \[6, 8\], found \[48\]", weight.flatten()),
        (ValueError, "weight must be on cpu", weight.to("meta")),
    ):
        with pytest.raises(error, match=message):
            packed.update(wrong)
        assert torch.equal(packed.panels, before)


# -- what must not matter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "out"), [(64, 192), (257, 131), (768, 64), (7, 5)])
def test_a_rows_bits_are_its_own(isa, features, out, dtype):
    """Each of 64 rows alone, the first 1..64 of them together, and some in other places."""
    x, weight, bias = inputs(64, features, out, dtype)
    packed = pack_weight(weight, dtype)
    for activation in ACTIVATIONS:
        every = packed_linear(x, packed, bias, activation)
        for rows in range(1, 65):
            assert torch.equal(packed_linear(x[:rows], packed, bias, activation), every[:rows])
            assert torch.equal(packed_linear(x[rows - 1 : rows], packed, bias, activation), every[rows - 1 : rows])
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(packed_linear(x[order], packed, bias, activation), every[order])
        three_times = packed_linear(x.repeat(3, 1)[:150], packed, bias, activation)
        assert torch.equal(three_times, every.repeat(3, 1)[:150])


@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_do_not_depend_on_other_rows(dtype, activation, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    for features, out in ((64, 192), (257, 131), (768, 64)):
        x, weight, bias = inputs(130, features, out, dtype)
        packed = pack_weight(weight, dtype)
        every = packed_linear(x, packed, bias, activation)
        for rows in (slice(0, 1), slice(5, 7), slice(31, 64), slice(100, 130)):
            assert torch.equal(packed_linear(x[rows], packed, bias, activation), every[rows])


@pytest.mark.parametrize("packed_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "out"), [(1, 1023, 1031), (33, 513, 700), (130, 257, 65), (515, 65, 130)])
def test_bits_do_not_depend_on_threads(isa, rows, features, out, dtype, packed_dtype, same_bits_for_any_threads):
    x, weight, bias = inputs(rows, features, out, dtype)

    def run() -> list[Tensor]:
        packed = pack_weight(weight, packed_dtype)
        return [packed.panels, packed_linear(x, packed, bias, "gelu_new")]

    same_bits_for_any_threads(run, repeats=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_repeat(dtype):
    x, weight, bias = inputs(33, 257, 131, dtype)
    packed = pack_weight(weight, dtype)
    first = packed_linear(x, packed, bias, "gelu_new")
    assert all(torch.equal(packed_linear(x, packed, bias, "gelu_new"), first) for _ in range(1000))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_and_a_bad_output_stay_alone(isa, dtype, activation):
    x, weight, bias = inputs(67, 33, 130, dtype)
    clean = packed_linear(x, pack_weight(weight, dtype), bias, activation)
    rows, columns = torch.arange(67) != 5, torch.arange(130) != 65
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[5] = bad
        y = packed_linear(spoilt, pack_weight(weight, dtype), bias, activation)
        assert torch.equal(y[rows], clean[rows])
        assert bad == torch.inf or y[5].isnan().all()
        spoilt = weight.clone()
        spoilt[65] = bad
        y = packed_linear(x, pack_weight(spoilt, dtype), bias, activation)
        assert torch.equal(y[:, columns], clean[:, columns])
        assert bad == torch.inf or y[:, 65].isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_core_and_plain_torch_agree(isa, activation, dtype, tolerance, monkeypatch):
    for rows, features, out in SHAPES:
        x, weight, bias = inputs(rows, features, out, dtype)
        found = {}
        for backend in ("auto", "ref"):
            monkeypatch.setenv("PYRLHF_BACKEND", backend)
            packed = pack_weight(weight, dtype)
            found[backend] = [packed.panels, packed_linear(x, packed, bias, activation)]
        assert equal(found["auto"][:1], found["ref"][:1])
        torch.testing.assert_close(found["auto"][1], found["ref"][1], rtol=tolerance, atol=tolerance)


# -- torch.library and wrong calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_library(dtype):
    x, weight, bias = inputs(5, 9, 6, dtype)
    packed = pack_weight(weight, dtype)
    for b in (bias, bias.float(), None):
        for activation in ACTIVATIONS:
            for result in (None, torch.float32):
                arguments = x, packed.panels, b, activation, 6, result
                torch.library.opcheck(torch.ops.pyrlhf.packed_linear.default, arguments)
    compiled = torch.compile(lambda t: packed_linear(t * 2, packed, bias, "gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed_linear(x * 2, packed, bias, "gelu"))


@pytest.mark.parametrize("function", [packed_linear, packed_linear_ref])
def test_wrong_calls_name_the_argument(function):
    x, weight, bias = inputs(5, 8, 6)
    packed = pack_weight(weight, torch.float32)
    assert isinstance(packed, PackedWeight)
    for error, message, change in (
        (TypeError, "packed must be a PackedWeight, found Tensor", {"packed": weight}),
        (TypeError, "x must be a torch.Tensor, found list", {"x": [1.0]}),
        (TypeError, "x must be float32 or bfloat16, found float64", {"x": x.double()}),
        (TypeError, "x must be float32 or bfloat16, found int64", {"x": x.long()}),
        (ValueError, r"x must have shape \[any, 8\], found \[5, 7\]", {"x": x[:, :7]}),
        (ValueError, r"x must have shape \[any, 8\], found \[8\]", {"x": x[0]}),
        (ValueError, "x must be on cpu", {"x": x.to("meta")}),
        (ValueError, r"bias must have shape \[6\], found \[5\]", {"bias": bias[:5]}),
        (TypeError, "bias must be float32", {"bias": bias.bfloat16()}),
        (TypeError, "bias must be a torch.Tensor, found float", {"bias": 1.0}),
        (ValueError, "activation must be None or one of gelu, .*found 'swish'", {"activation": "swish"}),
        (TypeError, "dtype must be None, x's .*float32.* or torch.float32, found torch.bf", {"dtype": torch.bfloat16}),
    ):
        with pytest.raises(error, match=message):
            function(**{"x": x, "packed": packed, "bias": bias, **change})
    for error, message, wrong, dtype in (
        (TypeError, "weight must be float32 or bfloat16, found int32", weight.int(), torch.float32),
        (TypeError, "weight must be a torch.Tensor, found NoneType", None, torch.float32),
        (ValueError, r"weight must have shape \[any, any\], found \[8\]", weight[0], torch.float32),
        (TypeError, "dtype must be one of .*found torch.int8", weight, torch.int8),
        (TypeError, "dtype must be one of .*found torch.float16", weight, torch.float16),
    ):
        with pytest.raises(error, match=message):
            pack_weight(wrong, dtype)
