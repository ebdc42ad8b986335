"""Attention over packed ragged sequences, forward and backward, without a matrix of scores (FlashAttention-2, arXiv:2307.08691).

A sequence's keys are its prefix, then its own rows: one line of keys, on which query i of the sequence stands at
prefix length + i. Forward and the queries' gradient: a program takes a tile of one sequence's queries of one head along that
line. The keys' and values' gradient: a program takes a tile of one sequence's keys of one key head along all queries that see
some of them, head by head: those of its own sequence, then those of each sequence that has them in its prefix. Scores are
made again there, from the log-sum-exp that forward left.

Tiles that every query sees whole (the interior) cost no masks; those on an edge of what is visible do; the others are left
out. Which sequence a program belongs to it finds on the device: sequence s has its blocks at cu_seqlens[s] // rows + s and
after, which leaves room for each, so that a launch needs no values and can be captured in a CUDA graph.

Invariants:
- Tiles lie where their sequence starts, or its line of keys, and are as large as the dtype, D and the device say: a
  sequence's bits do not depend on its neighbours. No atomics: every sum has one owner and one order, in float32.
- Rows of other sequences, beyond the ends and outside a prefix are never read: they may hold NaN. Within one sequence a NaN
  or an infinity in a row of v, q or the upstream gradient can spoil what shares a tile with it, as in any product with zeros.
- Offsets are checked on the device first. Wrong cu_seqlens: a fault, and every result is NaN. A prefix that is no range of
  rows outside its sequence: a fault, and it counts as empty.
- Operands of the interior come by TMA or by pointers, with the same bits.
- Beside outputs and gradients: 8 bytes a query and head in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are powers of two: e^x = 2^(x log2 e)
_LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """A tile of scores, queries x keys; and how it is run.

    edge: the keys (by_key: queries) of a tile with masks, which take registers too.
    """

    queries: int
    keys: int
    edge: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Of a launch."""
        shape = {"QUERIES": self.queries, "KEYS": self.keys, "EDGE": self.edge}
        return {**shape, "num_warps": self.warps, "num_stages": self.stages}


class Passes(NamedTuple):
    """The tiles of the three kernels that make scores."""

    forward: Tiles
    by_query: Tiles
    by_key: Tiles


# By dtype's bytes and the width of a row of q (D up to the next power of two). Two warpgroups hold the sums of 128 queries, or
# of 128 keys, and their scores in registers, which decide how long the other side is: in 16 bits nothing is spilled up to
# D 128. The rest is what shared memory holds: stages of loads under way. float32's products are plain FMAs (no TF32) of
# operands in registers, and wider tiles or more stages of them would spill by the kilobyte.
_TILES = {
    ("large", 2, 64): Passes(Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 32, 8, 3)),
    ("large", 2, 128): Passes(Tiles(128, 128, 64, 8, 2), Tiles(128, 128, 64, 8, 2), Tiles(32, 128, 16, 8, 3)),
    ("large", 2, 256): Passes(Tiles(128, 32, 32, 8, 2), Tiles(128, 32, 32, 8, 2), Tiles(32, 64, 16, 8, 2)),
    ("small", 2, 64): Passes(Tiles(128, 64, 32, 4, 3), Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 4, 2)),
    ("small", 2, 128): Passes(Tiles(128, 64, 32, 8, 2), Tiles(64, 64, 32, 8, 2), Tiles(64, 64, 32, 8, 2)),
    ("small", 2, 256): Passes(Tiles(64, 32, 32, 8, 1), Tiles(64, 32, 32, 8, 1), Tiles(32, 32, 32, 8, 1)),
    ("large", 4, 64): Passes(Tiles(64, 32, 32, 8, 1), Tiles(64, 32, 32, 8, 1), Tiles(32, 64, 32, 8, 1)),
    ("large", 4, 128): Passes(Tiles(32, 32, 32, 8, 1), Tiles(32, 32, 16, 8, 1), Tiles(16, 32, 16, 8, 1)),
    ("large", 4, 256): Passes(Tiles(32, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
    ("small", 4, 64): Passes(Tiles(64, 32, 32, 8, 1), Tiles(64, 32, 32, 8, 1), Tiles(32, 64, 32, 8, 1)),
    ("small", 4, 128): Passes(Tiles(64, 32, 32, 8, 1), Tiles(32, 32, 32, 8, 1), Tiles(32, 32, 32, 8, 1)),
    ("small", 4, 256): Passes(Tiles(32, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
}
_SEARCH = 256  # sequences looked at together
_ROWS = 64  # queries of one program that prepares the backward
_FARTHEST = (2**31 - 1) // 256  # elements from row to row: no tile has as many rows


def width_of(q: Tensor) -> int:
    """The columns of a row of q in a tile: tl.dot wants a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(q.shape[2]))


def passes_of(q: Tensor) -> Passes:
    """large: 227 KiB of shared memory a program; small: every other GPU has 99 KiB at least."""
    return _TILES["large" if _large(q) else "small", q.element_size(), max(64, width_of(q))]


def _large(t: Tensor) -> bool:
    """sm_90, sm_100, sm_103."""
    return t.is_cuda and torch.cuda.get_device_capability(t.device)[0] in (9, 10)


# -- where things are -------------------------------------------------------------------------------------------------------


@triton.jit
def _place(block, cu_seqlens, sequences, ROWS: tl.constexpr, SEARCH: tl.constexpr):
    """Of a block of rows: its sequence, where that starts, its length, the block's first row in it (or the length or more)."""
    s = -1
    for begin in range(0, sequences, SEARCH):
        at = begin + tl.arange(0, SEARCH)
        first = tl.load(cu_seqlens + at, at < sequences, 0) // ROWS + at
        s += tl.sum(((at < sequences) & (first <= block)).to(tl.int32), 0)
    start = tl.load(cu_seqlens + s)
    return s, start, tl.load(cu_seqlens + s + 1) - start, (block - start // ROWS - s) * ROWS


@triton.jit
def _prefix_of(s, start, end, prefix, tokens, inside):
    """[first, last) of the prefix of sequence s, which has rows [start, end); [0, 0) for one that makes no sense."""
    first, last = tl.load(prefix + 2 * s, inside, 0), tl.load(prefix + 2 * s + 1, inside, 0)
    right = (first >= 0) & (first <= last) & (last <= tokens) & (tl.maximum(first, start) >= tl.minimum(last, end))
    return tl.where(right, first, 0), tl.where(right, last, 0)


@triton.jit
def _parts(low, whole_low, whole_high, high, TILE: tl.constexpr, EDGE: tl.constexpr):
    """Tiles over [low, high), of which [whole_low, whole_high) needs no masks.

    Those without masks are TILE wide: [b, c). Those with are EDGE wide: before and behind them, found by `_edge`, and counted last.
    """
    b = tl.cdiv(whole_low, TILE)
    c = tl.maximum(whole_high // TILE, b)
    first = low // EDGE
    before = tl.where(b < c, b * (TILE // EDGE) - first, 0)
    after = tl.where(b < c, c * (TILE // EDGE), first)
    return b, c, first, before, after, tl.maximum(before + tl.cdiv(high, EDGE) - after, 0)


@triton.jit
def _edge(i, first, before, after):
    """The i-th tile on an edge: the first ones, so many as are before the interior, then those that come after it."""
    return tl.where(i < before, first + i, after + i - before)


@triton.jit
def _key_parts(
    first, length, ahead, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """`_parts` of the line of keys that the queries first.. see, without masks where all of them do."""
    low, whole_low, whole_high, high = 0, 0, length, length
    if CAUSAL:
        whole_high, high = first + 1, tl.minimum(first + QUERIES, length)
    if WINDOW:
        low, whole_low = tl.maximum(first + 1 - window, 0), tl.maximum(first + QUERIES - window, 0)
    return _parts(low, whole_low, ahead + whole_high, ahead + high, KEYS, EDGE)


@triton.jit
def _query_parts(
    first, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """`_parts` of the queries of a sequence that see its keys first.., without masks where they see all of these."""
    last = tl.minimum(first + KEYS, length) - 1
    low, whole_low, whole_high, high = 0, 0, length, length
    if CAUSAL:
        low, whole_low = first, last
    if WINDOW:
        whole_high, high = tl.minimum(length, first + window), tl.minimum(length, last + window)
    return _parts(low, whole_low, whole_high, high, QUERIES, EDGE)


@triton.jit
def _load(at, first, rows, stride, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[rows, WIDTH] of a matrix of DIM columns from row first on, 0 beyond them; MASKED: 0 in the rows that are not inside."""
    cols = tl.arange(0, WIDTH)
    at += tl.cast(first, tl.int64) * stride
    at += rows[:, None] * stride + cols[None, :]
    if MASKED:
        x = tl.load(at, inside[:, None] & (cols < DIM)[None, :], 0.0)
    elif DIM < WIDTH:
        x = tl.load(at, (cols < DIM)[None, :], 0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(at, first, stride, inside, x, DIM: tl.constexpr, WIDTH: tl.constexpr):
    rows, cols = tl.arange(0, x.shape[0]), tl.arange(0, WIDTH)
    at += tl.cast(first, tl.int64) * stride
    at += rows[:, None] * stride + cols[None, :]
    tl.store(at, x.to(at.dtype.element_ty), inside[:, None] & (cols < DIM)[None, :])


@triton.jit
def _keys(tile, start, prefix_start, ahead, PREFIX: tl.constexpr, KEYS: tl.constexpr):
    """A tile on the line of keys: the places, and the packed rows that they are, as a first one and what is added to it."""
    rows = tl.arange(0, KEYS)
    places = tile * KEYS + rows
    if PREFIX:
        first = 0
        rows = (places + tl.where(places < ahead, prefix_start, start - ahead)).to(tl.int64)
    else:
        first = start + tile * KEYS
    return places, first, rows


@triton.jit
def _visible(places, queries, ahead, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[queries, places]: who sees what of the line of keys."""
    if CAUSAL:
        sees = places[None, :] <= ahead + queries[:, None]
        if WINDOW:
            sees &= places[None, :] > queries[:, None] - window
    else:
        sees = tl.broadcast_to((places < ahead + length)[None, :], [queries.shape[0], places.shape[0]])
    return sees


# -- kernels ----------------------------------------------------------------------------------------------------------------


@triton.jit
def check_kernel(cu_seqlens, prefix, valid, faults, sequences, tokens, FAULT: tl.constexpr, SEARCH: tl.constexpr):
    """valid [1]: whether cu_seqlens is right. Raises FAULT where it is not, FAULT + 1 where a prefix is not."""
    falls = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + sequences) != tokens)
    wrong = tl.zeros_like(falls)
    for begin in range(0, sequences, SEARCH):
        s = begin + tl.arange(0, SEARCH)
        inside = s < sequences
        start, end = tl.load(cu_seqlens + s, inside, 0), tl.load(cu_seqlens + s + 1, inside, 0)
        falls |= tl.max((start > end).to(tl.int32), 0) > 0
        if prefix is not None:
            first, last = tl.load(prefix + 2 * s, inside, 0), tl.load(prefix + 2 * s + 1, inside, 0)
            kept_first, kept_last = _prefix_of(s, start, end, prefix, tokens, inside)
            wrong |= tl.max(((first != kept_first) | (last != kept_last)).to(tl.int32), 0) > 0
    tl.store(valid, (falls == 0).to(tl.int32))
    tl.store(faults + FAULT, 1, falls)
    if prefix is not None:
        tl.store(faults + FAULT + 1, 1, wrong & (falls == 0))


@triton.jit
def _attend(
    sums, total, highest, q, k, v, k_tiles, v_tiles, column, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax: the sums so far move to the new maximum, and one tile of keys joins them."""
    inside = places < ahead + length
    if k_tiles is not None:
        x, y = k_tiles.load([at, column]), v_tiles.load([at, column])
    else:
        x = _load(k, at, rows, k_row, inside, DIM, WIDTH, MASKED)
        y = _load(v, at, rows, v_row, inside, DIM, WIDTH, MASKED)
    scores = tl.dot(q, x.T, input_precision="ieee")
    if MASKED:
        sees = _visible(places, queries, ahead, length, window, CAUSAL, WINDOW)
        scores = tl.where(sees, scores * power, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
    else:
        now = tl.maximum(highest, tl.max(scores, 1) * power)
        p = tl.exp2(scores * power - now[:, None])
        shrink = tl.exp2(highest - now)
    total = total * shrink + tl.sum(p, 1)
    sums = tl.dot(p.to(y.dtype), y, sums * shrink[:, None], input_precision="ieee")
    return sums, total, now


@triton.jit
def forward_kernel(
    q, k, v, k_tiles, v_tiles, cu_seqlens, prefix, valid, out, lse, tokens, sequences, blocks, group, window, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] and lse [H, T]. Programs: the heads of a key head, its blocks (late ones, which see the most, first), key heads."""
    pid = tl.program_id(0)
    block, kv_head = blocks - 1 - pid // group % blocks, pid // group // blocks
    head = kv_head * group + pid % group
    out_row = tl.num_programs(0) // blocks * DIM
    out += head * DIM
    lse += tl.cast(head, tl.int64) * tokens
    if tl.load(valid) == 0:
        absent = block * QUERIES + tl.arange(0, QUERIES)
        nothing = tl.full([QUERIES, WIDTH], float("nan"), tl.float32)
        _store(out, block * QUERIES, out_row, absent < tokens, nothing, DIM, WIDTH)
        tl.store(lse + absent, float("nan"), absent < tokens)
        return
    s, start, length, first = _place(block, cu_seqlens, sequences, QUERIES, SEARCH)
    if first >= length:
        return
    PREFIX: tl.constexpr = prefix is not None
    prefix_start, ahead = 0, 0
    if PREFIX:
        prefix_start, prefix_end = _prefix_of(s, start, start + length, prefix, tokens, True)
        ahead = prefix_end - prefix_start
    k += tl.cast(kv_head, tl.int64) * k_head
    v += tl.cast(kv_head, tl.int64) * v_head
    own = tl.arange(0, QUERIES)
    queries = first + own
    inside = queries < length
    x = _load(q + tl.cast(head, tl.int64) * q_head, start + first, own, q_row, inside, DIM, WIDTH, True)
    x = tl.where(scale < 0, -x, x)  # so that the largest product is the largest score
    power = tl.abs(scale) * _LOG2E
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    b, c, edge, before, after, edges = _key_parts(first, length, ahead, window, CAUSAL, WINDOW, QUERIES, KEYS, EDGE)
    for tile in range(b, c):
        places, at, rows = _keys(tile, start, prefix_start, ahead, PREFIX, KEYS)
        sums, total, highest = _attend(
            sums, total, highest, x, k, v, k_tiles, v_tiles, kv_head * DIM, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
            CAUSAL, WINDOW, DIM, WIDTH, False,
        )  # fmt: skip
    for i in range(edges):
        places, at, rows = _keys(_edge(i, edge, before, after), start, prefix_start, ahead, PREFIX, EDGE)
        sums, total, highest = _attend(
            sums, total, highest, x, k, v, None, None, 0, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
            CAUSAL, WINDOW, DIM, WIDTH, True,
        )  # fmt: skip
    sums /= tl.where(total == 0.0, 1.0, total)[:, None]
    _store(out, start + first, out_row, inside, sums, DIM, WIDTH)
    tl.store(lse + start + queries, (highest + tl.log2(total)) * _LN2, inside)


@triton.jit
def rows_kernel(
    out, grad_out, lse, rows_of, tokens, blocks, g_row, g_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rows_of [2, H, T]: lse in powers of two, +inf for a row that saw nothing (its p is then 0), and sum(out * grad_out)."""
    block, head = tl.program_id(0) % blocks, tl.cast(tl.program_id(0) // blocks, tl.int64)
    heads = tl.num_programs(0) // blocks
    own = tl.arange(0, ROWS)
    rows = block * ROWS + own
    inside = rows < tokens
    x = _load(out + head * DIM, block * ROWS, own, heads * DIM, inside, DIM, WIDTH, True).to(tl.float32)
    y = _load(grad_out + head * g_head, block * ROWS, own, g_row, inside, DIM, WIDTH, True).to(tl.float32)
    at = head * tokens + rows
    normal = tl.load(lse + at, inside, 0.0)
    tl.store(rows_of + at, tl.where(normal == float("-inf"), float("inf"), normal * _LOG2E), inside)
    tl.store(rows_of + tl.cast(heads, tl.int64) * tokens + at, tl.sum(x * y, 1), inside)


@triton.jit
def _add_keys(
    grad, q, g, normal, delta, k, v, k_tiles, v_tiles, column, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, over scale, from one tile of keys."""
    inside = places < ahead + length
    if k_tiles is not None:
        x, y = k_tiles.load([at, column]), v_tiles.load([at, column])
    else:
        x = _load(k, at, rows, k_row, inside, DIM, WIDTH, MASKED)
        y = _load(v, at, rows, v_row, inside, DIM, WIDTH, MASKED)
    p = tl.exp2(tl.dot(q, x.T, input_precision="ieee") * power - normal[:, None])
    by_score = p * (tl.dot(g, y.T, input_precision="ieee") - delta[:, None])
    if MASKED:
        by_score = tl.where(_visible(places, queries, ahead, length, window, CAUSAL, WINDOW), by_score, 0.0)
    return tl.dot(by_score.to(x.dtype), x, grad, input_precision="ieee")


@triton.jit
def grad_queries_kernel(
    q, k, v, grad_out, k_tiles, v_tiles, cu_seqlens, prefix, valid, rows_of, grad_q, tokens, sequences, blocks, group, window, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """grad_q [T, H, D], by the programs of forward."""
    pid = tl.program_id(0)
    block, kv_head = blocks - 1 - pid // group % blocks, pid // group // blocks
    head = tl.cast(kv_head * group + pid % group, tl.int64)
    heads = tl.num_programs(0) // blocks
    grad_q += head * DIM
    if tl.load(valid) == 0:
        absent = block * QUERIES + tl.arange(0, QUERIES)
        nothing = tl.full([QUERIES, WIDTH], float("nan"), tl.float32)
        _store(grad_q, block * QUERIES, heads * DIM, absent < tokens, nothing, DIM, WIDTH)
        return
    s, start, length, first = _place(block, cu_seqlens, sequences, QUERIES, SEARCH)
    if first >= length:
        return
    PREFIX: tl.constexpr = prefix is not None
    prefix_start, ahead = 0, 0
    if PREFIX:
        prefix_start, prefix_end = _prefix_of(s, start, start + length, prefix, tokens, True)
        ahead = prefix_end - prefix_start
    k += tl.cast(kv_head, tl.int64) * k_head
    v += tl.cast(kv_head, tl.int64) * v_head
    own = tl.arange(0, QUERIES)
    queries = first + own
    inside = queries < length
    x = _load(q + head * q_head, start + first, own, q_row, inside, DIM, WIDTH, True)
    g = _load(grad_out + head * g_head, start + first, own, g_row, inside, DIM, WIDTH, True)
    rows_of += head * tokens + start
    normal = tl.load(rows_of + queries, inside, float("inf"))
    delta = tl.load(rows_of + tl.cast(heads, tl.int64) * tokens + queries, inside, 0.0)
    power = scale * _LOG2E
    grad = tl.zeros([QUERIES, WIDTH], tl.float32)
    b, c, edge, before, after, edges = _key_parts(first, length, ahead, window, CAUSAL, WINDOW, QUERIES, KEYS, EDGE)
    for tile in range(b, c):
        places, at, rows = _keys(tile, start, prefix_start, ahead, PREFIX, KEYS)
        grad = _add_keys(
            grad, x, g, normal, delta, k, v, k_tiles, v_tiles, kv_head * DIM, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
            CAUSAL, WINDOW, DIM, WIDTH, False,
        )  # fmt: skip
    for i in range(edges):
        places, at, rows = _keys(_edge(i, edge, before, after), start, prefix_start, ahead, PREFIX, EDGE)
        grad = _add_keys(
            grad, x, g, normal, delta, k, v, None, None, 0, places, at, rows, queries, ahead, length, window, power, k_row, v_row,
            CAUSAL, WINDOW, DIM, WIDTH, True,
        )  # fmt: skip
    _store(grad_q, start + first, heads * DIM, inside, grad * scale, DIM, WIDTH)


@triton.jit
def _add_queries(
    grad_k, grad_v, k, v, q, g, q_tiles, g_tiles, rows_of, head, heads, tile,
    start, length, since, until, tokens, power, q_row, q_head, g_row, g_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of keys (over scale) and values from a head's tile of queries; a key is seen from query since to before until."""
    rows = tl.arange(0, QUERIES)
    queries, at = tile * QUERIES + rows, start + tile * QUERIES
    inside = queries < length
    if q_tiles is not None:
        column = head.to(tl.int32) * DIM
        x, y = q_tiles.load([at, column]), g_tiles.load([at, column])
    else:
        x = _load(q + head * q_head, at, rows, q_row, inside, DIM, WIDTH, MASKED)
        y = _load(g + head * g_head, at, rows, g_row, inside, DIM, WIDTH, MASKED)
    normal = rows_of + head * tokens + at
    delta = normal + tl.cast(heads, tl.int64) * tokens
    if MASKED:
        high, low = tl.load(normal + rows, inside, float("inf")), tl.load(delta + rows, inside, 0.0)
    else:
        high, low = tl.load(normal + rows), tl.load(delta + rows)
    scores = tl.dot(k, x.T, input_precision="ieee")  # [keys, queries]
    by_p = tl.dot(v, y.T, input_precision="ieee")  # under way while p is made
    p = tl.exp2(scores * power - high[None, :])
    by_score = p * (by_p - low[None, :])
    if MASKED:
        sees = (queries[None, :] >= since[:, None]) & (queries[None, :] < until[:, None])
        p, by_score = tl.where(sees, p, 0.0), tl.where(sees, by_score, 0.0)
    grad_v = tl.dot(p.to(y.dtype), y, grad_v, input_precision="ieee")
    return tl.dot(by_score.to(x.dtype), x, grad_k, input_precision="ieee"), grad_v


@triton.jit
def _readers(first, last, cu_seqlens, prefix, sequences, tokens, SEARCH: tl.constexpr):
    """The first sequence whose prefix has some of the packed rows [first, last), and how many there are from it to the last such."""
    lowest, highest = sequences, -1
    for begin in range(0, sequences, SEARCH):
        s = begin + tl.arange(0, SEARCH)
        inside = s < sequences
        start, end = tl.load(cu_seqlens + s, inside, 0), tl.load(cu_seqlens + s + 1, inside, 0)
        prefix_start, prefix_end = _prefix_of(s, start, end, prefix, tokens, inside)
        reads = tl.maximum(prefix_start, first) < tl.minimum(prefix_end, last)
        lowest = tl.minimum(lowest, tl.min(tl.where(reads, s, sequences), 0))
        highest = tl.maximum(highest, tl.max(tl.where(reads, s, -1), 0))
    return lowest, tl.maximum(highest + 1 - lowest, 0)


@triton.jit
def _reader(s, first, last, cu_seqlens, prefix, tokens, QUERIES: tl.constexpr, EDGE: tl.constexpr):
    """Start, length and prefix of sequence s, and `_parts` of its queries, which may see some of the packed rows [first, last)."""
    start = tl.load(cu_seqlens + s)
    length = tl.load(cu_seqlens + s + 1) - start
    prefix_start, prefix_end = _prefix_of(s, start, start + length, prefix, tokens, True)
    high = tl.where(tl.maximum(prefix_start, first) < tl.minimum(prefix_end, last), length, 0)
    whole = tl.where((prefix_start <= first) & (last <= prefix_end), high, 0)
    return start, length, prefix_start, prefix_end, _parts(0, 0, whole, high, QUERIES, EDGE)


@triton.jit
def grad_keys_kernel(
    q, k, v, grad_out, q_tiles, g_tiles, cu_seqlens, prefix, valid, rows_of, grad_k, grad_v, tokens, sequences, blocks, group, window, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v [T, Hkv, D]. Programs: the blocks of a key head (early ones, which most see, first), key heads."""
    block, kv_head = tl.program_id(0) % blocks, tl.cast(tl.program_id(0) // blocks, tl.int64)
    kv_heads = tl.num_programs(0) // blocks
    grad_k += kv_head * DIM
    grad_v += kv_head * DIM
    grad_row = kv_heads * DIM
    if tl.load(valid) == 0:
        absent = block * KEYS + tl.arange(0, KEYS)
        nothing = tl.full([KEYS, WIDTH], float("nan"), tl.float32)
        _store(grad_k, block * KEYS, grad_row, absent < tokens, nothing, DIM, WIDTH)
        _store(grad_v, block * KEYS, grad_row, absent < tokens, nothing, DIM, WIDTH)
        return
    own, own_start, own_length, first = _place(block, cu_seqlens, sequences, KEYS, SEARCH)
    if first >= own_length:
        return
    rows = tl.arange(0, KEYS)
    keys = first + rows
    inside = keys < own_length
    x = _load(k + kv_head * k_head, own_start + first, rows, k_row, inside, DIM, WIDTH, True)
    y = _load(v + kv_head * v_head, own_start + first, rows, v_row, inside, DIM, WIDTH, True)
    power = scale * _LOG2E
    sum_k = tl.zeros([KEYS, WIDTH], tl.float32)
    sum_v = tl.zeros([KEYS, WIDTH], tl.float32)
    PREFIX: tl.constexpr = prefix is not None
    own_parts = _query_parts(first, own_length, window, CAUSAL, WINDOW, QUERIES, KEYS, EDGE)
    own_since, own_until = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32) + own_length
    if CAUSAL:
        own_since = keys
    if WINDOW:
        own_until = tl.minimum(keys + window, own_length)
    head, heads = kv_head * group, kv_heads * group
    begin, end, reader, readers = own_start + first, own_start + tl.minimum(first + KEYS, own_length), 0, 0
    if PREFIX:
        reader, readers = _readers(begin, end, cu_seqlens, prefix, sequences, tokens, SEARCH)
    for i in range(1 + readers):
        start, length, since, until = own_start, own_length, own_since, own_until
        b, c, edge, before, after, edges = own_parts
        if PREFIX:
            start, length, prefix_start, prefix_end, parts = _reader(
                tl.where(i == 0, own, reader + i - 1), begin, end, cu_seqlens, prefix, tokens, QUERIES, EDGE
            )
            if i > 0:
                b, c, edge, before, after, edges = parts
            in_prefix = (begin + rows >= prefix_start) & (begin + rows < prefix_end)
            since = tl.where(i == 0, since, 0)
            until = tl.where(i == 0, until, tl.where(in_prefix, length, 0))
        # one loop over all heads: the loads of the next one are under way before this one's last product
        for n in range(group * (c - b)):
            sum_k, sum_v = _add_queries(
                sum_k, sum_v, x, y, q, grad_out, q_tiles, g_tiles, rows_of, head + n // (c - b), heads, b + n % (c - b),
                start, length, since, until, tokens, power, q_row, q_head, g_row, g_head, DIM, WIDTH, QUERIES, False,
            )  # fmt: skip
        for n in range(group * edges):
            sum_k, sum_v = _add_queries(
                sum_k, sum_v, x, y, q, grad_out, None, None, rows_of, head + n // edges, heads,
                _edge(n % edges, edge, before, after),
                start, length, since, until, tokens, power, q_row, q_head, g_row, g_head, DIM, WIDTH, EDGE, True,
            )  # fmt: skip
    _store(grad_k, own_start + first, grad_row, inside, sum_k * scale, DIM, WIDTH)
    _store(grad_v, own_start + first, grad_row, inside, sum_v, DIM, WIDTH)


# -- launchers --------------------------------------------------------------------------------------------------------------


def _check(cu_seqlens: Tensor, prefix: Tensor | None, tokens: int, faults: Tensor, fault: int) -> Tensor:
    """int32 ``[1]``: 0 where cu_seqlens is wrong."""
    valid = torch.empty(1, dtype=torch.int32, device=cu_seqlens.device)
    check_kernel[(1,)](
        cu_seqlens, prefix, valid, faults, len(cu_seqlens) - 1, tokens, FAULT=fault, SEARCH=_SEARCH, num_warps=4
    )
    return valid


def _blocks(tokens: int, cu_seqlens: Tensor, rows: int) -> int:
    """So many blocks of rows have room for those of every sequence, whatever their lengths; 1 more than none where there are none."""
    return tokens // rows + max(len(cu_seqlens) - 1, 1)


def _near(*tensors: Tensor) -> list[Tensor]:
    """Copies where rows are so far apart that their places in a tile, which are int32, could not be."""
    return [x if x.stride(0) <= _FARTHEST else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _tiles(rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """These as TMA (sm_90) reads them, that many rows of a head at a time; None each where one of them does not suit it.

    TMA takes addresses out of the registers and the loads out of the instruction stream, for whole tiles of rows that lie
    together. It needs rows of whole 16 bytes, heads side by side (it sees a matrix, a head being some of its columns), and no
    columns beyond D in a tile. float32, whose products are plain FMAs, would gain nothing.
    """
    fits = all(
        x.element_size() == 2
        and x.shape[2] == width_of(x)
        and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
        and x.stride(0) % 8 == 0
        and x.stride(0) >= x.shape[1] * x.shape[2]
        and x.data_ptr() % 16 == 0
        for x in tensors
    )
    if not (fits and _large(tensors[0])):
        return [None] * len(tensors)
    matrices = (x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1)) for x in tensors)
    return [TensorDescriptor.from_tensor(x, [rows, tensors[0].shape[2]]) for x in matrices]


def _shape(q: Tensor, causal: bool, window: int | None) -> dict[str, Any]:
    return {"CAUSAL": causal, "WINDOW": window is not None, "DIM": q.shape[2], "WIDTH": width_of(q), "SEARCH": _SEARCH}


def _reach(window: int | None) -> int:
    """The window as an int32 that is far from the largest."""
    return 0 if window is None else min(window, 1 << 30)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    faults: Tensor,
    fault: int,
) -> tuple[Tensor, Tensor]:
    """out ``[T, H, D]`` and lse ``[H, T]``; raises ``faults[fault]`` for wrong cu_seqlens, the next for a wrong prefix.

    Rows of q, k, v are contiguous, what lies between them does not matter; window >= 1.
    """
    q, k, v = _near(q, k, v)
    (tokens, heads, _), kv_heads, tiles = q.shape, k.shape[1], passes_of(q).forward
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    blocks = _blocks(tokens, cu_seqlens, tiles.queries)
    with torch.cuda.device_of(q):
        valid = _check(cu_seqlens, prefix, tokens, faults, fault)
        if tokens:
            # with a prefix a tile's keys may lie in two places
            lines = _tiles(tiles.keys, k, v) if prefix is None else (None, None)
            forward_kernel[(blocks * heads,)](
                q, k, v, *lines, cu_seqlens, prefix, valid, out, lse, tokens, len(cu_seqlens) - 1, blocks, heads // kv_heads,
                _reach(window), scale, *_strides(q, k, v), **_shape(q, causal, window), **tiles.options(),
            )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    faults: Tensor,
    fault: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v. Of the inputs, rows of grad_out, q, k, v are contiguous, out and lse altogether."""
    grad_out, q, k, v = _near(grad_out, q, k, v)
    (tokens, heads, dim), kv_heads, passes = q.shape, k.shape[1], passes_of(q)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if tokens == 0:
        return grad_q, grad_k, grad_v
    rows_of = torch.empty((2, heads, tokens), dtype=torch.float32, device=q.device)
    sequences, shape, strides = len(cu_seqlens) - 1, _shape(q, causal, window), _strides(q, k, v, grad_out)
    numbers = (heads // kv_heads, _reach(window), scale)
    with torch.cuda.device_of(q):
        valid = _check(cu_seqlens, prefix, tokens, faults, fault)
        blocks = triton.cdiv(tokens, _ROWS)
        rows_kernel[(blocks * heads,)](
            out, grad_out, lse, rows_of, tokens, blocks, *_strides(grad_out), DIM=dim, WIDTH=width_of(q), ROWS=_ROWS,
        )  # fmt: skip
        given, offsets = (q, k, v, grad_out), (cu_seqlens, prefix, valid, rows_of)
        blocks = _blocks(tokens, cu_seqlens, passes.by_key.keys)
        grad_keys_kernel[(blocks * kv_heads,)](
            *given, *_tiles(passes.by_key.queries, q, grad_out), *offsets, grad_k, grad_v, tokens, sequences, blocks,
            *numbers, *strides, **shape, **passes.by_key.options(),
        )  # fmt: skip
        blocks = _blocks(tokens, cu_seqlens, passes.by_query.queries)
        lines = _tiles(passes.by_query.keys, k, v) if prefix is None else (None, None)
        grad_queries_kernel[(blocks * heads,)](
            *given, *lines, *offsets, grad_q, tokens, sequences, blocks,
            *numbers, *strides, **shape, **passes.by_query.options(),
        )  # fmt: skip
    return grad_q, grad_k, grad_v
