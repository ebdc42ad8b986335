"""ppo_loss: values, gradients and statistics against float64, other projects' numbers, and the edges of each clip."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import equal
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_cases import OPTIONS, run, tokens
from torch import Tensor

from pyrlhf.ops import ppo_loss, ppo_loss_ref

SIZES = [0, 1, 15, 16, 17, 1023, 2048, 2049, 10007]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_the_float64_reference(isa: str, n: int, options: dict[str, Any], weighted: bool) -> None:
    inputs = tokens(n)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(9)) / max(1, n) if weighted else None
    exact = run(
        ppo_loss_ref, [t.double() for t in inputs], weights=None if weights is None else weights.double(), **options
    )
    plain = run(ppo_loss_ref, inputs, weights=weights, **options)
    for out, ref, same_dtype in zip(run(ppo_loss, inputs, weights=weights, **options), exact, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == ref.shape
        if out.numel():
            scale = 1 + float(ref.abs().max())
            assert (out - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 2e-7 * scale


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_has_the_gradients_of_its_values(options: dict[str, Any]) -> None:
    inputs = [t.double() for t in tokens(40)]

    def losses(logprobs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out = ppo_loss_ref(logprobs, *inputs[1:3], values, *inputs[4:], **options)
        return out.policy, out.value

    assert torch.autograd.gradcheck(losses, (inputs[0].requires_grad_(), inputs[3].requires_grad_()))


def test_rlax_clipped_surrogate(isa: str, shared_data: Callable[[str], Path]) -> None:
    case = json.loads((shared_data("golden_rl") / "golden_rl.json").read_text())["rlax_clipped_surrogate"]
    actions = torch.tensor(case["actions"])[:, None]
    new, old = (
        torch.tensor(case[name], dtype=torch.float32).log_softmax(1).gather(1, actions)[:, 0]
        for name in ("logits", "old_logits")
    )
    zero = torch.zeros(3)
    for advantages, expected in zip(case["advantages"], case["expected_mean_loss"], strict=True):
        out = ppo_loss(new, old, torch.tensor(advantages), zero, zero, zero, clip=case["epsilon"])
        assert float(out.policy) == pytest.approx(expected, abs=case["atol"])


def one(ratio: float, advantage: float, **options: Any) -> tuple[float, float, float]:
    """Policy loss, its gradient and the clip fraction of one token."""
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    zero = torch.zeros(1)
    out = ppo_loss(logprob, zero, torch.tensor([advantage]), zero, zero, zero, **options)
    out.policy.backward()
    return out.policy.item(), logprob.grad.item(), out.stats.clip_fraction.item()


def test_the_clip_stops_only_moves_that_would_profit(isa: str) -> None:
    assert one(1.5, 2.0) == pytest.approx((-2.4, 0.0, 1.0))  # up and good: bounded
    assert one(0.5, 2.0) == pytest.approx((-1.0, -1.0, 0.0))  # down and good: pulled back
    assert one(1.5, -2.0) == pytest.approx((3.0, 3.0, 0.0))  # up and bad: pulled back
    assert one(0.5, -2.0) == pytest.approx((1.6, 0.0, 1.0))  # down and bad: bounded
    assert one(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0, 1.0))  # dual clip: capped
    assert one(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0, 0.0))  # below the cap
    assert one(5.0, 2.0, dual_clip=3.0) == pytest.approx((-2.4, 0.0, 1.0))  # the cap is for A < 0
    assert one(1.0, 2.0) == pytest.approx((-2.0, -2.0, 0.0))


def test_equal_policies_have_ratio_one_and_no_divergence(isa: str) -> None:
    x = tokens(5000)
    out = ppo_loss(x[0], x[0], *x[2:])
    assert out.stats.ratio_mean.item() == pytest.approx(1, abs=1e-6)
    assert out.stats.ratio_max.item() == 1
    assert out.stats.approx_kl.item() == 0
    assert out.stats.clip_fraction.item() == 0


@pytest.mark.parametrize("step", [1e-5, 1e-3, 0.1, 0.499, 0.501, 2.0])
def test_small_divergences_do_not_cancel(isa: str, step: float) -> None:
    zero, moved = torch.zeros(100), torch.full((100,), step)
    expected = math.expm1(float(moved[0])) - float(moved[0])
    out = ppo_loss(moved, zero, zero, zero, zero, zero)
    assert out.stats.approx_kl.item() == pytest.approx(expected, rel=5e-6)


def test_weights_scale_and_silence_tokens(isa: str) -> None:
    x = tokens(3000)
    weights = torch.rand(3000)
    weights[1000:] = 0
    whole, part = run(ppo_loss, x, weights=weights), run(ppo_loss, [t[:1000] for t in x], weights=weights[:1000])
    for a, b in zip(whole[:7], part[:7], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(whole[7:], part[7:], strict=True):
        assert torch.equal(a[:1000], b)
        assert not a[1000:].any()


def test_not_a_number_is_seen_and_stays_with_its_token(isa: str) -> None:
    for at in (0, 3):
        x = tokens(100)
        x[at][50] = torch.nan
        policy, value, *_, by_logprob, by_value = run(ppo_loss, x)
        assert bool(policy.isnan()) == (at == 0)
        assert bool(value.isnan()) == (at == 3)
        gradient = by_logprob if at == 0 else by_value
        assert gradient.isnan().nonzero().flatten().tolist() == [50]
    x = tokens(100)
    x[4][50] = torch.nan  # old values are not looked at without a value clip
    assert ppo_loss(*x, value_clip=None).value.isfinite()


def test_bits_depend_neither_on_threads_nor_on_the_run(
    isa: str, same_bits_for_any_threads: Callable[..., None]
) -> None:
    x = tokens(9_001)  # enough for more than one thread
    same_bits_for_any_threads(lambda: run(ppo_loss, x), repeats=334)


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(2051)
    expected = run(ppo_loss, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
        patch.setattr(
            Tensor, "new_empty", lambda t, shape: t.new_full(shape if isinstance(shape, tuple) else (shape,), torch.nan)
        )
        assert equal(run(ppo_loss, x), expected)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 200),
    st.integers(0, 99),
    st.floats(0.01, 2.0),
    st.one_of(st.none(), st.floats(0.01, 2.0)),
    st.one_of(st.none(), st.floats(1.01, 4.0)),
)
def test_any_options(n: int, seed: int, clip: float, value_clip: float | None, dual_clip: float | None) -> None:
    x = tokens(n, seed)
    options = {"clip": clip, "value_clip": value_clip, "dual_clip": dual_clip}
    # The clips are compared in float32 by both: the same tokens are clipped.
    for a, b in zip(run(ppo_loss, x, **options), run(ppo_loss_ref, x, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strided_inputs_are_read_right() -> None:
    x = tokens(300)
    wide = torch.stack(x, 1)
    strided, dense = ppo_loss(*wide.unbind(1)), ppo_loss(*x)
    assert torch.equal(strided.policy, dense.policy)
    assert torch.equal(strided.value, dense.value)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x = tokens(50)
    x[0].requires_grad_()
    out = ppo_loss(*x)
    (out.policy + out.value).backward()
    assert x[0].grad is not None
    assert x[3].grad is None
    with torch.no_grad():
        assert not ppo_loss(*x).policy.requires_grad


def test_wrong_inputs_are_named() -> None:
    x = tokens(8)
    with pytest.raises(TypeError, match="ppo_loss: logprobs must be float32 or float64, found bfloat16"):
        ppo_loss(x[0].bfloat16(), *x[1:])
    with pytest.raises(TypeError, match="ppo_loss: advantages must be float32, found float64"):
        ppo_loss(*x[:2], x[2].double(), *x[3:])
    with pytest.raises(ValueError, match=r"ppo_loss: returns must have shape \[8\], found \[7\]"):
        ppo_loss(*x[:5], x[5][:7])
    with pytest.raises(ValueError, match=r"ppo_loss: logprobs must have shape \[any\], found \[2, 4\]"):
        ppo_loss(*(t.view(2, 4) for t in x))
    with pytest.raises(ValueError, match="ppo_loss: weights must have shape"):
        ppo_loss(*x, weights=torch.ones(1))
    with pytest.raises(ValueError, match="ppo_loss: old_values must be on cpu"):
        ppo_loss(*x[:4], x[4].to("meta"), x[5])
    with pytest.raises(ValueError, match="ppo_loss: clip"):
        ppo_loss(*x, clip=0.0)
    with pytest.raises(ValueError, match="ppo_loss: value_clip"):
        ppo_loss(*x, value_clip=-1.0)
    with pytest.raises(ValueError, match="ppo_loss: dual_clip"):
        ppo_loss(*x, dual_clip=1.0)


def test_registration_and_compilation() -> None:
    x = tokens(40)
    for at in (0, 3):
        x[at].requires_grad_()
    for weights in (None, torch.rand(40)):
        torch.library.opcheck(torch.ops.pyrlhf.ppo_loss.default, (*x, weights, 0.2, math.inf, 2.0))

    def loss(*inputs: Tensor) -> Tensor:
        out = ppo_loss(inputs[0] * 2, *inputs[1:])
        return out.policy + out.value + out.stats.approx_kl

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(loss(*x), (x[0], x[3]))
    compiled_grads = torch.autograd.grad(compiled(*x), (x[0], x[3]))
    assert torch.equal(compiled(*x), loss(*x))
    assert equal(compiled_grads, eager_grads)
