"""Memory for what a decode step streams through, packed weights and the KV cache; freed memory; and the way to a device."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_SMALLEST = 1 << 18  # bytes; below it the caches serve
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def streamed(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised tensor on huge pages where the system has them to give (Linux, CPU); else what ``torch.empty`` makes.

    Memory in pages of 4 KiB was read at 30 GB/s where the same machine reads huge pages at 35 to 55: the hardware prefetcher
    stops at the end of a page, and a virtual machine walks two page tables for the next one.
    """
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # neighbours join into whole huge pages
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(*shape)


def keep_freed_memory() -> None:
    """Keep memory that tensors free for the next ones instead of giving it back to the system (glibc; a no-op elsewhere).

    Given back, every temporary of a few megabytes costs a page fault for each 4 KiB again: more than many kernels take.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # all that an older glibc admits, which else keeps its 128 KiB


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; from the host to a GPU without a wait for what that is doing (the copy is in its stream's order)."""
    if torch.device(device).type == "cuda" and x.is_cpu and x.numel():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
