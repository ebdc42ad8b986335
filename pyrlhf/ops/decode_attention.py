"""Attention of one new token a row over its keys and values in the paged cache.

csrc/cpu/decode_attention.cpp and csrc/cuda/decode_attention.cu read the pages in place. For float64 and PYRLHF_BACKEND=ref
torch gathers them: rows are taken together by the number of key blocks that they see, so a row's arithmetic depends on its own
length only, and places past a row's end read its last key again and get weight 0. Unused cache is never touched, whatever it
holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrlhf.ops._checks import check_number, check_tensor, float_dtypes, values_readable
from pyrlhf.ops._core import CUDA_DTYPES, address, core, cuda_core, faults, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define

_BLOCK = 64  # keys
_LINE = 16  # floats
_EVERYTHING = 2**62  # a window that hides nothing


class DecodeGroup(NamedTuple):
    """Rows that see the same number of key blocks, L keys with the filling."""

    rows: Tensor | None  # int64 [b], the last one perhaps repeated; None for all rows in order
    places: Tensor  # int64 [b * Hkv * L]: slot * Hkv + head, the row of a cache seen as [pages * page_size * Hkv, D]
    mask: Tensor  # float32 [b, 1, L]: 0 or -inf


class DecodePlan(NamedTuple):
    """Where each row's keys lie: made once a step by `plan_decode`, used by every layer with the same window."""

    groups: list[DecodeGroup]


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`decode_attention` in plain torch, row by row; float64 too."""
    _check(q, k_cache, v_cache, page_table, seq_lens, window, scale, reference=True)
    _check_values(page_table, seq_lens, k_cache)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    out = torch.zeros_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        first = 0 if window is None else max(0, length - window)
        if first == length:
            continue
        place = torch.arange(first, length, device=q.device)
        pages = page_table[row, place // page_size].long()
        keys, values = (
            cache[pages, place % page_size].to(wide).repeat_interleave(group, dim=1) for cache in (k_cache, v_cache)
        )  # [L, Hq, D]
        weights = torch.einsum("hd,lhd->hl", q[row].to(wide), keys).mul(scale).softmax(-1)
        out[row] = torch.einsum("hl,lhd->hd", weights, values).to(q.dtype)
    return out


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Row b's token attends to the ``seq_lens[b]`` tokens of its sequence in the cache. Not differentiable.

    q: ``[B, Hq, D]`` float32 or bfloat16 (float16 on CUDA); caches: ``[pages, page_size, Hkv, D]`` contiguous, q's dtype, Hq
    a multiple of Hkv, keys stored after rotary; page_table: int32 ``[B, max_pages]``, entries past a row's last page are
    not read; seq_lens: int32 ``[B]``, counting the token just written. window: only the last ``window`` tokens, the
    current one included. scale: default ``D ** -0.5``.

    Returns ``[B, Hq, D]`` in q's dtype, accumulated in float32. A row with seq_lens 0 gives 0. A row's bits depend on no other row.
    Raises ValueError or TypeError naming the argument.
    """
    _check(q, k_cache, v_cache, page_table, seq_lens, window, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    out: Tensor = _decode_attention(q, k_cache, v_cache, page_table, seq_lens, window, scale)
    return out


def plan_decode(
    page_table: Tensor, seq_lens: Tensor, page_size: int, kv_heads: int, *, window: int | None = None
) -> DecodePlan:
    """Where the keys of each row lie, for `attend_planned`; the same for all layers of a step that share a window. No checks."""
    lengths = seq_lens.tolist()
    starts = [0 if window is None else max(0, n - window) // _BLOCK for n in lengths]
    by_blocks: dict[int, list[int]] = {}
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        if length and window != 0:
            by_blocks.setdefault(-(-length // _BLOCK) - start, []).append(row)
    # A batched GEMM of fewer matrices than threads may share one matrix out and sum in another order: repeat a row instead.
    fewest = -(-max(2, torch.get_num_threads()) // kv_heads)
    groups = []
    for blocks, members in sorted(by_blocks.items()):
        members = members + members[-1:] * (fewest - len(members))
        rows = None if members == list(range(len(lengths))) else torch.tensor(members, device=seq_lens.device)
        groups.append(_group(rows, blocks, page_table, seq_lens, page_size, kv_heads, window))
    return DecodePlan(groups)


def _group(
    rows: Tensor | None,
    blocks: int,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    kv_heads: int,
    window: int | None,
) -> DecodeGroup:
    if rows is not None:
        page_table, seq_lens = page_table[rows], seq_lens[rows]
    length = seq_lens.long()[:, None]  # [b, 1]
    token = torch.arange(blocks * _BLOCK, device=seq_lens.device)[None]  # [1, L]
    hidden = token >= length
    if window is not None:
        token = token + (length - window).clamp_(min=0) // _BLOCK * _BLOCK
        hidden = (token >= length) | (token < length - window)
    token = torch.minimum(token, length - 1)
    slots = page_table.long().gather(1, token // page_size) * page_size + token % page_size  # [b, L]
    places = slots[:, None] * kv_heads + torch.arange(kv_heads, device=slots.device)[:, None]  # [b, Hkv, L]
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return DecodeGroup(rows, places.reshape(-1), mask[:, None])


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """`decode_attention` by the kernels, without its checks, for a decode loop that has made the table itself."""
    q = q if q.stride(2) == 1 else q.contiguous()
    page_table, seq_lens = page_table.contiguous(), seq_lens.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = [address(t) for t in (q, k_cache, v_cache, page_table, seq_lens, out)]
    (rows, heads, dim), (pages, page_size, kv_heads), max_pages = q.shape, k_cache.shape[:3], page_table.shape[1]
    dtype, reach = CUDA_DTYPES.index(q.dtype), _EVERYTHING if window is None else min(window, _EVERYTHING)
    if not use_core(q):
        splits = _splits(max_pages * page_size, window)
        partial = q.new_empty(rows * heads * splits * (dim + 2), dtype=torch.float32) if splits > 1 else None
        sizes = (rows, heads, kv_heads, dim, pages, page_size, max_pages, *q.stride()[:2], reach, splits)
        cuda_core().decode_attention(*tensors, address(partial), *sizes, scale, dtype, faults(q), *queue(q))
        return out
    sizes = (rows, heads, kv_heads, dim, page_size, max_pages, *q.stride()[:2], reach)
    if not core().decode_attention(*tensors, *sizes, scale, dtype, torch.get_num_threads()):
        raise MemoryError("decode_attention: the kernel's scratch memory could not be allocated; free some memory")
    return out


def _splits(room: int, window: int | None) -> int:
    """The most chunks that a row of a table with so much room can see, at least 1."""
    chunk = cuda_core().decode_chunk
    every = -(-room // chunk)
    return max(1, every if window is None else min(every, -(-window // chunk) + 1))


def attend_planned(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan, scale: float) -> Tensor:
    """`decode_attention` in torch, without its checks, over the places of ``plan``."""
    groups = plan.groups
    if len(groups) == 1 and groups[0].rows is None:
        return _attend_group(q, k_cache, v_cache, groups[0], scale)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for group in groups:
        assert group.rows is not None
        out[group.rows] = _attend_group(q[group.rows], k_cache, v_cache, group, scale)
    return out


def _attend_group(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    batch, heads, dim = q.shape
    kv_heads, length = k_cache.shape[2], group.mask.shape[2]
    group_heads = heads // kv_heads
    keys, values = (
        _whole_lines(cache.view(-1, dim).index_select(0, group.places).view(batch * kv_heads, length, dim).float())
        for cache in (k_cache, v_cache)
    )
    queries = _whole_lines((q.float() * scale).reshape(batch * kv_heads, group_heads, dim))
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(batch, heads, length)
    weights = scores.add_(group.mask).softmax(-1).view(batch * kv_heads, group_heads, length)
    return torch.bmm(weights, values)[..., :dim].reshape(batch, heads, dim).to(q.dtype)


def _whole_lines(x: Tensor) -> Tensor:
    """``x`` with zero channels up to a whole cache line: BLAS may choose another order of summation by alignment."""
    return x if x.shape[-1] % _LINE == 0 else pad(x, (0, -x.shape[-1] % _LINE))


def _check(
    q: object,
    k_cache: object,
    v_cache: object,
    page_table: object,
    seq_lens: object,
    window: object,
    scale: object,
    *,
    reference: bool = False,
) -> None:
    op = "decode_attention"
    check_tensor(op, "q", q, shape=(None, None, None), dtype=float_dtypes(q, reference=reference))
    assert isinstance(q, Tensor)
    batch, heads, dim = q.shape
    cache_shape = (None, None, None, dim)
    check_tensor(op, "k_cache", k_cache, shape=cache_shape, dtype=q.dtype, device=q.device, contiguous=True)
    assert isinstance(k_cache, Tensor)
    check_tensor(op, "v_cache", v_cache, shape=k_cache.shape, dtype=q.dtype, device=q.device, contiguous=True)
    if k_cache.shape[2] == 0 or heads == 0 or heads % k_cache.shape[2]:
        raise ValueError(f"{op}: q's heads must be a multiple of k_cache's, found {heads} and {k_cache.shape[2]}")
    if not 1 <= dim <= 256:
        raise ValueError(f"{op}: q's head size must be in 1..256, found {dim}")
    if k_cache.shape[1] == 0:
        raise ValueError(f"{op}: k_cache must have pages of at least 1 token, found {list(k_cache.shape)}")
    check_tensor(op, "page_table", page_table, shape=(batch, None), dtype=torch.int32, device=q.device)
    check_tensor(op, "seq_lens", seq_lens, shape=(batch,), dtype=torch.int32, device=q.device)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"{op}: window must be an int or None, found {type(window).__name__}")
        if window < 0:
            raise ValueError(f"{op}: window must be 0 or more tokens, found {window}")
    if scale is not None:
        check_number(op, "scale", scale, low=-1e30, high=1e30)


def _check_values(page_table: Tensor, seq_lens: Tensor, k_cache: Tensor) -> None:
    if seq_lens.numel() == 0 or not values_readable(seq_lens):
        return
    pages, page_size = k_cache.shape[:2]
    room = page_table.shape[1] * page_size
    shortest, longest = (int(x) for x in torch.aminmax(seq_lens))
    if shortest < 0 or longest > room:
        raise ValueError(
            f"decode_attention: seq_lens must be in 0..{room} (max_pages * page_size), "
            f"found {shortest if shortest < 0 else longest}"
        )
    used = torch.arange(page_table.shape[1], device=seq_lens.device)[None] * page_size < seq_lens[:, None]
    bad = used & ((page_table < 0) | (page_table >= pages))
    if bool(bad.any()):
        row, column = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"decode_attention: page_table[{row}, {column}] must be a page in 0..{pages - 1}, "
            f"found {int(page_table[row, column])}"
        )


def _impl(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    _check_values(page_table, seq_lens, k_cache)
    if use_core(q) or use_cuda_core(q):
        return attend(q, k_cache, v_cache, page_table, seq_lens, window, scale)
    plan = plan_decode(page_table, seq_lens, *k_cache.shape[1:3], window=window)
    return attend_planned(q, k_cache, v_cache, plan, scale).contiguous()


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


_decode_attention = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, int? window, "
    "float scale) -> Tensor",
    _impl,
    _fake,
)
