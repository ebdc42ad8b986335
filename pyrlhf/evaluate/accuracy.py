"""Accuracy of a reward model: how many pairs of ranked answers it puts in the right order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from pyrlhf import ops
from pyrlhf.data import EncodedRanking, pack_groups, share_by_tokens
from pyrlhf.evaluate.device import device_of


class Accuracy(NamedTuple):
    """Share of ordered pairs that the model orders alike (equal scores count half), over ``pairs`` pairs of ``rankings``
    rankings; ``by_k`` has the same for the rankings of K answers: K -> (accuracy, pairs). ``loss`` is the ranking loss."""

    accuracy: float
    pairs: int
    rankings: int
    by_k: dict[int, tuple[float, int]]
    loss: float


def reward_accuracy(
    model: Callable[..., Any], rankings: Sequence[EncodedRanking], *, tokens_per_batch: int = 8192, world: Any = None
) -> Accuracy:
    """Compare a reward model with rankings of K >= 2 answers; answers that people rank equal make no pair.

    Args:
        model: ScalarModel (or its engine) in evaluation.
        rankings: encoded prompts and answers with ranks, lower better.
        tokens_per_batch: packed tokens of one forward; changes memory, not the result.
        world: ranks (``pyrlhf.engine.World``) that share the work; all must call. None: this process alone.

    Raises:
        ValueError: there is no pair at all.
    """
    scores = score_rankings(model, rankings, tokens_per_batch=tokens_per_batch, world=world)
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
    return Accuracy(sum(right.values()) / total, total, used, by_k, _loss(scores, rankings))


def _loss(scores: Sequence[Sequence[float]], rankings: Sequence[EncodedRanking]) -> float:
    flat = torch.tensor([score for group in scores for score in group], dtype=torch.float32)
    ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks], dtype=torch.int32)
    cu_groups = torch.tensor([0, *accumulate(map(len, scores))], dtype=torch.int32)
    return float(ops.ranking_loss(flat, cu_groups, ranks)[0])


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
    model: Callable[..., Any], rankings: Sequence[EncodedRanking], *, tokens_per_batch: int = 8192, world: Any = None
) -> list[list[float]]:
    """The score of every answer, one list a ranking; a prompt's answers share its tokens. Arguments as above."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    lengths = [len(r.prompt) + sum(map(len, r.answers)) for r in rankings]
    scores: dict[int, list[float]] = {}
    for part in share_by_tokens(lengths, tokens_per_batch, rank=rank, world_size=size) if lengths else []:
        # With nothing left to do a rank scores anything, to keep the others company (ZeRO 3 communicates in every forward).
        groups = [(rankings[i].prompt, rankings[i].answers) for i in part] or [([0], [[0]])]
        batch, last, cu_groups = pack_groups(groups).to(device_of(model))
        found = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.prefix, rows=last).tolist()
        bounds = cu_groups.tolist()
        scores |= {i: found[start:end] for i, start, end in zip(part, bounds, bounds[1:])}
    for others in [] if world is None else world.gather(scores):
        scores |= others
    return [scores[i] for i in range(len(rankings))]
