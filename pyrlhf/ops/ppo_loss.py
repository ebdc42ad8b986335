"""PPO's clipped policy loss and clipped value loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7) with everything PPO logs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_number, check_tensor
from pyrlhf.ops._core import address, core, cuda_core, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define, eager_function

_FLOATS = (torch.float32, torch.float64)


class PPOStats(NamedTuple):
    """0-d tensors without gradient: sums weighted like the losses, ratio_max the largest ratio of a token of non-zero weight."""

    approx_kl: Tensor  # r - 1 - log r (Schulman's k3), r = pi / pi_old
    clip_fraction: Tensor  # tokens whose policy gradient the clip (or dual clip) switched off
    value_clip_fraction: Tensor  # tokens whose value gradient the value clip switched off
    ratio_mean: Tensor
    ratio_max: Tensor


class PPOLoss(NamedTuple):
    """0-d losses, differentiable in logprobs (policy) and values (value), and the statistics."""

    policy: Tensor
    value: Tensor
    stats: PPOStats


def ppo_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    weights: Tensor | None = None,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    dual_clip: float | None = None,
) -> PPOLoss:
    """`ppo_loss` in plain PyTorch."""
    if weights is None:
        weights = torch.full_like(logprobs, 1.0 / max(1, logprobs.numel()))
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    plain, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    clipped = bounded > plain
    policy = torch.where(clipped, bounded, plain)
    if dual_clip is not None:
        cap = -dual_clip * advantages
        capped = (advantages < 0) & (policy > cap)
        policy, clipped = torch.where(capped, cap, policy), clipped | capped
    error = values - returns
    near = error if value_clip is None else values.clamp(old_values - value_clip, old_values + value_clip) - returns
    value_clipped = near.square() > error.square()
    squared = torch.where(value_clipped, near.square(), error.square())
    with torch.no_grad():
        stats = PPOStats(
            approx_kl=(weights * (log_ratio.expm1() - log_ratio)).sum(),
            clip_fraction=(weights * clipped).sum(),
            value_clip_fraction=(weights * value_clipped).sum(),
            ratio_mean=(weights * ratio).sum(),
            ratio_max=torch.cat([ratio.new_zeros(1), torch.where(weights != 0, ratio, 0.0)]).max(),
        )
    return PPOLoss((weights * policy).sum(), 0.5 * (weights * squared).sum(), stats)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    weights: Tensor | None = None,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    dual_clip: float | None = None,
) -> PPOLoss:
    """Both PPO losses, both gradients and the statistics in one pass over the tokens.

    policy = sum w max(-A r, -A clamp(r, 1 - clip, 1 + clip)), r = exp(logprobs - old_logprobs); with ``dual_clip`` c > 1 a token
    with A < 0 counts at most -c A (Ye et al. 2020, arXiv:1912.09729). value = 1/2 sum w max((V - R)^2, (clamp(V, V_old -
    value_clip, V_old + value_clip) - R)^2); ``value_clip=None`` turns that clip off.

    All tensors float32 (float64 through the reference) ``[N]`` on one device; weights default to 1/N. Differentiable, once, in
    logprobs and values. Raises TypeError or ValueError naming the argument that has a wrong dtype, shape, device or value.
    """
    others = (old_logprobs, advantages, values, old_values, returns)
    _check(logprobs, others, weights, clip, value_clip, dual_clip)
    if not use_core(logprobs, *others, weights) and not use_cuda_core(logprobs, *others, weights):
        return ppo_loss_ref(logprobs, *others, weights=weights, clip=clip, value_clip=value_clip, dual_clip=dual_clip)
    bound = math.inf if value_clip is None else value_clip
    cap = math.inf if dual_clip is None else dual_clip
    op = _op if torch.compiler.is_compiling() else _eager
    policy, value, stats, _, _ = op(logprobs, *others, weights, clip, bound, cap)
    return PPOLoss(policy, value, PPOStats(*stats.unbind()))


def _check(
    logprobs: Tensor,
    others: tuple[Tensor, ...],
    weights: Tensor | None,
    clip: float,
    value_clip: float | None,
    dual_clip: float | None,
) -> None:
    check_tensor("ppo_loss", "logprobs", logprobs, shape=(None,), dtype=_FLOATS)
    shape, dtype, device = logprobs.shape, logprobs.dtype, logprobs.device
    for name, t in zip(("old_logprobs", "advantages", "values", "old_values", "returns"), others, strict=True):
        check_tensor("ppo_loss", name, t, shape=shape, dtype=dtype, device=device)
    if weights is not None:
        check_tensor("ppo_loss", "weights", weights, shape=shape, dtype=dtype, device=device)
    check_number("ppo_loss", "clip", clip, low=0.0, high=math.inf, low_open=True)
    if value_clip is not None:
        check_number("ppo_loss", "value_clip", value_clip, low=0.0, high=math.inf, low_open=True)
    if dual_clip is not None:
        check_number("ppo_loss", "dual_clip", dual_clip, low=1.0, high=math.inf, low_open=True)


def _ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor | None,
    clip: float,
    value_clip: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if math.isinf(value_clip):
        old_values = values  # not looked at, whatever it holds
    given = (logprobs, old_logprobs, advantages, values, old_values, returns, weights)
    inputs = [None if t is None else t.contiguous() for t in given]
    policy, value, stats = logprobs.new_empty(()), logprobs.new_empty(()), logprobs.new_empty(5)
    outputs = (torch.empty_like(logprobs), torch.empty_like(logprobs), policy, value, stats)
    n = logprobs.shape[0]
    arguments = (*map(address, inputs), n, clip, value_clip, dual_clip, 1.0 / max(1, n), *map(address, outputs))
    if use_core(logprobs):
        core().ppo_loss(*arguments, torch.get_num_threads())
    else:
        cuda = cuda_core()
        rows = logprobs.new_empty(cuda.ppo_sums * -(-n // cuda.ppo_block), dtype=torch.float64)
        cuda.ppo_loss(*arguments, address(rows), *queue(logprobs))
    return policy, value, stats, outputs[0], outputs[1]


def _fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = logprobs.new_empty
    return like(()), like(()), like(5), like(logprobs.shape), like(logprobs.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(output[3], output[4])


def _backward(ctx: Any, grad_policy: Tensor | None, grad_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    by_logprob, by_value = ctx.saved_tensors
    return (
        None if grad_policy is None or not ctx.needs_input_grad[0] else by_logprob * grad_policy,
        None,
        None,
        None if grad_value is None or not ctx.needs_input_grad[3] else by_value * grad_value,
        *[None] * 6,
    )


_op = define(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor values, Tensor old_values, Tensor returns, "
    "Tensor? weights, float clip, float value_clip, float dual_clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ppo_loss,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
_eager = eager_function(_ppo_loss, _setup_context, _backward)
