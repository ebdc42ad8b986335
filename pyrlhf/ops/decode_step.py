"""What a decode step counts. Nothing is checked here: it is for a decode loop that has made these tensors itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrlhf.ops._core import address, core, use_core


def token_places(table: Tensor, positions: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Where tokens lie: their slots int64 ``[T]``, and int32 ``[T]`` how many tokens of their sequences there are with them.

    table: int32 ``[T, max_pages]``, the pages of each token's sequence; positions: int64 ``[T]``, within these pages.
    """
    if use_core(table, positions):
        table, positions = table.contiguous(), positions.contiguous()
        slots, seq_lens = torch.empty_like(positions), positions.new_empty(len(positions), dtype=torch.int32)
        core().token_places(
            address(table), table.shape[1], address(positions), len(positions), page_size, address(slots), address(seq_lens)
        )  # fmt: skip
        return slots, seq_lens
    page = positions.div(page_size, rounding_mode="trunc")  # of int64 `//` is slow: it looks for negative numbers
    held = table.gather(1, page.unsqueeze(1)).squeeze(1)
    return positions.add(held.long().sub_(page), alpha=page_size), (positions + 1).int()


def note_draws(
    drawn: Tensor,
    drawn_logprobs: Tensor,
    *,
    last: Tensor,
    positions: Tensor,
    columns: Tensor,
    places: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
) -> None:
    """Goes on to the next token in every row: raises the counters by one, in place, and notes the tokens drawn.

    drawn: int64 ``[B]``, a negative one for a row that nothing could be drawn for; drawn_logprobs: float32 ``[B]``; last, positions,
    columns, places: int64 ``[B]``: last becomes drawn, or 0 where that is negative; tokens int64, logprobs float32: contiguous, of any
    shape, ``places`` after the step being where each row's draw goes in them.
    """
    counters = positions, columns, places
    if use_core(drawn, last, *counters):
        core().note_draws(
            address(drawn), address(drawn_logprobs), len(drawn), address(last), *map(address, counters), address(tokens),
            address(logprobs),
        )  # fmt: skip
        return
    for counter in counters:
        counter.add_(1)
    tokens.view(-1).scatter_(0, places, drawn)
    logprobs.view(-1).scatter_(0, places, drawn_logprobs)
    torch.clamp(drawn, min=0, out=last)
