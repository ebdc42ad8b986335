"""What a decode step does beside its layers. But for ids, nothing is checked here: it is for a decode loop that has made these
tensors itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrlhf.ops._core import CORE_DTYPES, address, core, use_core


def embed(table: Tensor, ids: Tensor, added: Tensor | None = None) -> Tensor:
    """The rows ``ids`` int64 ``[T]`` of table ``[V, W]``, plus ``added`` ``[T, W]`` if it is given. By torch where a gradient may be wanted.

    Raises IndexError for an id outside of 0..V-1 (on CUDA the kernel asserts).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not use_core(table, ids, added):
        rows = torch.nn.functional.embedding(ids, table)
        return rows if added is None else rows + added
    ids, added = ids.contiguous(), None if added is None else added.contiguous()
    out = table.new_empty(len(ids), table.shape[1])
    bad = core().embed(
        address(table.contiguous()), address(ids), address(added), address(out), CORE_DTYPES.index(table.dtype),
        *out.shape, len(table), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"ids: expected 0 .. {len(table) - 1}, found {int(ids[bad])}")
    return out


def token_places(table: Tensor, positions: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens lie: slots int64 ``[T]``; int32 ``[T]``, how many tokens of their sequences there are with them; the same in int64,
    which is where the next tokens will be.

    table: int32 ``[T, max_pages]``, the pages of each token's sequence; positions: int64 ``[T]``, within these pages.
    """
    if use_core(table, positions):
        table, positions = table.contiguous(), positions.contiguous()
        slots, following = torch.empty_like(positions), torch.empty_like(positions)
        seq_lens = positions.new_empty(len(positions), dtype=torch.int32)
        core().token_places(
            address(table), table.shape[1], address(positions), len(positions), page_size,
            address(slots), address(seq_lens), address(following),
        )  # fmt: skip
        return slots, seq_lens, following
    page = positions.div(page_size, rounding_mode="trunc")  # of int64 `//` is slow: it looks for negative numbers
    held = table.gather(1, page.unsqueeze(1)).squeeze(1)
    following = positions + 1
    return positions.add(held.long().sub_(page), alpha=page_size), following.int(), following


def note_draws(
    drawn: Tensor,
    drawn_logprobs: Tensor,
    *,
    last: Tensor,
    positions: Tensor,
    columns: Tensor,
    places: Tensor,
    ends: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
) -> bool:
    """Goes on to the next token in every row: raises the counters by one, in place, and notes the tokens drawn. Whether one of these
    is among ``ends`` int64 ``[E]``; on a GPU, which would have to be waited for, whether there are ends at all.

    drawn: int64 ``[B]``, a negative one for a row that nothing could be drawn for; drawn_logprobs: float32 ``[B]``; last, positions,
    columns, places: int64 ``[B]``: last becomes drawn, or 0 where that is negative; tokens int64, logprobs float32: contiguous, of any
    shape, ``places`` after the step being where each row's draw goes in them.
    """
    counters = positions, columns, places
    if use_core(drawn, last, *counters):
        outcome: int = core().note_draws(
            address(drawn), address(drawn_logprobs), len(drawn), address(last), *map(address, counters),
            address(ends), len(ends), address(tokens), address(logprobs),
        )  # fmt: skip
        return outcome != -1
    for counter in counters:
        counter.add_(1)
    tokens.view(-1).scatter_(0, places, drawn)
    logprobs.view(-1).scatter_(0, places, drawn_logprobs)
    torch.clamp(drawn, min=0, out=last)
    return len(ends) > 0 and (drawn.is_cuda or bool(torch.isin(drawn, ends).any()))
