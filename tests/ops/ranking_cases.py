"""Inputs of ranking_loss and how they are run, for its tests on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from checking import offsets
from torch import Tensor

from pyrlhf.ops import RankingStats


def ranked(sizes: list[int], seed: int = 0, levels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu = offsets(sizes)
    total = int(cu[-1])
    return (
        3 * torch.randn(total, generator=generator),
        cu,
        torch.randint(-levels, levels, (total,), generator=generator, dtype=torch.int32),
    )


def run(
    function: Callable[..., tuple[Tensor, RankingStats]], scores: Tensor, cu: Tensor, ranks: Tensor
) -> list[Tensor]:
    """The loss, the statistics and the gradient of twice the loss."""
    leaf = scores.detach().clone().requires_grad_()
    loss, stats = function(leaf, cu, ranks)
    (2 * loss).backward()
    assert leaf.grad is not None
    assert not any(s.requires_grad for s in stats)
    return [x.detach().cpu() for x in (loss, *stats, leaf.grad)]
