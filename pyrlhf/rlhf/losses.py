"""Losses over packed batches. Each is a weighted sum, so that micro-batches, ranks and ZeRO stages add up to the same number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrlhf import ops
from pyrlhf.data import PackedBatch
from pyrlhf.ops._memory import moved

#: A model's forward, plain or through its engine.
Forward = Callable[..., Any]


class RankedBatch(NamedTuple):
    """Prompts with their K ranked answers, each prompt's tokens packed once and shared through `prefix`; A answers in all."""

    packed: PackedBatch
    last_tokens: Tensor  # int64 [A], where each answer's score is read
    cu_groups: Tensor  # int32 [G+1], the answers of each prompt
    ranks: Tensor  # int32 [A], lower is better, equal is a tie


def response_rows(cu_seqlens: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of each response are predicted.

    Response token p of a sequence is predicted from the hidden state at p - 1, so a sequence of length L with a prompt of P tokens
    gives the rows P-1 .. L-2 (its targets stand one further). With P = 0 the first token has no state before it and is not predicted.

    Args:
        cu_seqlens: int32 [S+1].
        prompt_lengths: int [S], 0 <= prompt_lengths[s] <= length of s.

    Returns:
        rows int64 [R], indices into the packed tokens; cu_responses int32 [S+1], the boundaries of the sequences among them.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    first = starts + prompt_lengths.to(starts).clamp(min=1) - 1
    counts = (ends - 1 - first).clamp(min=0)
    cu_responses = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=cu_responses[1:])
    offsets = torch.arange(int(cu_responses[-1]), device=counts.device)
    rows = torch.repeat_interleave(first - cu_responses[:-1], counts) + offsets
    return rows, cu_responses.int()


def language_model_loss(
    forward: Forward,
    batch: PackedBatch,
    prompt_lengths: Tensor,
    weight: float,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Next-token loss on response tokens, summed and multiplied by `weight` (usually 1 / tokens of the whole minibatch).

    Args:
        forward: CausalLM or its engine.
        batch: packed sequences.
        prompt_lengths: int [S]; the tokens before are context only.
        weight: factor of every token; 0 for a micro-batch that only keeps ranks in step.
        device: where the model is, if the batch is still on the host: there the number of rows can be asked for without a wait.

    Returns:
        0-d float32 with gradient.
    """
    rows, _ = response_rows(batch.cu_seqlens, prompt_lengths)
    if device is not None:
        batch, rows = batch.to(device), moved(rows, device)
    targets = batch.tokens[rows + 1]
    logprobs, _ = forward(batch.tokens, batch.positions, batch.cu_seqlens, rows=rows, targets=targets)
    return -weight * logprobs.sum()


def reward_model_loss(forward: Forward, batch: RankedBatch, weight: float) -> tuple[Tensor, ops.RankingStats]:
    """InstructGPT's pairwise loss over all C(K, 2) pairs of each prompt, summed over prompts and multiplied by `weight`.

    Args:
        forward: ScalarModel or its engine.
        batch: prompts with their K answers, the prompt's tokens shared through `prefix`.
        weight: factor of every prompt (usually 1 / prompts of the whole minibatch that have a pair).

    Returns:
        (loss, 0-d float32 with gradient; the ranking statistics of these prompts).
    """
    packed = batch.packed
    scores = forward(packed.tokens, packed.positions, packed.cu_seqlens, packed.prefix, rows=batch.last_tokens)
    loss, stats = ops.ranking_loss(scores, batch.cu_groups, batch.ranks)
    return loss * (stats.groups * weight), stats


def whiten(x: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance (biased, ε 1e-8); `shift_mean=False` keeps the mean (for rewards, Ziegler et al. 2019)."""
    if x.numel() == 0:
        return x
    mean, var = x.mean(), x.var(unbiased=False)
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean
