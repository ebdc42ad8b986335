"""pack_weight and packed_linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pyrlhf.ops import PackedWeight, pack_weight, packed_linear, packed_linear_ref

ACTIVATIONS = {
    None: lambda y: y,
    "gelu": functional.gelu,
    "gelu_new": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}


def inputs(rows: int, features: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + out)
    shapes = ((rows, features), (out, features), (out,))
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight * features**-0.5, bias


@pytest.mark.parametrize("function", [packed_linear, packed_linear_ref])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features", "out"), [(1, 1, 1), (64, 33, 65), (3, 256, 127), (0, 8, 4), (33, 16, 3)])
def test_as_good_as_torch(rows, features, out, dtype, activation, function, assert_as_good_as):
    x, weight, bias = inputs(rows, features, out, dtype)
    act = ACTIVATIONS[activation]
    packed = pack_weight(weight, dtype)
    for b in (bias, None):
        y = function(x, packed, b, activation)
        assert y.dtype == dtype
        exact = act(functional.linear(x.double(), weight.double(), None if b is None else b.double()))
        # at least float32's rounding of a sum of that many terms, whatever order the peer adds in
        assert_as_good_as([y], [act(functional.linear(x, weight, b))], [exact], tiny=1e-6 + features * 2**-24)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 40),
    out=st.integers(1, 40),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_any_shape(rows, features, out, activation):
    x, weight, bias = inputs(rows, features, out)
    exact = ACTIVATIONS[activation](x.double() @ weight.double().T + bias.double())
    y = packed_linear(x, pack_weight(weight, torch.float32), bias, activation)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_float32_rows_through_a_bfloat16_weight():
    x, weight, bias = inputs(5, 300, 64)
    packed = pack_weight(weight, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    y = packed_linear(x, packed, bias)
    assert y.dtype == torch.float32
    exact = x.bfloat16().double() @ weight.bfloat16().double().T + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_do_not_depend_on_other_rows(dtype, activation):
    for features, out in ((64, 192), (257, 131), (768, 64)):
        x, weight, bias = inputs(130, features, out, dtype)
        packed = pack_weight(weight, dtype)
        every = packed_linear(x, packed, bias, activation)
        for rows in (slice(0, 1), slice(5, 7), slice(31, 64), slice(100, 130)):
            assert torch.equal(packed_linear(x[rows], packed, bias, activation), every[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_repeat(dtype):
    x, weight, bias = inputs(33, 257, 131, dtype)
    packed = pack_weight(weight, dtype)
    first = packed_linear(x, packed, bias, "gelu_new")
    assert all(torch.equal(packed_linear(x, packed, bias, "gelu_new"), first) for _ in range(1000))


def test_a_bad_row_stays_alone_and_packing_copies():
    x, weight, _ = inputs(4, 8, 6)
    packed = pack_weight(weight, torch.float32)
    clean = packed_linear(x, packed)
    weight.zero_()
    x[1] = torch.nan
    y = packed_linear(x, packed)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])
    column = torch.ones(1, 5)
    packed = pack_weight(column, torch.float32)
    column.zero_()
    assert packed_linear(torch.ones(1, 5), packed).item() == 5.0


def test_torch_library():
    x, weight, bias = inputs(5, 8, 6)
    packed = pack_weight(weight, torch.float32)
    torch.library.opcheck(torch.ops.pyrlhf.packed_linear.default, (x, packed.panels, bias, "silu", 6))
    compiled = torch.compile(lambda t: packed_linear(t * 2, packed, bias, "gelu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), packed_linear(x * 2, packed, bias, "gelu"))
    assert torch.equal(packed_linear(x.T.contiguous().T, packed), packed_linear(x, packed))


@pytest.mark.parametrize("function", [packed_linear, packed_linear_ref])
def test_wrong_calls_name_the_argument(function):
    x, weight, bias = inputs(5, 8, 6)
    packed = pack_weight(weight, torch.float32)
    assert isinstance(packed, PackedWeight)
    for error, message, change in (
        (TypeError, "packed must be a PackedWeight", {"packed": weight}),
        (TypeError, "x must be", {"x": [1.0]}),
        (TypeError, "x must be float32", {"x": x.double()}),
        (ValueError, "x must have shape", {"x": x[:, :7]}),
        (ValueError, "x must have shape", {"x": x[0]}),
        (ValueError, "bias must have shape", {"bias": bias[:5]}),
        (TypeError, "bias must be float32", {"bias": bias.bfloat16()}),
        (ValueError, "activation must be", {"activation": "swish"}),
    ):
        with pytest.raises(error, match=message):
            function(**{"x": x, "packed": packed, "bias": bias, **change})
    with pytest.raises(TypeError, match="weight must be"):
        pack_weight(weight.int(), torch.float32)
    with pytest.raises(ValueError, match="weight must have shape"):
        pack_weight(weight[0], torch.float32)
    with pytest.raises(TypeError, match="dtype must be one of"):
        pack_weight(weight, torch.int8)
