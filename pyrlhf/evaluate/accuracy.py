"""Accuracy of a reward model: how many pairs of ranked answers it puts in the right order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pyrlhf.data import EncodedRanking, pack_groups, split_by_tokens
from pyrlhf.evaluate.device import device_of


class Accuracy(NamedTuple):
    """Share of ordered pairs that the model orders alike (equal scores count half), over ``pairs`` pairs of ``rankings``
    rankings; ``by_k`` has the same for the rankings of K answers: K -> (accuracy, pairs)."""

    accuracy: float
    pairs: int
    rankings: int
    by_k: dict[int, tuple[float, int]]


def reward_accuracy(
    model: Callable[..., Any], rankings: Sequence[EncodedRanking], *, tokens_per_batch: int = 8192
) -> Accuracy:
    """Compare a reward model with rankings of K >= 2 answers; answers that people rank equal make no pair.

    Args:
        model: ScalarModel (or its engine) in evaluation.
        rankings: encoded prompts and answers with ranks, lower better.
        tokens_per_batch: packed tokens of one forward; changes memory, not the result.

    Raises:
        ValueError: there is no pair at all.
    """
    scores = score_rankings(model, rankings, tokens_per_batch=tokens_per_batch)
    right: dict[int, float] = {}
    pairs: dict[int, int] = {}
    used = 0
    for ranking, found in zip(rankings, scores):
        good, count = ordered_pairs(found, ranking.ranks)
        k = len(found)
        right[k], pairs[k] = right.get(k, 0.0) + good, pairs.get(k, 0) + count
        used += count > 0
    total = sum(pairs.values())
    if not total:
        raise ValueError("rankings: expected at least one pair of answers with different ranks, found none")
    by_k = {k: (right[k] / pairs[k], pairs[k]) for k in sorted(pairs) if pairs[k]}
    return Accuracy(sum(right.values()) / total, total, used, by_k)


def ordered_pairs(scores: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    """(pairs in the right order, equal scores counting half; pairs) of one ranking."""
    good, count = 0.0, 0
    for i, better in enumerate(ranks):
        for j, worse in enumerate(ranks):
            if better < worse:
                good += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                count += 1
    return good, count


@torch.no_grad()
def score_rankings(
    model: Callable[..., Any], rankings: Sequence[EncodedRanking], *, tokens_per_batch: int = 8192
) -> list[list[float]]:
    """The score of every answer, one list a ranking; a prompt's answers share its tokens."""
    lengths = [len(r.prompt) + sum(map(len, r.answers)) for r in rankings]
    scores: list[list[float]] = [[] for _ in rankings]
    for part in split_by_tokens(lengths, tokens_per_batch):
        batch, last, cu_groups = pack_groups([(rankings[i].prompt, rankings[i].answers) for i in part]).to(
            device_of(model)
        )
        found = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.prefix, rows=last).tolist()
        bounds = cu_groups.tolist()
        for i, start, end in zip(part, bounds, bounds[1:]):
            scores[i] = found[start:end]
    return scores
