"""Perplexity of a language model on token sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pyrlhf.data import pack, split_by_tokens
from pyrlhf.evaluate.device import device_of


class Perplexity(NamedTuple):
    """``perplexity`` = exp(``loss``); loss in nats a token, over ``tokens`` predicted tokens."""

    perplexity: float
    loss: float
    tokens: int


@torch.no_grad()
def perplexity(
    model: Callable[..., Any], sequences: Sequence[Sequence[int]], *, tokens_per_batch: int = 8192
) -> Perplexity:
    """exp of the mean next-token loss; every predicted token of every sequence weighs the same.

    Args:
        model: CausalLM (or its engine) in evaluation.
        sequences: token ids; the first token of each is context only, so shorter ones than 2 count nothing.
        tokens_per_batch: packed tokens of one forward; changes memory, not the result.

    Raises:
        ValueError: no sequence has a token to predict.
    """
    used = [list(sequence) for sequence in sequences if len(sequence) > 1]
    if not used:
        raise ValueError("sequences: expected at least one of 2 tokens or more, found none")
    total, count = 0.0, 0
    for part in split_by_tokens([len(sequence) for sequence in used], tokens_per_batch):
        batch = pack([used[i] for i in part]).to(device_of(model))
        is_last = torch.zeros(batch.num_tokens, dtype=torch.bool, device=batch.tokens.device)
        is_last[batch.cu_seqlens[1:].long() - 1] = True
        rows = (~is_last).nonzero().squeeze(1)
        logprobs, _ = model(batch.tokens, batch.positions, batch.cu_seqlens, rows=rows, targets=batch.tokens[rows + 1])
        total -= float(logprobs.double().sum())
        count += rows.numel()
    loss = total / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)
