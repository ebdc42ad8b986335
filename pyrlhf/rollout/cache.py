"""Paged KV cache, and the two ways a forward attends through it: over whole prompts, and one token a sequence.

A page holds `page_size` tokens of one sequence, in every layer at the same page number. A sequence's row of the page table lists
its pages in order, so token t lives in slot `table[t // page_size] * page_size + t % page_size`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops._core import use_core
from pyrlhf.ops._memory import streamed
from pyrlhf.ops.decode_attention import DecodePlan, attend, attend_planned, plan_decode
from pyrlhf.ops.write_kv import store

if TYPE_CHECKING:
    from pyrlhf.model import ModelConfig


class PagedCache:
    """Keys and values of many sequences, and the list of free pages.

    Args:
        config: gives layers, key/value heads and head size.
        pages: number of pages.
        page_size: tokens a page.
        dtype, device: those of the model.

    Attributes:
        k, v: [layers, pages, page_size, num_kv_heads, head_dim]; keys are stored after rotary.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"pages, page_size: expected at least 1 of each, found {pages} and {page_size}")
        shape = (config.num_layers, pages, page_size, config.num_kv_heads, config.head_dim)
        self.k, self.v = (streamed(shape, dtype, device) for _ in range(2))
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence take."""
        return -(-tokens // self.page_size)

    def take(self, n: int) -> list[int]:
        """Claim n pages; ValueError if fewer are free."""
        if n > len(self._free):
            raise ValueError(
                f"n: expected at most the {len(self._free)} free pages, found {n}; give the cache more pages"
            )
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken[::-1]

    def give_back(self, pages: list[int]) -> None:
        """Return pages that `take` handed out."""
        self._free.extend(reversed(pages))

    def slots(self, table: Tensor, positions: Tensor) -> Tensor:
        """Slots int64 [N] of tokens at `positions` int64 [N] in the sequences of `table` int32 [N, max_pages]."""
        page = table.gather(1, (positions // self.page_size).unsqueeze(1)).squeeze(1)
        return page.long() * self.page_size + positions % self.page_size


class PagedPrefill:
    """An `Attend` over whole packed prompts that also stores their keys and values.

    Args:
        cache: where to store.
        cu_seqlens: int32 [S + 1] of the packed prompts.
        slots: int64 [N], where each stored token goes.
        source: int64 [N], which packed token it is: samples of one prompt store the same tokens in their own pages.
    """

    def __init__(self, cache: PagedCache, cu_seqlens: Tensor, slots: Tensor, source: Tensor) -> None:
        self._cache, self._cu_seqlens, self._slots, self._source = cache, cu_seqlens, slots, source

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        cache = self._cache
        store(k[self._source], v[self._source], cache.k[layer], cache.v[layer], self._slots)
        return ops.attention(q, k, v, self._cu_seqlens, causal=causal, window=window, scale=scale)


class PagedDecode:
    """An `Attend` of one new token a sequence over everything stored before it.

    Args:
        cache: where earlier tokens are, and where the new ones go.
        table: int32 [B, max_pages].
        positions: int64 [B], the new token's position, which is the number of tokens before it.
    """

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor) -> None:
        self._cache, self._table = cache, table
        self._slots = cache.slots(table, positions)
        self._seq_lens = (positions + 1).int()
        self._plans: dict[int | None, DecodePlan] = {}  # layers with the same window look at the same places

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        store(k, v, k_cache, v_cache, self._slots)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        if use_core(q):
            return attend(q, k_cache, v_cache, self._table, self._seq_lens, window, scale)
        if window not in self._plans:
            self._plans[window] = plan_decode(self._table, self._seq_lens, *k_cache.shape[1:3], window=window)
        return attend_planned(q, k_cache, v_cache, self._plans[window], scale)
