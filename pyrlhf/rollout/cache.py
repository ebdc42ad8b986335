"""Paged KV cache, and the two ways a forward attends through it: over whole prompts, and one token a sequence.

A page holds `page_size` tokens of one sequence, in every layer at the same page number. A sequence's row of the page table lists
its pages in order, so token t lives in slot `table[t // page_size] * page_size + t % page_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.ops._core import use_core, use_cuda_core
from pyrlhf.ops._memory import moved, streamed
from pyrlhf.ops.decode_attention import DecodePlan, attend, attend_planned, plan_decode
from pyrlhf.ops.decode_step import token_places
from pyrlhf.ops.write_kv import store, turn_and_store
from pyrlhf.rollout.scheduler import Pages

if TYPE_CHECKING:
    from pyrlhf.model import ModelConfig
    from pyrlhf.rollout.program import DecodeProgram


def sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on the device, without waiting for what the device is doing."""
    return moved(torch.tensor(values, dtype=dtype), device)


class PagedCache:
    """Keys and values of many sequences.

    Args:
        config: gives layers, key/value heads and head size.
        pages: number of pages.
        page_size: tokens a page.
        dtype, device: those of the model.

    Attributes:
        k, v: [layers, pages + 1, page_size, num_kv_heads, head_dim]; keys are stored after rotary.
        pages: which of them are in use.
        spare: number of the last page, which is no sequence's: rows that only fill a batch up write and read there.
        programs: decode steps recorded over this memory, by their number of rows.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.pages = Pages(pages, page_size)
        shape = (config.num_layers, pages + 1, page_size, config.num_kv_heads, config.head_dim)
        self.k, self.v = (streamed(shape, dtype, device) for _ in range(2))
        self.programs: dict[int, DecodeProgram] = {}
        self._recorded_for: object = None

    def programs_for(self, made_for: object) -> dict[int, DecodeProgram]:
        """The recorded steps, if they were recorded for the same; else none, and from now on for this."""
        if made_for != self._recorded_for:
            self.programs, self._recorded_for = {}, made_for
        return self.programs

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page, all layers, keys and values."""
        return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    @property
    def spare(self) -> int:
        return self.k.shape[1] - 1

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def serves(self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it could be a cache of so many pages of this kind."""
        fits = pages <= self.spare and page_size == self.k.shape[2]
        return fits and dtype == self.k.dtype and device == self.k.device

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to); no page is both."""
        if pairs:
            source, target = (sent(pages, torch.int64, self.k.device) for pages in zip(*pairs, strict=True))
            self.k[:, target] = self.k[:, source]
            self.v[:, target] = self.v[:, source]


class PagedDecode:
    """An `Attend` of new tokens over everything stored before them, themselves included.

    Args:
        cache: where earlier tokens are, and where the new ones go.
        table: int32 [N, max_pages], the pages of each new token's sequence.
        positions: int64 [N], each new token's position. Several may be of one sequence.

    Attributes:
        following: int64 [N], the positions behind them.
    """

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor) -> None:
        self._cache, self._table, self._positions = cache, table, positions
        self._slots, self._seq_lens, self.following = token_places(table, positions, cache.pages.size)
        self._plans: dict[int | None, DecodePlan] = {}  # layers with the same window look at the same places

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        store(k, v, self._cache.k[layer], self._cache.v[layer], self._slots)
        return self.look(layer, q, window, scale)

    def turned(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, window: int | None, scale: float | None
    ) -> Tensor:
        """The same for q and k before rotary, which turns them on their way."""
        caches = self._cache.k[layer], self._cache.v[layer]
        q = turn_and_store(q, k, v, self._positions, inv_freq, *caches, self._slots)
        return self.look(layer, q, window, scale)

    def look(self, layer: int, q: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Attend to what is stored."""
        k_cache, v_cache = self._cache.k[layer], self._cache.v[layer]
        scale = q.shape[2] ** -0.5 if scale is None else scale
        if use_core(q) or use_cuda_core(q):
            return attend(q, k_cache, v_cache, self._table, self._seq_lens, window, scale)
        if window not in self._plans:
            self._plans[window] = plan_decode(self._table, self._seq_lens, *k_cache.shape[1:3], window=window)
        return attend_planned(q, k_cache, v_cache, self._plans[window], scale)


class PagedPrefill:
    """An `Attend` over whole packed prompts, and over tokens that sequences had drawn before, that stores them all.

    Args:
        cache: where to store.
        cu_seqlens: int32 [S + 1] of the packed prompts, which come first.
        table: int32 [N, max_pages], the pages of every token's sequence.
        positions: int64 [N], prompts first.
        tokenwise: prompts are attended to token by token as well, as decoding would.
    """

    def __init__(
        self, cache: PagedCache, cu_seqlens: Tensor, table: Tensor, positions: Tensor, *, tokenwise: bool = False
    ) -> None:
        self._cache, self._cu_seqlens = cache, cu_seqlens
        self._slots, *_ = token_places(table, positions, cache.pages.size)
        self._packed = 0 if tokenwise else int(cu_seqlens[-1])
        self._again = None
        if self._packed < len(positions):
            self._again = PagedDecode(cache, table[self._packed :], positions[self._packed :])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None, scale: float | None
    ) -> Tensor:
        store(k, v, self._cache.k[layer], self._cache.v[layer], self._slots)
        n = self._packed
        out = []
        if n:
            out = [ops.attention(q[:n], k[:n], v[:n], self._cu_seqlens, causal=causal, window=window, scale=scale)]
        if self._again is not None:
            out.append(self._again.look(layer, q[n:], window, scale))
        return out[0] if len(out) == 1 else torch.cat(out)
