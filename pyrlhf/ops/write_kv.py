"""Stores new keys and values in the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_tensor, float_dtypes, values_readable
from pyrlhf.ops._core import CUDA_DTYPES, address, core, cuda_core, faults, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define
from pyrlhf.ops.rotary import turn


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`write_kv` in plain torch; float64 too."""
    _check(k, v, k_cache, v_cache, slots, reference=True)
    _check_slots(slots, k_cache)
    page_size = k_cache.shape[1]
    for row, slot in enumerate(slots.tolist()):
        k_cache[slot // page_size, slot % page_size] = k[row]
        v_cache[slot // page_size, slot % page_size] = v[row]


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes row t of k and v to slot ``slots[t] = page * page_size + offset`` of the caches, in place.

    k, v: ``[T, Hkv, D]`` float32 or bfloat16 (float16 on CUDA); caches: ``[pages, page_size, Hkv, D]`` contiguous, same
    dtype; slots: int64 ``[T]``, all different, in 0..pages*page_size-1. Not differentiable.

    Raises ValueError or TypeError naming the argument, and then nothing is written.
    """
    _check(k, v, k_cache, v_cache, slots)
    _write_kv(k, v, k_cache, v_cache, slots)


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`write_kv` without its checks, for a decode loop that has made the slots itself."""
    cpu = use_core(k)
    if not cpu and not use_cuda_core(k):
        k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
        v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)
        return
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    slots, size = slots.contiguous(), k.element_size()
    (tokens, heads, dim), strides = k.shape, [size * stride for x in (k, v) for stride in x.stride()[:2]]
    tensors = [address(t) for t in (k, v, k_cache, v_cache, slots)]
    if cpu:
        core().write_kv(*tensors, tokens, heads, size * dim, *strides, torch.get_num_threads())
    else:
        room = k_cache.shape[0] * k_cache.shape[1]
        cuda_core().write_kv(*tensors, tokens, heads, size * dim, *strides, room, faults(k), *queue(k))


def turn_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rotary` of q and k, then `store` of the turned k and of v; returns the turned q. The same bits, on CUDA in one launch."""
    if not use_cuda_core(q, k, v):
        q, k = turn(q, k, positions, inv_freq)
        store(k, v, k_cache, v_cache, slots)
        return q
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    positions, inv_freq, slots = positions.contiguous(), inv_freq.contiguous(), slots.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, dim = q.shape
    cuda_core().rotary_write_kv(
        address(q), address(out), heads, *q.stride()[:2], address(k), address(k_cache), k.shape[1], *k.stride()[:2],
        address(v), address(v_cache), *v.stride()[:2], address(positions), address(inv_freq), address(slots),
        k_cache.shape[0] * k_cache.shape[1], tokens, dim, inv_freq.shape[0], CUDA_DTYPES.index(q.dtype), faults(q),
        *queue(q),
    )  # fmt: skip
    return out


def _check(k: object, v: object, k_cache: object, v_cache: object, slots: object, *, reference: bool = False) -> None:
    op = "write_kv"
    check_tensor(op, "k", k, shape=(None, None, None), dtype=float_dtypes(k, reference=reference))
    assert isinstance(k, Tensor)
    check_tensor(op, "v", v, shape=k.shape, dtype=k.dtype, device=k.device)
    cache_shape = (None, None, k.shape[1], k.shape[2])
    check_tensor(op, "k_cache", k_cache, shape=cache_shape, dtype=k.dtype, device=k.device, contiguous=True)
    assert isinstance(k_cache, Tensor)
    check_tensor(op, "v_cache", v_cache, shape=k_cache.shape, dtype=k.dtype, device=k.device, contiguous=True)
    check_tensor(op, "slots", slots, shape=(k.shape[0],), dtype=torch.int64, device=k.device)


def _check_slots(slots: Tensor, k_cache: Tensor) -> None:
    if slots.numel() == 0 or not values_readable(slots):
        return
    size = k_cache.shape[0] * k_cache.shape[1]
    ordered = slots.sort().values
    if int(ordered[0]) < 0 or int(ordered[-1]) >= size:
        found = int(ordered[0]) if int(ordered[0]) < 0 else int(ordered[-1])
        raise ValueError(f"write_kv: slots must be in 0..{size - 1} (pages * page_size = {size}), found {found}")
    same = ordered[1:] == ordered[:-1]
    if bool(same.any()):
        raise ValueError(f"write_kv: slots must all differ, found {int(ordered[1:][same][0])} more than once")


def _impl(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    _check_slots(slots, k_cache)
    store(k, v, k_cache, v_cache, slots)


def _fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


_write_kv = define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()", _impl, _fake
)
