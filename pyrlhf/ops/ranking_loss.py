"""The pairwise ranking loss of reward models (Ouyang et al. 2022, arXiv:2203.02155, eq. 1) over groups of any size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_cu_seqlens, check_tensor
from pyrlhf.ops._core import address, core, cuda_core, faults, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define, eager_function

_FLOATS = (torch.float32, torch.float64)


class RankingStats(NamedTuple):
    """0-d float tensors without gradient, over all pairs of the call."""

    accuracy: Tensor  # share of pairs whose better answer scores higher, equal scores count one half; 0 without pairs
    pairs: Tensor
    groups: Tensor  # that have at least one pair


def ranking_loss_ref(scores: Tensor, cu_groups: Tensor, ranks: Tensor) -> tuple[Tensor, RankingStats]:
    """`ranking_loss` in plain PyTorch, one group after another."""
    losses, correct, pairs = [], scores.new_zeros(()), scores.new_zeros(())
    bounds = cu_groups.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        s, r = scores[first:last], ranks[first:last]
        better = r[:, None] < r[None, :]
        margins = (s[:, None] - s[None, :])[better]
        if margins.numel() == 0:
            continue
        losses.append(torch.nn.functional.softplus(-margins).mean())
        correct = correct + (margins > 0).sum() + 0.5 * (margins == 0).sum()
        pairs = pairs + margins.numel()
    loss = torch.stack(losses).mean() if losses else scores.sum() * 0.0
    return loss, RankingStats(correct / pairs.clamp(min=1), pairs, scores.new_tensor(float(len(losses))))


def ranking_loss(scores: Tensor, cu_groups: Tensor, ranks: Tensor) -> tuple[Tensor, RankingStats]:
    """Mean over groups that have a pair of the mean over its pairs of softplus(-(s_better - s_worse)).

    For K answers without ties that is InstructGPT's -1/C(K,2) sum log sigmoid. Equal ranks make no pair.

    scores: float32 (float64 through the reference) ``[A]``, one an answer; cu_groups: int32 ``[G + 1]``, group g is the answers
    ``[cu_groups[g], cu_groups[g + 1])``; ranks: int32 ``[A]``, lower is better. Returns the 0-d loss, differentiable once in
    scores, and the statistics. Raises TypeError or ValueError naming the argument with a wrong dtype, shape, device or value.
    """
    check_tensor("ranking_loss", "scores", scores, shape=(None,), dtype=_FLOATS)
    check_tensor("ranking_loss", "cu_groups", cu_groups, shape=(None,), dtype=torch.int32, device=scores.device)
    check_tensor("ranking_loss", "ranks", ranks, shape=scores.shape, dtype=torch.int32, device=scores.device)
    if not use_core(scores) and not use_cuda_core(scores):
        check_cu_seqlens("ranking_loss", "cu_groups", cu_groups, scores.shape[0])
        return ranking_loss_ref(scores, cu_groups, ranks)
    op = _op if torch.compiler.is_compiling() else _eager
    loss, stats, _ = op(scores, cu_groups, ranks)
    return loss, RankingStats(*stats.unbind())


def _ranking_loss(scores: Tensor, cu_groups: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_cu_seqlens("ranking_loss", "cu_groups", cu_groups, scores.shape[0])
    inputs = (scores.contiguous(), cu_groups.contiguous(), ranks.contiguous())
    outputs = (torch.empty_like(scores), scores.new_empty(()), scores.new_empty(3))
    groups, addresses, results = cu_groups.shape[0] - 1, map(address, inputs), map(address, outputs)
    if use_core(scores):
        core().ranking_loss(*addresses, groups, *results, torch.get_num_threads())
    else:
        sums = scores.new_empty(cuda_core().ranking_sums * groups, dtype=torch.float64)
        sizes, end = (groups, scores.shape[0]), (address(sums), faults(scores), *queue(scores))
        cuda_core().ranking_loss(*addresses, *sizes, *results, *end)
    by_score, loss, stats = outputs
    return loss, stats, by_score


def _fake(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scores.new_empty(()), scores.new_empty(3), scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
    (by_score,) = ctx.saved_tensors
    return None if grad_loss is None else by_score * grad_loss, None, None


_op = define(
    "ranking_loss(Tensor scores, Tensor cu_groups, Tensor ranks) -> (Tensor, Tensor, Tensor)",
    _ranking_loss,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
_eager = eager_function(_ranking_loss, _setup_context, _backward)
