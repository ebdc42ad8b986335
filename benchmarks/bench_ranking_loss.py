"""ranking_loss, forward and backward, on 64 prompts of 9 answers, against a loop over pairs and a loop over prompts. On a GPU also
on 16,384 prompts of 64 answers, and against all pairs of all prompts at once, which needs prompts with equally many answers.

Target: 10 times faster than the loop over pairs; of the large batch on a GPU: as fast as torch.compile of all pairs at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import DEVICE, ON_GPU, Candidate, report
from torch import Tensor

from pyrlhf import ops


def loop_over_pairs(scores: Tensor, cu: Tensor, ranks: Tensor) -> Tensor:
    losses = []
    bounds, order = cu.tolist(), ranks.tolist()
    for first, last in zip(bounds, bounds[1:]):
        pairs = [
            -torch.nn.functional.logsigmoid(scores[i] - scores[j])
            for i in range(first, last)
            for j in range(first, last)
            if order[i] < order[j]
        ]
        losses.append(torch.stack(pairs).mean())
    return torch.stack(losses).mean()


def all_pairs(scores: Tensor, ranks: Tensor, answers: int) -> Tensor:
    """[prompts, answers, answers] at once."""
    s, r = scores.view(-1, answers), ranks.view(-1, answers)
    better = r[:, :, None] < r[:, None, :]
    losses = torch.nn.functional.softplus(s[:, None, :] - s[:, :, None]) * better
    return (losses.sum((1, 2)) / better.sum((1, 2))).mean()


def step(loss: Callable[[], Tensor], scores: Tensor) -> Callable[[], None]:
    def run() -> None:
        scores.grad = None
        loss().backward()

    return run


def measure(prompts: int, answers: int, loops: bool, aims: dict[str, float]) -> None:
    scores = torch.randn(prompts * answers, device=DEVICE, requires_grad=True)
    cu = torch.arange(0, prompts * answers + 1, answers, dtype=torch.int32, device=DEVICE)
    ranks = torch.rand(prompts, answers, device=DEVICE).argsort(1).int().flatten()
    candidates = {"pyrlhf": Candidate(step(lambda: ops.ranking_loss(scores, cu, ranks)[0], scores))}
    if loops:
        torch.testing.assert_close(ops.ranking_loss(scores, cu, ranks)[0], loop_over_pairs(scores, cu, ranks))
        candidates |= {
            "ranking_loss_ref (torch)": Candidate(step(lambda: ops.ranking_loss_ref(scores, cu, ranks)[0], scores)),
            "loop over pairs": Candidate(step(lambda: loop_over_pairs(scores, cu, ranks), scores)),
        }
    if ON_GPU:
        torch.testing.assert_close(ops.ranking_loss(scores, cu, ranks)[0], all_pairs(scores, ranks, answers))
        compiled = torch.compile(all_pairs)
        candidates |= {
            "torch eager, all pairs at once": Candidate(step(lambda: all_pairs(scores, ranks, answers), scores)),
            "torch.compile, all pairs at once": Candidate(step(lambda: compiled(scores, ranks, answers), scores)),
        }
    case = f"{prompts} prompts x {answers} answers, float32, forward and backward"
    report("ranking_loss", case, candidates, ours="pyrlhf", aims=aims, budget=8.0 if ON_GPU else 60.0)


def main() -> None:
    torch.manual_seed(0)
    measure(64, 9, True, {"loop over pairs": 10.0})
    if ON_GPU:
        measure(16_384, 64, False, {"torch.compile, all pairs at once": 1.0})


if __name__ == "__main__":
    main()
