"""ranking_loss, forward and backward, on 64 prompts of 9 answers, against a loop over pairs and a loop over prompts.

Target on 2 cores: 10 times faster than the loop over pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Candidate, report
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


def step(loss: Callable[[], Tensor], scores: Tensor) -> Callable[[], None]:
    def run() -> None:
        scores.grad = None
        loss().backward()

    return run


def main(prompts: int = 64, answers: int = 9) -> None:
    torch.manual_seed(0)
    scores = torch.randn(prompts * answers, requires_grad=True)
    cu = torch.arange(0, prompts * answers + 1, answers, dtype=torch.int32)
    ranks = torch.cat([torch.randperm(answers, dtype=torch.int32) for _ in range(prompts)])
    torch.testing.assert_close(ops.ranking_loss(scores, cu, ranks)[0], loop_over_pairs(scores, cu, ranks))
    report(
        "ranking_loss",
        f"{prompts} prompts x {answers} answers, float32, forward and backward",
        {
            "pyrlhf": Candidate(step(lambda: ops.ranking_loss(scores, cu, ranks)[0], scores)),
            "ranking_loss_ref (torch)": Candidate(step(lambda: ops.ranking_loss_ref(scores, cu, ranks)[0], scores)),
            "loop over pairs": Candidate(step(lambda: loop_over_pairs(scores, cu, ranks), scores)),
        },
        ours="pyrlhf",
    )


if __name__ == "__main__":
    main()
