"""Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16) over packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_cu_seqlens, check_number, check_tensor
from pyrlhf.ops._core import address, core, cuda_core, faults, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define

_FLOATS = (torch.float32, torch.float64)


def gae_ref(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gae` in plain PyTorch, one step of time over all sequences at once."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    filled = lengths > 0
    next_values = torch.cat([values[1:], values.new_zeros(min(1, len(values)))])
    after = values.new_zeros(len(lengths)) if bootstrap is None else bootstrap
    next_values[ends[filled] - 1] = after[filled]
    deltas = rewards + gamma * next_values - values
    advantages, carry = torch.zeros_like(deltas), deltas.new_zeros(len(lengths))
    for back in range(1, int(lengths.max()) + 1 if len(lengths) else 1):
        alive = lengths >= back
        at = ends[alive] - back
        carry[alive] = deltas[at] + gamma * lam * carry[alive]
        advantages[at] = carry[alive]
    return advantages, advantages + values


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed sequences.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V. The value after a sequence's last
    token is 0, or ``bootstrap[s]`` where the sequence was cut off. No gradient flows through it.

    rewards, values: float32 (float64 through the reference) ``[T]``; cu_seqlens: int32 ``[S + 1]``; bootstrap: ``[S]`` or None;
    gamma, lam in [0, 1]. Returns advantages ``[T]`` and returns ``[T]``.
    Raises TypeError or ValueError naming the argument that has a wrong dtype, shape, device or value.
    """
    check_tensor("gae", "rewards", rewards, shape=(None,), dtype=_FLOATS)
    check_tensor("gae", "values", values, shape=rewards.shape, dtype=rewards.dtype, device=rewards.device)
    check_tensor("gae", "cu_seqlens", cu_seqlens, shape=(None,), dtype=torch.int32, device=rewards.device)
    if bootstrap is not None:
        sequences = cu_seqlens.shape[0] - 1
        check_tensor("gae", "bootstrap", bootstrap, shape=(sequences,), dtype=rewards.dtype, device=rewards.device)
    check_number("gae", "gamma", gamma, low=0.0, high=1.0)
    check_number("gae", "lam", lam, low=0.0, high=1.0)
    bootstrap = None if bootstrap is None else bootstrap.detach()
    advantages, returns = _op(rewards.detach(), values.detach(), cu_seqlens, bootstrap, gamma, lam)
    return advantages, returns


def _gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, bootstrap: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    check_cu_seqlens("gae", "cu_seqlens", cu_seqlens, rewards.shape[0])
    cpu = use_core(rewards, values, bootstrap)
    if not cpu and not use_cuda_core(rewards, values, bootstrap):
        return gae_ref(rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    sequences = cu_seqlens.shape[0] - 1
    tensors = [address(t) for t in (rewards, values, cu_seqlens, bootstrap, advantages, returns)]
    if cpu:
        core().gae(*tensors, sequences, gamma, lam, torch.get_num_threads())
    else:
        cuda_core().gae(*tensors, sequences, rewards.shape[0], gamma, lam, faults(rewards), *queue(rewards))
    return advantages, returns


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


_op = define(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? bootstrap, float gamma, float lam) -> (Tensor, Tensor)",
    _gae,
    _fake,
)
