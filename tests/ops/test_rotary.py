"""rotary against Hugging Face's Llama, rotations of the plane, and its own rules."""

from __future__ import annotations

import sys

import pytest
import torch
from checking import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import rotary, rotary_ref


def inputs(tokens: int, dim: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + dim)
    q, k = (torch.randn(tokens, h, dim, generator=generator).to(dtype) for h in (4, 2))
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    return q, k, positions, 1.0 / 10000 ** (torch.arange(half) / max(half, 1))


def by_complex_numbers(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Channel pair (i, i + half) as one complex number, turned."""
    half = len(inv_freq)
    turn = torch.polar(torch.ones(1).double(), positions[:, None].double() * inv_freq.double())[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("function", [rotary, rotary_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_hugging_face_llama(function, dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, positions, inv_freq = inputs(31, 16, 8, dtype)
    angles = positions[:, None].float() * inv_freq
    angles = torch.cat((angles, angles), -1)[None]
    heads = (x.float().transpose(0, 1)[None] for x in (q, k))
    peers = llama.apply_rotary_pos_emb(*heads, angles.cos(), angles.sin())
    for a, b in zip(function(q, k, positions, inv_freq), peers, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b[0].transpose(0, 1).to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6
        )


@pytest.mark.parametrize(("dim", "half"), [(2, 1), (13, 6), (64, 16), (8, 0)])
def test_values_and_gradients(dim, half, values_and_grads):
    q, k, positions, inv_freq = inputs(17, dim, half)
    exact = values_and_grads(
        lambda *x: tuple(by_complex_numbers(t, positions, inv_freq) for t in x), (q.double(), k.double())
    )
    for function in (rotary, rotary_ref):
        got = values_and_grads(lambda *x: function(*x, positions, inv_freq), (q, k))  # noqa: B023
        for a, t in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), t, rtol=0, atol=2e-4)  # angles reach 500 rad in float32


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 40), half=st.integers(0, 9), rest=st.integers(0, 3))
def test_any_shape_keeps_lengths(tokens, half, rest):
    q, k, positions, inv_freq = inputs(tokens, max(1, 2 * half + rest), half)
    for before, after in zip((q, k), rotary(q, k, positions, inv_freq), strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        assert torch.equal(after[..., 2 * half :], before[..., 2 * half :])


def test_products_depend_on_the_distance_only():
    q, k, _, inv_freq = inputs(1, 16, 8)

    def score(i: int, j: int) -> Tensor:
        turned_q, _ = rotary(q, k, torch.tensor([i]), inv_freq)
        _, turned_k = rotary(q, k, torch.tensor([j]), inv_freq)
        return (turned_q[:, :2] * turned_k).sum(-1)

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=0, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_other_rows(dtype):
    q, k, positions, inv_freq = inputs(50, 14, 7, dtype)
    every = rotary(q, k, positions, inv_freq)
    for _ in range(1000):
        assert equal(every, rotary(q, k, positions, inv_freq))
    for rows in (slice(0, 1), slice(13, 50)):
        some = rotary(q[rows], k[rows], positions[rows], inv_freq)
        assert all(torch.equal(a, b[rows]) for a, b in zip(some, every, strict=True))


def test_low_precision_gradients(values_and_grads, assert_as_good_as):
    q, k, positions, inv_freq = inputs(31, 16, 8, torch.bfloat16)
    positions = positions % 3  # angles that float32 holds exactly enough
    angles = positions[:, None, None] * inv_freq
    cos, sin = (torch.cat((f(angles), f(angles)), -1).bfloat16() for f in (torch.cos, torch.sin))

    def all_bfloat16(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t * cos + torch.cat((-t[..., 8:], t[..., :8]), -1) * sin for t in x)

    ours = values_and_grads(lambda *x: rotary(*x, positions, inv_freq), (q, k))
    peers = values_and_grads(all_bfloat16, (q, k))
    exact = values_and_grads(lambda *x: rotary_ref(*x, positions, inv_freq), (q.double(), k.double()))
    assert_as_good_as(ours, peers, exact)


def test_gradcheck():
    q, k, positions, inv_freq = inputs(3, 5, 2, torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: rotary_ref(*x, positions, inv_freq), (q, k))
    op = torch.ops.pyrlhf.rotary
    assert torch.autograd.gradcheck(lambda *x: op(*x, positions, inv_freq, False), (q, k))


def test_non_contiguous_and_one_gradient():
    fused = torch.randn(9, 3, 4, 8)
    positions, inv_freq = torch.arange(9), torch.ones(4)
    q, k, _ = fused.unbind(1)
    pairs = zip(rotary(q, k, positions, inv_freq), rotary(q.clone(), k.clone(), positions, inv_freq), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    leaf = q.clone().requires_grad_()
    rotary(leaf, k, positions, inv_freq)[0].sum().backward()
    assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "half"), [(1, 0), (2, 1), (13, 6), (64, 32), (80, 40), (128, 32), (300, 150)])
def test_every_instruction_set(isa, poison, dim, half, dtype, values_and_grads, assert_as_good_as):
    q, k, positions, inv_freq = inputs(17, dim, half, dtype)
    exact = values_and_grads(lambda *x: doubly(*x, positions, inv_freq), (q.double(), k.double()))
    peers = values_and_grads(lambda *x: rotary_ref(*x, positions, inv_freq), (q, k))
    assert_as_good_as(values_and_grads(lambda *x: rotary(*x, positions, inv_freq), (q, k)), peers, exact)


def doubly(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, ...]:
    """Turned in float64 by the float32 angles."""
    angles = (positions.float()[:, None] * inv_freq).double()
    one = torch.ones(len(positions), dtype=torch.int64)
    return tuple(
        torch.stack([by_complex_numbers(x[t : t + 1], one[:1], angles[t])[0] for t in range(len(x))]) for x in (q, k)
    )


@pytest.mark.parametrize("largest", [8_192, 1_000_000, 2**24, 2**31, 2**45])
def test_angles_are_as_good_as_torchs_at_any_position(isa, largest):
    """cos and sin of float32 angles are the turned unit vectors."""
    positions = torch.randint(-largest, largest, (500,), generator=torch.Generator().manual_seed(1))
    inv_freq = 1.0 / 10000 ** (torch.arange(40) / 40)
    unit = torch.zeros(500, 1, 80)
    unit[..., :40] = 1
    found = rotary(unit, unit, positions, inv_freq)[0][:, 0]
    angles = positions.float()[:, None] * inv_freq
    for ours, function in ((found[:, :40], torch.cos), (found[:, 40:], torch.sin)):
        exact = function(angles.double())
        torchs = (function(angles) - exact).abs().max()
        assert (ours - exact).abs().max() <= min(2 * torchs, 6.1e-8)  # half an ulp of 1 is 6e-8


def test_views_are_read_where_they_lie(isa):
    """q and k as views of one matrix, every other head, every other token, other orders of the dimensions."""
    matrix, positions, inv_freq = torch.randn(34, 7, 24), torch.arange(34) * 3, torch.rand(12)
    for q, k in (
        matrix.split((4, 2, 1), dim=1)[:2],
        (matrix[:, 1::2], matrix[:, ::3]),
        (matrix[::2, :2], matrix[1::2, 2:]),
        (matrix.transpose(1, 2), matrix.permute(0, 2, 1)[..., :7]),
        (matrix[:1].expand(34, 7, 24), matrix[:, :1].expand(34, 3, 24)),
    ):
        half = min(12, q.shape[2] // 2)
        found = rotary(q, k, positions[: len(q)], inv_freq[:half])
        dense = rotary(q.contiguous(), k.contiguous(), positions[: len(q)], inv_freq[:half])
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, dense, strict=True))


def test_gradients_with_strides(isa):
    q, k = (torch.randn(33, heads, 24, requires_grad=True) for heads in (4, 2))
    out = rotary(q, k, torch.arange(33) * 3, torch.rand(12))
    given = torch.randn(33, 7, 24)[:, ::2], torch.randn(2, 24, 33).permute(2, 0, 1)
    strided = torch.autograd.grad(out, (q, k), given, retain_graph=True)
    dense = torch.autograd.grad(out, (q, k), [x.contiguous() for x in given])
    assert equal(strided, dense)


def test_bits_do_not_depend_on_threads(isa, values_and_grads, same_bits_for_any_threads):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, positions, inv_freq = inputs(300, 80, 40, dtype)  # enough for more than one thread
        run = lambda *x: rotary(*x, positions, inv_freq)  # noqa: B023, E731
        same_bits_for_any_threads(lambda: values_and_grads(run, (q, k)))  # noqa: B023


def test_large_outputs_have_the_bits_of_small_ones(isa):
    """Outputs larger than the caches are written past them."""
    q, k = torch.randn(2, 4096, 16, 64).unbind()
    positions, inv_freq = torch.arange(4096), torch.rand(32)
    every = rotary(q, k, positions, inv_freq)
    for rows in (slice(0, 1), slice(2047, 2050), slice(4000, 4096)):
        some = rotary(q[rows], k[rows], positions[rows], inv_freq)
        assert all(torch.equal(a, b[rows]) for a, b in zip(some, every, strict=True))


def test_the_reference_backend_agrees(monkeypatch, values_and_grads):
    q, k, positions, inv_freq = inputs(31, 20, 8)
    fused = values_and_grads(lambda *x: rotary(*x, positions, inv_freq), (q, k))
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(sys.modules["pyrlhf.ops.rotary"], "core", lambda: pytest.fail("the core was called"))
    for a, b in zip(values_and_grads(lambda *x: rotary(*x, positions, inv_freq), (q, k)), fused, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_library(values_and_grads):
    q, k, positions, inv_freq = inputs(6, 8, 4)
    args = (q.clone().requires_grad_(), k.clone().requires_grad_(), positions, inv_freq, False)
    torch.library.opcheck(torch.ops.pyrlhf.rotary.default, args)

    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(a * 2, b, positions, inv_freq)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(values_and_grads(compiled, (q, k)), values_and_grads(f, (q, k)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [rotary, rotary_ref])
def test_wrong_calls_name_the_argument(function):
    q, k, positions, inv_freq = inputs(6, 8, 4)
    for error, message, change in (
        (TypeError, "q must be", {"q": None}),
        (ValueError, "q must have shape", {"q": q[0]}),
        (ValueError, "k must have shape", {"k": k[:5]}),
        (TypeError, "k must be float32", {"k": k.bfloat16()}),
        (TypeError, "positions must be int64", {"positions": positions.int()}),
        (ValueError, "positions must have shape", {"positions": positions[:5]}),
        (TypeError, "inv_freq must be float32", {"inv_freq": inv_freq.double()}),
        (ValueError, "inv_freq must hold at most", {"inv_freq": torch.ones(5)}),
    ):
        with pytest.raises(error, match=message):
            function(**{"q": q, "k": k, "positions": positions, "inv_freq": inv_freq, **change})
