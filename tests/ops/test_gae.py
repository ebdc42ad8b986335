"""gae against float64, against other projects' numbers, and against everything a batch can do to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import gae, gae_ref

LENGTHS = [[1], [2047], [5, 0, 1, 300, 17, 16, 0, 33, 1023], [0, 0], [], [3] * 1000]


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu[-1])
    return (
        torch.randn(total, generator=generator),
        torch.randn(total, generator=generator),
        cu,
        torch.randn(len(lengths), generator=generator),
    )


def textbook(rewards: list[float], values: list[float], after: float, gamma: float, lam: float) -> list[float]:
    """The defining sum of Schulman et al., A_t = sum_l (gamma lam)^l delta_{t+l}, term by term in Python floats."""
    v = [*values, after]
    deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths, default=0)}")
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_matches_the_float64_reference(
    isa: str, lengths: list[int], gamma: float, lam: float, bootstrapped: bool
) -> None:
    rewards, values, cu, after = packed(lengths)
    bootstrap = after if bootstrapped else None
    exact = gae_ref(
        rewards.double(), values.double(), cu, gamma=gamma, lam=lam, bootstrap=after.double() if bootstrapped else None
    )
    plain = gae_ref(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=bootstrap)
    for out, ref, same_dtype in zip(
        gae(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=bootstrap), exact, plain, strict=True
    ):
        assert out.dtype == torch.float32
        assert out.shape == rewards.shape
        if len(out):
            assert (out - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 1e-6


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_the_reference_is_the_textbook_sum(length: int) -> None:
    rewards, values, cu, after = (t.double() if t.is_floating_point() else t for t in packed([length, length]))
    advantages, returns = gae_ref(rewards, values, cu, gamma=0.97, lam=0.9, bootstrap=after)
    for s in range(2):
        rows = slice(s * length, (s + 1) * length)
        expected = textbook(rewards[rows].tolist(), values[rows].tolist(), float(after[s]), 0.97, 0.9)
        torch.testing.assert_close(advantages[rows], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(returns[rows], advantages[rows] + values[rows])


def golden(shared_data: Callable[[str], Path], name: str) -> dict:
    return json.loads((shared_data("golden_rl") / "golden_rl.json").read_text())[name]


@pytest.mark.parametrize("lam", ["1.0", "0.7", "0.4"])
def test_rlax_truncated_gae(isa: str, shared_data: Callable[[str], Path], lam: str) -> None:
    case = golden(shared_data, "rlax_truncated_gae")
    # rlax gives a discount a step: a 0 ends an episode there, so each run between zeros is a sequence of ours.
    for r, v, discount, expected in zip(
        case["r_t"], case["v_t"], case["discount_t"], case["expected"][lam], strict=True
    ):
        found = run_episodes(r, v[:-1], discount, v[-1], float(lam))
        assert found == pytest.approx(expected, abs=case["atol"])


def test_tfagents_gae(isa: str, shared_data: Callable[[str], Path]) -> None:
    case = golden(shared_data, "tfagents_gae")
    last = next(i for i, d in enumerate(case["discounts"]) if d == 0) + 1  # the second episode has another discount
    for rows in (slice(0, last), slice(last, None)):
        found = run_episodes(
            case["rewards"][rows], case["values"][rows], case["discounts"][rows], case["final_value"], case["lambda_"]
        )
        assert found == pytest.approx(case["expected"][rows], abs=1e-5)


def test_rlax_discounted_returns(isa: str, shared_data: Callable[[str], Path]) -> None:
    """lam = 1 and no values but the bootstrap; a discount a step becomes one by scaling rewards with what came before."""
    case = golden(shared_data, "rlax_discounted_returns")
    for r, discount, after, expected in zip(
        case["r_t"], case["discount_t"], case["bootstrap_v"], case["expected"], strict=True
    ):
        past = torch.tensor([1.0, *discount]).cumprod(0)  # [T + 1]
        rewards, cu = torch.tensor(r) * past[:-1], torch.tensor([0, len(r)], dtype=torch.int32)
        bootstrap = (past[-1] * after)[None]
        _, returns = gae(rewards, torch.zeros(len(r)), cu, gamma=1.0, lam=1.0, bootstrap=bootstrap)
        assert (returns / past[:-1]).tolist() == pytest.approx(expected, rel=case["rtol"])


def run_episodes(r: list[float], v: list[float], discount: list[float], final: float, lam: float) -> list[float]:
    ends = [t + 1 for t, d in enumerate(discount) if d == 0]
    bounds = [0, *ends] if ends and ends[-1] == len(r) else [0, *ends, len(r)]
    gamma = max(discount)
    bootstrap = [0.0 if discount[b - 1] == 0 else final for b in bounds[1:]]
    advantages, _ = gae(
        torch.tensor(r, dtype=torch.float32),
        torch.tensor(v, dtype=torch.float32),
        torch.tensor(bounds, dtype=torch.int32),
        gamma=gamma,
        lam=lam,
        bootstrap=torch.tensor(bootstrap, dtype=torch.float32),
    )
    return advantages.tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 70), max_size=9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_any_batch_of_sequences(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, cu, after = packed(lengths, seed)
    out = gae(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=after)
    ref = gae_ref(rewards.double(), values.double(), cu, gamma=gamma, lam=lam, bootstrap=after.double())
    for found, expected in zip(out, ref, strict=True):
        torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=2e-5)


def test_bits_depend_neither_on_the_other_sequences_nor_on_threads_nor_on_the_run(
    isa: str, same_bits_for_any_threads: Callable[..., None]
) -> None:
    lengths = [37, 0, 1024, 5, 16, 2000] * 6  # enough tokens for more than one thread
    rewards, values, cu, after = packed(lengths)
    whole = gae(rewards, values, cu, bootstrap=after)
    same_bits_for_any_threads(lambda: gae(rewards, values, cu, bootstrap=after), repeats=334)
    for s in (0, 2, 3, 5, 35):
        rows = slice(int(cu[s]), int(cu[s + 1]))
        alone = gae(rewards[rows], values[rows], torch.tensor([0, lengths[s]]).int(), bootstrap=after[s : s + 1])
        assert torch.equal(alone[0], whole[0][rows])
        assert torch.equal(alone[1], whole[1][rows])


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, values, cu, _ = packed([33, 0, 7, 129])
    expected = gae(rewards, values, cu)
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
    for found, wanted in zip(gae(rewards, values, cu), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_nan_stays_in_its_own_sequence_and_before_itself(isa: str) -> None:
    rewards, values, cu, _ = packed([40, 40, 40])
    rewards[60] = torch.nan
    advantages, _ = gae(rewards, values, cu)
    assert advantages[40:61].isnan().all()
    assert advantages[:40].isfinite().all()
    assert advantages[61:].isfinite().all()


def test_strided_inputs_are_read_right() -> None:
    rewards, values, cu, after = packed([20, 30])
    wide = torch.stack([rewards, values], 1)
    strided = gae(wide[:, 0], wide[:, 1], cu, bootstrap=after.repeat_interleave(2)[::2])
    for found, wanted in zip(strided, gae(rewards, values, cu, bootstrap=after), strict=True):
        assert torch.equal(found, wanted)


def test_wrong_inputs_are_named() -> None:
    rewards, values, cu, after = packed([4, 5])
    with pytest.raises(TypeError, match="gae: rewards must be float32 or float64, found bfloat16"):
        gae(rewards.bfloat16(), values, cu)
    with pytest.raises(TypeError, match="gae: values must be float32, found float64"):
        gae(rewards, values.double(), cu)
    with pytest.raises(ValueError, match=r"gae: values must have shape \[9\], found \[8\]"):
        gae(rewards, values[:8], cu)
    with pytest.raises(ValueError, match="gae: rewards must have shape"):
        gae(rewards.view(3, 3), values, cu)
    with pytest.raises(TypeError, match="gae: cu_seqlens must be int32, found int64"):
        gae(rewards, values, cu.long())
    with pytest.raises(ValueError, match="gae: cu_seqlens must end at the number of packed rows, 9, found 8"):
        gae(rewards, values, torch.tensor([0, 4, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="gae: cu_seqlens must not decrease"):
        gae(rewards, values, torch.tensor([0, 10, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="gae: cu_seqlens"):
        gae(rewards, values, torch.empty(0, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gae: bootstrap must have shape \[2\], found \[1\]"):
        gae(rewards, values, cu, bootstrap=after[:1])
    with pytest.raises(ValueError, match=r"gae: gamma must be in \[0.0, 1.0\], found 1.5"):
        gae(rewards, values, cu, gamma=1.5)
    with pytest.raises(ValueError, match="gae: lam"):
        gae(rewards, values, cu, lam=float("nan"))
    with pytest.raises(ValueError, match="gae: values must be on cpu"):
        gae(rewards, values.to("meta"), cu)


def test_registration_and_compilation() -> None:
    rewards, values, cu, after = packed([4, 5, 0, 40])
    torch.library.opcheck(torch.ops.pyrlhf.gae.default, (rewards, values, cu, after, 0.99, 0.95))
    torch.library.opcheck(torch.ops.pyrlhf.gae.default, (rewards, values, cu, None, 0.99, 0.95))
    compiled = torch.compile(lambda r, v, c: gae(r * 2, v, c, gamma=0.99)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values, cu), gae(rewards * 2, values, cu, gamma=0.99)[0] + 1)
    with pytest.raises(ValueError, match="cu_seqlens must end"):
        compiled(rewards, values, torch.tensor([0, 4, 9, 9, 48], dtype=torch.int32))
