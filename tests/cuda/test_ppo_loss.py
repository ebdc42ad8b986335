"""The CUDA kernel of ppo_loss: values, gradients and statistics against float64, and against everything that changes bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ppo_cases import OPTIONS, run, tokens
from torch import Tensor

from pyrlhf.ops import ppo_loss, ppo_loss_ref

# around a thread's packs of 4, its second pack (1024), and the blocks of 2048
SIZES = [0, 1, 3, 4, 5, 1023, 1029, 2048, 2049, 6147]


def on(device: torch.device, inputs: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in inputs]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_float64_reference(
    device: torch.device, poison: None, n: int, options: dict[str, Any], weighted: bool
) -> None:
    inputs = tokens(n)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(9)) / max(1, n) if weighted else None
    exact_weights = None if weights is None else weights.double()
    exact = run(ppo_loss_ref, [t.double() for t in inputs], weights=exact_weights, **options)
    plain = run(ppo_loss_ref, inputs, weights=weights, **options)
    found = run(ppo_loss, on(device, inputs), weights=None if weights is None else weights.to(device), **options)
    for out, ref, same_dtype in zip(found, exact, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == ref.shape
        if out.numel():
            scale = 1 + float(ref.abs().max())
            assert (out - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 2e-7 * scale


def one(device: torch.device, ratio: float, advantage: float, **options: Any) -> tuple[float, float, float]:
    """Policy loss, its gradient and the clip fraction of one token."""
    logprob = torch.tensor([math.log(ratio)], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    out = ppo_loss(logprob, zero, torch.tensor([advantage], device=device), zero, zero, zero, **options)
    out.policy.backward()
    return out.policy.item(), logprob.grad.item(), out.stats.clip_fraction.item()


def test_the_clip_stops_only_moves_that_would_profit(device: torch.device) -> None:
    assert one(device, 1.5, 2.0) == pytest.approx((-2.4, 0.0, 1.0))  # up and good: bounded
    assert one(device, 0.5, 2.0) == pytest.approx((-1.0, -1.0, 0.0))  # down and good: pulled back
    assert one(device, 1.5, -2.0) == pytest.approx((3.0, 3.0, 0.0))  # up and bad: pulled back
    assert one(device, 0.5, -2.0) == pytest.approx((1.6, 0.0, 1.0))  # down and bad: bounded
    assert one(device, 5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0, 1.0))  # dual clip: capped
    assert one(device, 2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0, 0.0))  # below the cap


def test_equal_policies_have_ratio_one_and_no_divergence(device: torch.device) -> None:
    x = on(device, tokens(3000))
    stats = ppo_loss(x[0], x[0], *x[2:]).stats
    assert stats.ratio_mean.item() == pytest.approx(1, abs=1e-6)
    assert [stats.ratio_max.item(), stats.approx_kl.item(), stats.clip_fraction.item()] == [1, 0, 0]


@pytest.mark.parametrize("step", [1e-5, 1e-3, 0.1, 0.346, 0.347, 0.499, 2.0, -1e-4, -0.3466, -3.0, -60.0])
def test_small_divergences_do_not_cancel(device: torch.device, step: float) -> None:
    zero, moved = torch.zeros(100, device=device), torch.full((100,), step, device=device)
    expected = math.expm1(float(moved[0])) - float(moved[0])
    out = ppo_loss(moved, zero, zero, zero, zero, zero)
    assert out.stats.approx_kl.item() == pytest.approx(expected, rel=5e-6)


def test_far_ratios_are_infinite_or_zero(device: torch.device) -> None:
    zero = torch.zeros(1, device=device)
    for step, expected in ((100.0, math.inf), (88.0, math.exp(88.0)), (-120.0, 0.0), (-95.0, math.exp(-95.0))):
        ratio = ppo_loss(zero + step, zero, zero, zero, zero, zero).stats.ratio_max.item()
        assert ratio == pytest.approx(expected, rel=1e-5, abs=2e-45)


def test_weights_scale_and_silence_tokens(device: torch.device) -> None:
    x = on(device, tokens(3000))
    weights = torch.rand(3000, device=device)
    weights[1000:] = 0
    whole, part = run(ppo_loss, x, weights=weights), run(ppo_loss, [t[:1000] for t in x], weights=weights[:1000])
    for a, b in zip(whole[:7], part[:7], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(whole[7:], part[7:], strict=True):
        assert torch.equal(a[:1000], b)
        assert not a[1000:].any()


@pytest.mark.parametrize("n", [100, 2500])
def test_not_a_number_is_seen_and_stays_with_its_token(device: torch.device, n: int) -> None:
    for at in (0, 3):
        x = tokens(n)
        x[at][n // 2] = torch.nan
        policy, value, kl, *_, ratio_mean, ratio_max, by_logprob, by_value = run(ppo_loss, on(device, x))
        assert [bool(t.isnan()) for t in (policy, kl, ratio_mean, ratio_max)] == [at == 0] * 4
        assert bool(value.isnan()) == (at == 3)
        gradient = by_logprob if at == 0 else by_value
        assert gradient.isnan().nonzero().flatten().tolist() == [n // 2]
    x = tokens(n)
    x[4][n // 2] = torch.nan  # old values are not looked at without a value clip
    assert ppo_loss(*on(device, x), value_clip=None).value.isfinite()


@pytest.mark.parametrize("n", [5, 2048, 2050])
def test_a_slice_that_begins_anywhere_gives_the_same_bits(device: torch.device, n: int) -> None:
    x = on(device, tokens(n))
    weights = torch.rand(n, device=device)
    expected = run(ppo_loss, x, weights=weights)
    for shift in (1, 2, 3):
        for which in (range(7), (shift,), (6,)):
            moved = [
                torch.cat([t.new_zeros(shift), t])[shift:] if i in which else t for i, t in enumerate([*x, weights])
            ]
            leaves = [
                t.detach().requires_grad_(i in (0, 3)) for i, t in enumerate(moved)
            ]  # no clone: it would be aligned
            out = ppo_loss(*leaves[:6], weights=leaves[6])
            (out.policy + 0.3 * out.value).backward()
            found = [out.policy, out.value, *out.stats, leaves[0].grad, leaves[3].grad]
            assert equal([t.detach().cpu() for t in found], expected)


def test_bits_do_not_depend_on_the_run_and_gradients_not_on_the_other_tokens(device: torch.device) -> None:
    x = on(device, tokens(4500))
    weights = torch.rand(4500, device=device)
    first = run(ppo_loss, x, weights=weights)
    assert all(equal(run(ppo_loss, x, weights=weights), first) for _ in range(4))
    part = run(ppo_loss, [t[2000:2101].clone() for t in x], weights=weights[2000:2101].clone())
    assert equal(part[7:], [t[2000:2101] for t in first[7:]])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 200),
    st.integers(0, 99),
    st.floats(0.01, 2.0),
    st.one_of(st.none(), st.floats(0.01, 2.0)),
    st.one_of(st.none(), st.floats(1.01, 4.0)),
)
def test_any_options(
    device: torch.device, n: int, seed: int, clip: float, value_clip: float | None, dual_clip: float | None
) -> None:
    x = tokens(n, seed)
    options = {"clip": clip, "value_clip": value_clip, "dual_clip": dual_clip}
    # The clips are compared in float32 by both: the same tokens are clipped.
    for a, b in zip(run(ppo_loss, on(device, x), **options), run(ppo_loss_ref, x, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strided_inputs_are_read_right(device: torch.device) -> None:
    x = on(device, tokens(300))
    strided, dense = ppo_loss(*torch.stack(x, 1).unbind(1)), ppo_loss(*x)
    assert equal([strided.policy, strided.value], [dense.policy, dense.value])


def test_only_what_needs_a_gradient_gets_one(device: torch.device) -> None:
    x = on(device, tokens(50))
    x[0].requires_grad_()
    out = ppo_loss(*x)
    (out.policy + out.value).backward()
    assert x[0].grad is not None
    assert x[3].grad is None
    with torch.no_grad():
        assert not ppo_loss(*x).policy.requires_grad


def test_registration_and_compilation(device: torch.device) -> None:
    x = on(device, tokens(40))
    for at in (0, 3):
        x[at].requires_grad_()
    for weights in (None, torch.rand(40, device=device)):
        torch.library.opcheck(torch.ops.pyrlhf.ppo_loss.default, (*x, weights, 0.2, math.inf, 2.0))

    def loss(*inputs: Tensor) -> Tensor:
        out = torch.ops.pyrlhf.ppo_loss(*inputs, None, 0.2, 0.2, math.inf)
        return out[0] + out[1] + out[2][0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(loss(*x), (x[0], x[3]))
    assert equal(torch.autograd.grad(compiled(*x), (x[0], x[3])), eager_grads)
    assert torch.equal(compiled(*x), loss(*x))
