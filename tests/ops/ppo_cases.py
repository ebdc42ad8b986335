"""Inputs of ppo_loss and how they are run, for its tests on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrlhf.ops import PPOLoss

OPTIONS = [
    {},
    {"clip": 0.1, "value_clip": 0.05},
    {"value_clip": None},
    {"dual_clip": 1.5},
    {"value_clip": None, "dual_clip": 3.0, "clip": 0.3},
]


def tokens(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, generator=generator) for _ in range(6)]
    x[1] = x[0] + 0.5 * torch.randn(n, generator=generator)
    x[4] = x[3] + 0.3 * torch.randn(n, generator=generator)
    return x


def run(function: Callable[..., PPOLoss], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Losses, statistics and the gradients of policy + 0.3 value by logprobs and values."""
    leaves = [t.detach().clone().requires_grad_(i in (0, 3)) for i, t in enumerate(inputs)]
    out = function(*leaves, **options)
    (out.policy + 0.3 * out.value).backward()
    assert all(leaves[i].grad is None for i in (1, 2, 4, 5))
    assert not any(s.requires_grad for s in out.stats)
    return [x.detach().cpu() for x in (out.policy, out.value, *out.stats, leaves[0].grad, leaves[3].grad)]
