"""The CUDA kernel of gae against float64, and against everything that a batch can do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import as_good_as, equal, offsets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import gae, gae_ref

# around the chunks of a warp (128 tokens) and the rounds of a block (2048), with empty sequences between
LENGTHS = [[1], [1023], [2047], [5, 0, 1, 300, 17, 16, 0, 33, 129], [0, 0], [], [3] * 200, [128, 127, 4096, 6145]]


def packed(lengths: list[int], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu = offsets(lengths)
    rewards, values = (torch.randn(int(cu[-1]), generator=generator) for _ in range(2))
    return (
        rewards.to(device),
        values.to(device),
        cu.to(device),
        torch.randn(len(lengths), generator=generator).to(device),
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths, default=0)}")
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_matches_the_float64_reference(
    device: torch.device, poison: None, lengths: list[int], gamma: float, lam: float, bootstrapped: bool
) -> None:
    rewards, values, cu, after = (t.cpu() for t in packed(lengths, device))
    bootstrap = after if bootstrapped else None
    truth = gae_ref(
        rewards.double(), values.double(), cu, gamma=gamma, lam=lam, bootstrap=after.double() if bootstrapped else None
    )
    plain = gae_ref(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=bootstrap)
    found = gae(
        rewards.to(device),
        values.to(device),
        cu.to(device),
        gamma=gamma,
        lam=lam,
        bootstrap=None if bootstrap is None else bootstrap.to(device),
    )
    for out, ref, same_dtype in zip(found, truth, plain, strict=True):
        assert out.dtype == torch.float32
        assert out.shape == rewards.shape
        if len(out):
            assert (out.cpu() - ref).abs().max() <= 2 * (same_dtype - ref).abs().max() + 1e-6


def test_bits_depend_neither_on_the_other_sequences_nor_on_the_run(device: torch.device) -> None:
    lengths = [37, 0, 1100, 5, 128, 2000, 1]
    rewards, values, cu, after = packed(lengths, device)
    whole = gae(rewards, values, cu, bootstrap=after)
    bounds = cu.tolist()
    for s, length in enumerate(lengths):
        rows = slice(bounds[s], bounds[s + 1])
        alone = gae(rewards[rows], values[rows], offsets([length]).to(device), bootstrap=after[s : s + 1])
        assert equal(alone, [t[rows] for t in whole])
    assert all(equal(gae(rewards, values, cu, bootstrap=after), whole) for _ in range(5))


@pytest.mark.parametrize("length", [513, 2048, 2177, 6145])
@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_a_warp_and_a_block_give_a_sequence_the_same_bits(device: torch.device, length: int, gamma: float) -> None:
    # Alone a block takes it, among many short ones a warp.
    crowd = [1] * (length // 256)
    rewards, values, cu, after = packed([*crowd, length, *crowd], device)
    among = gae(rewards, values, cu, bootstrap=after, gamma=gamma)
    rows = slice(len(crowd), len(crowd) + length)
    one = after[len(crowd) : len(crowd) + 1]
    alone = gae(rewards[rows], values[rows], offsets([length]).to(device), bootstrap=one, gamma=gamma)
    assert equal(alone, [t[rows] for t in among])


@pytest.mark.parametrize("lengths", [[700, 1300], [3, 129] * 20], ids=["blocks", "warps"])
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda cu: [0, -1], id="starts below 0"),
        pytest.param(lambda cu: [0, 1], id="starts above 0"),
        pytest.param(lambda cu: [1, -5], id="leaves the tokens below"),
        pytest.param(lambda cu: [1, cu[-1] + 1], id="leaves the tokens above"),
        pytest.param(lambda cu: [-1, cu[-1] + 9], id="ends above"),
        pytest.param(lambda cu: [-1, cu[-1] - 2], id="ends below"),
        pytest.param(lambda cu: [-1, -(2**31)], id="ends far below"),
        pytest.param(lambda cu: [-2, 2**31 - 1], id="far above"),
    ],
)
def test_broken_offsets_are_flagged_and_whole_sequences_go_on(
    device: torch.device, raised: Any, poison: None, lengths: list[int], broken: Callable[[list[int]], list[int]]
) -> None:
    rewards, values, cu, _ = packed(lengths, device)
    expected = gae(rewards, values, cu)
    assert raised() is None
    bounds = cu.tolist()
    at, found = broken(bounds)
    wrong = bounds.copy()
    wrong[at] = found
    advantages, _ = gae(rewards, values, torch.tensor(wrong, dtype=torch.int32, device=device))
    message = raised()
    assert message is not None
    assert "gae: cu_seqlens must rise from 0" in message
    for first, last, same_first, same_last in zip(bounds, bounds[1:], wrong, wrong[1:], strict=False):
        if (first, last) == (same_first, same_last):
            assert torch.equal(advantages[first:last], expected[0][first:last])


def test_tokens_without_a_sequence_are_flagged(device: torch.device, raised: Any) -> None:
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    gae(torch.ones(3, device=device), torch.ones(3, device=device), cu)
    assert "gae: cu_seqlens" in (raised() or "")


def test_values_are_checked_first_on_request(
    device: torch.device, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    rewards, values, _, _ = packed([9], device)
    with pytest.raises(ValueError, match="gae: cu_seqlens must not decrease, found 5 then 3 at index 2"):
        gae(rewards, values, torch.tensor([0, 5, 3, 9], dtype=torch.int32, device=device))


def test_a_slice_that_begins_anywhere_gives_the_same_bits(device: torch.device) -> None:
    rewards, values, cu, after = packed([300, 41], device)
    expected = gae(rewards, values, cu, bootstrap=after)
    for shift in (1, 2, 3):
        moved = [torch.cat([t.new_zeros(shift), t])[shift:] for t in (rewards, values)]
        assert equal(gae(*moved, cu, bootstrap=after), expected)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_any_lengths(device: torch.device, lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    rewards, values, cu, after = packed(lengths, device, seed)
    found = gae(rewards, values, cu, gamma=gamma, lam=lam, bootstrap=after)
    given = [t.cpu() for t in (rewards, values)]
    exact = gae_ref(*(t.double() for t in given), cu.cpu(), gamma=gamma, lam=lam, bootstrap=after.double().cpu())
    # Near 1 the rounding of gamma * lam to float32 alone errs by 3e-5 after 200 tokens: the yardstick is float32 itself.
    plain = gae_ref(*given, cu.cpu(), gamma=gamma, lam=lam, bootstrap=after.cpu())
    as_good_as([t.cpu() for t in found], plain, exact, tiny=2e-6)
