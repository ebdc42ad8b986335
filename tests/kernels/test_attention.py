"""attention's Triton kernels: values, gradients, masks, prefixes, bits, neighbours, wrong offsets.

Tiles are small, so that small shapes have several of everything; a few tests, most of them on a GPU, run the table's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from checking import as_good_as, captured, equal, masks_drawn, offsets, poisoned, same_bits, values_and_grads
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import attention, attention_ref
from pyrlhf.ops._core import FAULTS, fault_flags, raise_faults

GPU = torch.cuda.is_available()
module = sys.modules["pyrlhf.ops.attention"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy tells of every NaN
ROWS, SIDE = (64, 32) if GPU else (32, 16)  # of the small tiles: the longer and the shorter side
USUAL = torch.bfloat16 if GPU else torch.float32  # where one dtype tells enough: the interpreter is slow
NARROW = torch.bfloat16 if GPU else torch.float16


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the kernels, with small tiles and few sequences looked at together."""
    from pyrlhf.kernels import attention as found

    wide, high = found.Tiles(SIDE, ROWS, SIDE, 4, 2), found.Tiles(ROWS, ROWS, SIDE, 4, 2)
    for key in found._TILES:
        monkeypatch.setitem(found._TILES, key, found.Passes(high, wide, high))
    monkeypatch.setattr(found, "_SEARCH", 4)
    monkeypatch.setattr(found, "_ROWS", 16)
    yield found
    raise_faults(device)  # what a test expects it has raised itself


def inputs(
    device: torch.device, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * 31 + heads)
    shapes = ((tokens, h, dim) for h in (heads, kv_heads, kv_heads))
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


def ranges(device: torch.device, *rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def run(given: Sequence[Tensor], lengths: Sequence[int], function: Any = attention, **keywords: Any) -> list[Tensor]:
    """The output, and the gradients of q, k and v for a fixed random cotangent."""
    cu = offsets(lengths).to(given[0].device)
    return values_and_grads(lambda *x: function(*x, cu, **keywords), given)


def in_place(given: Sequence[Tensor], lengths: Sequence[int], upstream: Tensor) -> list[Tensor]:
    """As `run`, of these very tensors, strides and all (a clone would lie together)."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = attention(*leaves, offsets(lengths).to(upstream.device))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def peer(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **mask: Any) -> Tensor:
    """Softmax of all scores in the dtype of q, as torch's own attention rounds them."""
    sees = visible(cu.cpu(), **mask).to(q.device)
    group, scale = q.shape[1] // k.shape[1], mask.get("scale") or q.shape[2] ** -0.5
    heads = [x.transpose(0, 1) for x in (q * scale, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
    scores = (heads[0] @ heads[1].transpose(1, 2)).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ heads[2]).transpose(0, 1)


def visible(
    cu: Tensor,
    causal: bool = True,
    window: int | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """bool [T, T], token by token as the contract says it."""
    total = int(cu[-1])
    sees = torch.zeros(total, total, dtype=torch.bool)
    for s in range(len(cu) - 1):
        for t in range(int(cu[s]), int(cu[s + 1])):
            first = int(cu[s]) if window is None else max(int(cu[s]), t + 1 - window)
            sees[t, first : t + 1 if causal else int(cu[s + 1])] = True
            if prefix is not None:
                sees[t, int(prefix[s, 0]) : int(prefix[s, 1])] = True
    return sees


def assert_right(given: Sequence[Tensor], lengths: Sequence[int], tiny: float = 2e-6, **keywords: Any) -> None:
    """The 2x rule for output and gradients; tiny comes on top of the last bit of what the truth is rounded to."""
    ours = run(given, lengths, **keywords)
    truth = run([x.double().cpu() for x in given], lengths, attention_ref, **on_cpu(keywords))
    peers = run([x.cpu() for x in given], lengths, peer, **on_cpu(keywords))
    for a, b, t in zip(ours, peers, truth, strict=True):
        assert a.dtype == given[0].dtype
        rounding = (t.to(a.dtype).double() - t).abs().max().item() if t.numel() else 0.0
        as_good_as([a], [b], [t], tiny=tiny + rounding)


def on_cpu(keywords: dict[str, Any]) -> dict[str, Any]:
    return {key: x.cpu() if isinstance(x, Tensor) else x for key, x in keywords.items()}


# -- values and gradients ---------------------------------------------------------------------------------------------------

LENGTHS = [[1], [ROWS - 1, 1, 0, ROWS], [SIDE, 2 * ROWS + 5]]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_as_good_as_torch(lengths, causal, dtype, device, kernels):
    assert_right(inputs(device, sum(lengths), 2, 1, 64, dtype), lengths, causal=causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_grouped_heads(heads, kv_heads, device, kernels):
    lengths = [5, ROWS + 3]
    assert_right(inputs(device, sum(lengths), heads, kv_heads, 16, USUAL), lengths)


@pytest.mark.parametrize("dim", [1, 8, 16, 33, 64, 80, 96, 128, 200, 256])
def test_head_sizes(dim, device, kernels):
    lengths = [3, ROWS + 3]
    for dtype in (USUAL, torch.float16) if GPU or dim in (33, 80) else (USUAL,):
        assert_right(inputs(device, sum(lengths), 2, 2, dim, dtype), lengths)


WINDOWS = [1, 2, SIDE, SIDE + 1, ROWS, 2 * ROWS - 1, 2 * ROWS + 7, 2 * ROWS + SIDE - 1, 10**6]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, device, kernels):
    lengths = [1, 3 * ROWS + 5]
    assert_right(inputs(device, sum(lengths), 1, 1, 16, USUAL), lengths, window=window)


def test_a_window_of_none_sees_nothing(device, kernels):
    given, lengths = inputs(device, 9, 2, 1, 16, USUAL), [4, 5]
    assert not any(x.any() for x in run(given, lengths, window=0))
    lse = module._forward_impl(*given, offsets(lengths).to(device), None, True, 0, 1.0)[1]
    assert (lse == -torch.inf).all()


PREFIXES: dict[str, tuple[list[int], list[list[int]]]] = {
    "a prompt and its answers": ([ROWS + 7, 9, ROWS, 1], [[0, 0], [0, ROWS + 7], [0, ROWS + 7], [0, ROWS + 7]]),
    "whole tiles": ([ROWS, ROWS, SIDE], [[0, 0], [0, ROWS], [0, ROWS]]),
    "parts of a prompt": ([2 * ROWS, 5, 3, ROWS], [[0, 0], [SIDE + 3, ROWS + 1], [7, 8], [ROWS, 2 * ROWS]]),
    "across sequences": ([9, ROWS, 20, 7], [[9, 9], [0, 5], [3, ROWS + 2], [4, ROWS + 25]]),
    "rows that come later": ([9, ROWS + 5], [[12, ROWS + 14], [0, 0]]),
    "each the other's": ([SIDE + 1, ROWS + 1], [[SIDE + 1, SIDE + ROWS + 2], [0, SIDE + 1]]),
    "readers far apart, none between": ([20, 3, 3, 0, 3, 3, 3], [[0, 0], [0, 20], [0, 0], [0, 20], [1, 1], [23, 26], [5, 9]]),
}  # fmt: skip


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", PREFIXES.values(), ids=PREFIXES.keys())
def test_prefixes(case, causal, device, kernels):
    lengths, rows = case
    given = inputs(device, sum(lengths), 1, 1, 16, USUAL)
    assert_right(given, lengths, causal=causal, prefix=ranges(device, *rows))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scales(scale, device, kernels):
    lengths = [5, ROWS + 3]
    given = inputs(device, sum(lengths), 1, 1, 16, USUAL)
    ours = run(given, lengths, scale=scale)
    truth = run([x.double().cpu() for x in given], lengths, attention_ref, scale=scale)
    plain = run([x.cpu() for x in given], lengths, attention_ref, scale=scale)
    # torch keeps its probabilities; ours are made again from lse, whose last bit at scores of 20 is 2e-6
    as_good_as(ours, plain, truth, tiny=5e-3 if GPU else 5e-6)


def test_large_scores_stay_finite(device, kernels):
    q, k, v = inputs(device, ROWS + 9, 1, 1, 16, USUAL)
    results = run((q * 100, k * 100, v), [ROWS + 9])
    assert all(x.isfinite().all() for x in results)


@st.composite
def problems(draw):
    """Ragged lengths and what their tokens see: lengths, keywords of attention."""
    length = st.one_of(st.integers(0, 5), st.integers(0, 2 * ROWS + 1))
    lengths = draw(st.lists(length, min_size=1, max_size=4))
    return lengths, masks_drawn(draw, lengths, 2 * ROWS)


@settings(max_examples=40 if GPU else 8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), kv_heads=st.integers(1, 2), group=st.integers(1, 2), dim=st.sampled_from([1, 16, 24]))
def test_any_ragged_batch(problem, kv_heads, group, dim, device, kernels):
    lengths, keywords = problem
    assume(sum(lengths) > 0)  # without tokens the reference has no gradients
    given = inputs(device, sum(lengths), kv_heads * group, kv_heads, dim)
    ours = run(given, lengths, **{key: x.to(device) if isinstance(x, Tensor) else x for key, x in keywords.items()})
    truth = run([x.double().cpu() for x in given], lengths, attention_ref, **keywords)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=5e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_tokens(lengths, device, kernels):
    results = run(inputs(device, 0, 4, 2, 8), lengths)
    assert [tuple(x.shape) for x in results] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]


# -- what must not matter ---------------------------------------------------------------------------------------------------


def test_views_of_one_qkv_matrix_are_read_in_place(dtype, device, kernels, monkeypatch):
    lengths, heads, kv_heads, dim = [ROWS + 6, 0, 13], 2, 1, 24
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, generator=generator).to(device, dtype)
    seen: list[int] = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: seen.extend(x.data_ptr() for x in a[:3]) or forward(*a))

    def split(whole: Tensor, contiguous: bool) -> Tensor:
        parts = whole.split([heads, kv_heads, kv_heads], dim=1)
        return attention(*(x.contiguous() if contiguous else x for x in parts), offsets(lengths).to(device))

    there = values_and_grads(lambda x: split(x, False), [qkv])
    q, k, v = seen
    assert [k - q, v - k] == [heads * dim * qkv.element_size(), kv_heads * dim * qkv.element_size()]
    assert equal(there, values_and_grads(lambda x: split(x, True), [qkv]))


@pytest.mark.parametrize("mask", [{}, {"window": SIDE}, {"prefix": [[0, 0], [3, 7]]}], ids=str)
def test_tma_changes_no_bits(mask, device, kernels, monkeypatch):
    """The interior by descriptors, and by pointers as where D or strides do not suit TMA, or the GPU has none."""
    lengths, heads, kv_heads, dim = [7, 2 * ROWS + 5], 2, 2, 16
    keywords = {key: ranges(device, *x) if key == "prefix" else x for key, x in mask.items()}
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, generator=generator).to(device, torch.float16)
    taken, results, tiles = [], [], kernels._tiles
    monkeypatch.setattr(kernels, "_tiles", lambda *a: taken.append(tiles(*a)) or taken[-1])
    for tma in (True, False):
        monkeypatch.setattr(kernels, "_large", lambda t, tma=tma: tma)
        results.append(run(qkv.split([heads, kv_heads, kv_heads], dim=1), lengths, **keywords))
        assert {x is not None for pair in taken for x in pair} == {tma}
        taken.clear()
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    "change", ["head size", "heads apart", "rows apart", "one row again and again", "address", "dtype"]
)
def test_what_does_not_suit_tma_comes_by_pointers(change, device, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_large", lambda t: True)
    whole = torch.zeros(40, 3, 64, dtype=torch.float16, device=device)
    suits = whole[:, 1:]
    assert None not in kernels._tiles(16, suits, whole)
    other = {
        "head size": whole[..., :48].contiguous(),
        "heads apart": whole[..., :32],
        "one row again and again": whole[:1].expand(40, 3, 64),
        "rows apart": torch.zeros(40, 2 * 64 + 4, dtype=torch.float16, device=device)[:, :128].view(40, 2, 64),
        "address": torch.zeros(40 * 128 + 1, dtype=torch.float16, device=device)[1:].view(40, 2, 64),
        "dtype": whole.float(),
    }[change]
    assert kernels._tiles(16, suits, other) == [None, None]


def test_any_strides(device, kernels):
    lengths = [7, ROWS + 2]
    q, k, v = inputs(device, sum(lengths), 4, 2, 8)
    expected = run((q, k, v), lengths)

    def elsewhere(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
        channels_first = k.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        out = attention(heads_first, channels_first, v.repeat_interleave(2, 0)[::2], torch.stack((cu, cu), 1)[:, 0])
        return out.transpose(0, 1).contiguous().transpose(0, 1)  # and so is its gradient

    assert equal(run((q, k, v), lengths, elsewhere), expected)


def test_what_lies_beyond_the_channels_may_be_nan(device, kernels):
    lengths, dtype = [7, 2 * ROWS + 3], NARROW
    given = inputs(device, sum(lengths), 2, 1, 24, dtype)
    views = [torch.full((*x.shape[:2], 40), torch.nan, dtype=dtype, device=device)[..., :24].copy_(x) for x in given]

    assert views[1].stride(1) == 40
    assert all(map(same_bits, in_place(views, lengths, views[0]), in_place(given, lengths, views[0])))


def test_rows_that_lie_far_apart(device, kernels, monkeypatch):
    """As far as a tile's int32 offsets reach they are read in place, beyond that copied."""
    lengths, apart = [SIDE + 2], 100
    given = inputs(device, SIDE + 2, 1, 1, 16)
    far = [torch.zeros(len(x), apart, device=device)[:, None, :16].copy_(x) for x in given]
    cu, rest = offsets(lengths).to(device), (None, True, None, 1.0, fault_flags(device), 0)
    expected = kernels.forward(*given, cu, *rest)
    for farthest in (apart, apart - 1):
        monkeypatch.setattr(kernels, "_FARTHEST", farthest)
        assert [x is y for x, y in zip(kernels._near(*far), far, strict=True)] == [farthest == apart] * 3
        assert equal(kernels.forward(*far, cu, *rest), expected)


MASKS: dict[str, dict[str, Any]] = {"causal": {}, "bidirectional": {"causal": False}, "window": {"window": SIDE + 3}}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_bits_do_not_depend_on_neighbours_who_may_be_nan(mask, device, kernels):
    length, dtype = ROWS + 9, NARROW
    own = inputs(device, length, 2, 1, 16, dtype)
    base = run(own, [length], **mask)
    cotangent = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    for before, after in ([1], []), ([ROWS - 3, 0, 2, 5, 1], [3, ROWS]):
        start, lengths = sum(before), [*before, length, *after]
        packed = [torch.full((sum(lengths), *x.shape[1:]), torch.nan, dtype=dtype, device=device) for x in own]
        for p, x in zip(packed, own, strict=True):
            p[start : start + length] = x
        leaves = [p.requires_grad_() for p in packed]
        out = attention(*leaves, offsets(lengths).to(device), **mask)
        upstream = torch.full_like(out, torch.nan)
        upstream[start : start + length] = cotangent
        found = [out, *torch.autograd.grad(out, leaves, upstream)]
        assert all(same_bits(x[start : start + length].cpu(), b) for x, b in zip(found, base, strict=True))


def test_bits_of_a_prefix_group_do_not_depend_on_neighbours_who_may_be_nan(device, kernels):
    """A prompt, three answers to it or to a part of it, and a sequence that sees across two of them."""
    lengths, dtype = [ROWS + 6, 20, ROWS, 3, 9], NARROW
    rows = ranges(device, [0, 0], [0, ROWS + 6], [0, ROWS + 6], [10, ROWS + 2], [ROWS + 16, ROWS + 27])
    own = inputs(device, sum(lengths), 2, 1, 16, dtype)
    base = run(own, lengths, prefix=rows)
    cotangent = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    before, after = [3, 0, SIDE + 1], [ROWS, 2]
    start, end = sum(before), sum(before) + sum(lengths)
    packed = [torch.full((end + sum(after), *x.shape[1:]), torch.nan, dtype=dtype, device=device) for x in own]
    for p, x in zip(packed, own, strict=True):
        p[start:end] = x
    moved = torch.zeros(len(before) + len(lengths) + len(after), 2, dtype=torch.int32, device=device)
    moved[len(before) : len(before) + len(lengths)] = rows + start
    moved[0] = ranges(device, [end, end + after[0]])[0]  # neighbours that form a group of their own, around ours
    leaves = [p.requires_grad_() for p in packed]
    out = attention(*leaves, offsets([*before, *lengths, *after]).to(device), prefix=moved)
    upstream = torch.full_like(out, torch.nan)
    upstream[start:end] = cotangent
    found = [out, *torch.autograd.grad(out, leaves, upstream)]
    assert all(same_bits(x[start:end].cpu(), b) for x, b in zip(found, base, strict=True))


def test_keys_outside_a_prefix_keep_their_bits(device, kernels):
    """A reader of some rows of a tile changes the gradients of those rows alone."""
    lengths, first, last = [2 * ROWS, 9], SIDE + 3, ROWS + 5
    given = inputs(device, sum(lengths), 1, 1, 16, NARROW)
    alone = run(given, lengths)
    read = run(given, lengths, prefix=ranges(device, [0, 0], [first, last]))
    others = torch.ones(2 * ROWS, dtype=torch.bool)
    others[first:last] = False
    for a, b in zip(read[2:], alone[2:], strict=True):
        assert same_bits(a[: 2 * ROWS][others], b[: 2 * ROWS][others])
        assert (a[first:last] != b[first:last]).any(dim=-1).all()


@pytest.mark.parametrize("prefix", [False, True], ids=["causal", "prefix"])
def test_same_bits_on_repeat(prefix, device, kernels):
    lengths = [ROWS + 7, 9, 5]
    given = inputs(device, sum(lengths), 2, 1, 16, NARROW)
    rows = ranges(device, [0, 0], [0, ROWS + 7], [3, ROWS]) if prefix else None
    runs = [run(given, lengths, prefix=rows) for _ in range(1000 if GPU else 2)]
    assert all(all(map(same_bits, found, runs[0])) for found in runs[1:])


@pytest.mark.parametrize("lengths", [[1], [ROWS + 1, 0, 3], []], ids=str)
def test_nothing_is_read_before_it_is_written(lengths, device, kernels):
    """Outputs and scratch memory that hold NaN at first change nothing."""
    given = inputs(device, sum(lengths), 2, 1, 24)
    rows = ranges(device, *[[0, 0]] * len(lengths)) if lengths else None
    expected = run(given, lengths, prefix=rows)
    with poisoned(device):
        assert all(map(same_bits, run(given, lengths, prefix=rows), expected))
    assert not any(x.isnan().any() for x in expected)


# -- wrong offsets ----------------------------------------------------------------------------------------------------------

WRONG_OFFSETS = [[1, 9, 40], [0, 9, 39], [0, 9, 41], [0, 41, 40], [0, -1, 40], [0, 9, 3, 30, 20, 5, 40], [0], [40, 0]]


@pytest.mark.parametrize("cu", WRONG_OFFSETS, ids=str)
def test_wrong_offsets_give_nan_and_a_fault_and_touch_nothing(cu, device, kernels):
    guarded = [torch.full((44, h, 16), 7.0, device=device) for h in (2, 1, 1)]
    leaves = [x[2:42].requires_grad_() for x in guarded]
    prefix = ranges(device, *[[2**30, -(2**30)]] * (len(cu) - 1)) if len(cu) > 1 else None
    out = attention(*leaves, torch.tensor(cu, dtype=torch.int32, device=device), prefix=prefix)
    results = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert all(x.isnan().all() for x in results)
    with pytest.raises(ValueError) as raised:
        raise_faults(device)
    assert str(raised.value).endswith(FAULTS[module._FAULT])  # and not the prefix too
    assert not fault_flags(device).any()


@pytest.mark.parametrize("wrong", [[-1, 3], [3, 1], [31, 46], [0, 21], [25, 30], [2**31 - 1, -(2**31)]], ids=str)
def test_a_wrong_prefix_counts_as_empty_and_raises_a_fault(wrong, device, kernels):
    lengths = [20, 11, 14]
    given = inputs(device, sum(lengths), 2, 1, 16)
    expected = run(given, lengths, prefix=ranges(device, [0, 0], [0, 0], [0, 31]))
    raise_faults(device)
    assert all(map(same_bits, run(given, lengths, prefix=ranges(device, [0, 0], wrong, [0, 31])), expected))
    with pytest.raises(ValueError, match=r"attention: prefix must be ranges within the tokens, outside its own"):
        raise_faults(device)
    assert not fault_flags(device).any()


def test_check_names_what_is_wrong_at_once(device, kernels, monkeypatch):
    q, k, v = inputs(device, 9, 2, 1, 8)
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    cu = offsets([4, 5]).to(device)
    attention(q, k, v, cu, prefix=ranges(device, [0, 0], [0, 4]))
    with pytest.raises(ValueError, match=r"^attention: prefix\[1\] must not overlap its own sequence"):
        attention(q, k, v, cu, prefix=ranges(device, [0, 0], [0, 5]))
    with pytest.raises(ValueError, match=r"^attention: cu_seqlens must end at the number of packed rows, 9, found 8"):
        attention(q, k, v, offsets([4, 4]).to(device))
    monkeypatch.delenv("PYRLHF_CHECK")
    with pytest.raises(ValueError, match=r"^attention: cu_seqlens must hold S \+ 1 offsets"):
        attention(q, k, v, cu[:0])


# -- as a part of torch -----------------------------------------------------------------------------------------------------


def test_torch_library(device, kernels):
    q, k, v = (x.requires_grad_() for x in inputs(device, 9, 4, 2, 8))
    cu, prefix = offsets([4, 5]).to(device), ranges(device, [0, 0], [0, 4])
    for args in ((None, True, 2), (prefix, False, None)):
        torch.library.opcheck(torch.ops.pyrlhf.attention.default, (q, k, v, cu, *args, 0.4))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, cu, prefix=prefix) + 1

    given = inputs(device, 9, 4, 2, 8)
    compiled = torch.compile(f, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for a, b in zip(values_and_grads(compiled, given), values_and_grads(f, given), strict=True):
        torch.testing.assert_close(a, b)


def test_reference_backend_and_kernels_agree(dtype, device, kernels, monkeypatch):
    lengths = [ROWS + 4, 9]
    given, rows = inputs(device, sum(lengths), 4, 2, 24, dtype), ranges(device, [0, 0], [5, ROWS])
    ours = run(given, lengths, prefix=rows)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(kernels, "forward", None)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(ours, run(given, lengths, prefix=rows), strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("dim", [64, 128, 256] if GPU else [64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_tables_tiles(mask, dim, dtype, device):
    lengths = [1000, 129, 0, 1] if GPU else [130, 1]
    assert_right(inputs(device, sum(lengths), 4 if GPU else 1, 1, dim, dtype), lengths, **mask)


def test_the_tables_tiles_over_a_prefix(dtype, device):
    lengths = [300, 17, 130]
    rows = ranges(device, [0, 0], [0, 300], [3, 290])
    assert_right(inputs(device, sum(lengths), 1, 1, 64, dtype), lengths, prefix=rows)


def test_a_table_entry_for_every_head_size(device):
    from pyrlhf.kernels import attention as kernels

    for dim in (1, 16, 17, 64, 80, 96, 128, 129, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q = torch.empty(0, 1, dim, dtype=dtype, device=device)
            assert kernels.width_of(q) >= dim
            assert all(min(tiles.queries, tiles.keys, tiles.edge) >= 16 for tiles in kernels.passes_of(q))
            assert all(max(tiles.queries, tiles.keys) * kernels._FARTHEST < 2**31 for tiles in kernels.passes_of(q))
            assert all(tiles.keys % tiles.edge == 0 for tiles in kernels.passes_of(q)[:2])
            assert kernels.passes_of(q).by_key.queries % kernels.passes_of(q).by_key.edge == 0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_batch_of_1000_sequences(device, dtype):
    lengths = torch.randint(0, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    given = inputs(device, sum(lengths), 4, 2, 64, dtype)
    ours = run(given, lengths)
    reference = run(given, lengths, attention_ref)
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_rows_beyond_2_to_the_31(device):
    """Strides that take a row's offset past an int32."""
    tokens, wide = 70_000, 32_768
    whole = torch.zeros(tokens, wide, dtype=torch.bfloat16, device=device)
    parts = whole[:, : 3 * 64].view(tokens, 3, 64)
    parts.copy_(torch.randn(tokens, 3, 64, device=device))
    lengths = [tokens - 500, 500]
    views = [parts[:, i : i + 1] for i in range(3)]
    upstream = torch.randn(tokens, 1, 64, device=device).bfloat16()
    assert views[0].stride(0) * tokens > 2**31
    assert equal(in_place(views, lengths, upstream), in_place([x.contiguous() for x in views], lengths, upstream))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_graph_capture(device):
    q, k, v = (x.requires_grad_() for x in inputs(device, 700, 4, 2, 64, torch.bfloat16))
    cu, prefix = offsets([500, 100, 100]).to(device), ranges(device, [0, 0], [0, 500], [0, 500])

    def step() -> list[Tensor]:
        out = attention(q, k, v, cu, prefix=prefix)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    graph, results = captured(step)
    for lengths in ([500, 100, 100], [500, 3, 197]):  # other offsets in the same memory
        cu.copy_(offsets(lengths))
        for x in results:
            x.detach().fill_(torch.nan)
        graph.replay()
        assert equal([x.clone() for x in results], step())
