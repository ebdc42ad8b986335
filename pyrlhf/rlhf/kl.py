"""KL divergence between policy and reference, estimated on the policy's own samples, and the controller of its coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

#: Largest relative error the adaptive controller reacts to (Ziegler et al. 2019, section 2.2).
MAX_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) at tokens sampled from the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, can be negative), k2 = d² / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative). Source: J. Schulman, "Approximating KL divergence", 2020.

    Args:
        logprobs: float [N], log-probs under the policy, in nats.
        ref_logprobs: float [N], log-probs of the same tokens under the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        float [N], nats.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl_estimate: estimator must be 'k1', 'k2' or 'k3', found {estimator!r}")


@dataclass(frozen=True)
class KLController:
    """How the coefficient β of the KL penalty moves from update to update: not at all, or towards a target KL a response.

    Adaptive form (Ziegler et al. 2019, section 2.2): β ← β · (1 + clip(kl / target - 1, ±0.2) · episodes / horizon).

    Args:
        target: nats a response; None keeps β fixed.
        horizon: episodes in which a clipped error moves β by a fifth.
    """

    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.target is not None and not self.target > 0:
            raise ValueError(
                f"kl_target: expected more than 0 nats a response (or null for a fixed coefficient), found {self.target}"
            )
        if self.horizon < 1:
            raise ValueError(f"kl_horizon: expected at least 1 episode, found {self.horizon}")

    def next(self, coef: float, kl: float, episodes: int) -> float:
        """β after `episodes` responses whose mean summed KL was `kl` nats; a KL that is not a number leaves it as it is."""
        if self.target is None or math.isnan(kl):
            return coef
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        return max(0.0, coef * (1.0 + error * episodes / self.horizon))
