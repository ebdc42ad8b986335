"""KL estimators against the exact divergence, and the controller."""

from __future__ import annotations

import math

import pytest
import torch

from pyrlhf.rlhf import KLController, kl_estimate


def test_estimators_average_to_the_exact_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    q = (p + 0.2 * torch.randn(7, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    expectation = {kind: (p.exp() * kl_estimate(p, q, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expectation["k1"], exact)
    torch.testing.assert_close(expectation["k3"], exact)
    assert abs(expectation["k2"] - exact) < 0.1 * exact  # biased, by a term of third order
    assert (kl_estimate(p, q, "k3") >= 0).all()


def test_k3_is_exact_near_zero() -> None:
    d = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(d.float(), torch.zeros(2), "k3").double(), d**2 / 2, rtol=1e-2, atol=0)


def test_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_adaptive_controller_moves_towards_its_target_with_a_clipped_error() -> None:
    controller = KLController(target=6.0, horizon=1000)
    assert controller.next(0.1, 60.0, episodes=100) == pytest.approx(0.1 * (1 + 0.2 * 100 / 1000))
    assert controller.next(0.3, 5.4, episodes=100) == pytest.approx(0.3 * (1 - 0.1 * 100 / 1000))
    assert controller.next(0.3, math.nan, episodes=100) == 0.3
    assert controller.next(0.3, 0.0, episodes=100_000) == 0.0  # never negative, whatever the batch


def test_fixed_controller_stays() -> None:
    assert KLController().next(0.02, 100.0, episodes=512) == 0.02


@pytest.mark.parametrize("bad", [{"target": 0.0}, {"target": -1.0}, {"target": math.nan}, {"horizon": 0}])
def test_wrong_settings_are_refused(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=f"kl_{name}: expected .* found"):
        KLController(**bad)  # type: ignore[arg-type]
