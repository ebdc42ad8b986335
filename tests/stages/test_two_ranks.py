"""Ranks, ZeRO stages and token budgets change what a step costs, not what it does: the same weights after PPO-ptx, SFT and reward.

All that two ranks do runs in one pair of processes, started once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROLES = ("model", "ema", "critic")


@pytest.fixture(scope="module")
def two(house: tiny.House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of what two ranks trained."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tiny.__file__, str(house.folder), str(folder)]
    both = [
        subprocess.Popen(
            command, env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [p.returncode for p in both] == [0, 0], "\n".join(said)
    assert said[1] == ""  # only the main rank speaks
    return folder


@pytest.fixture(scope="module")
def one(house: tiny.House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of what one rank trained without ZeRO."""
    folder = tmp_path_factory.mktemp("one")
    tiny.train_all(house, folder, (0,))
    return folder


def assert_same(found: Path, expected: Path, start: Path, untrained: tuple[str, ...] = ()) -> None:
    """Equal within 1e-5 of each weight's size, although training moved the weights much further than that.

    `untrained` names weights that start at 0 and whose gradient is 0 in exact arithmetic; rounding's noise is all that they may hold.
    """
    ours, theirs, before = tiny.weights(found), tiny.weights(expected), tiny.weights(start)
    assert ours.keys() == theirs.keys()
    moved = 0.0
    for name, weight in theirs.items():
        if name in untrained:
            assert max(ours[name].abs().max(), weight.abs().max()) <= 1e-6
            continue
        error = (ours[name] - weight).norm() / weight.norm().clamp(min=1e-30)
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
        if name in before and before[name].any():
            moved = max(moved, float((weight - before[name]).norm() / before[name].norm()))
    assert moved > 1e-2


def assert_same_numbers(found: Path, expected: Path) -> None:
    """What was logged does not depend on it either (times and memory do, and what the main rank's share of a rollout took)."""
    own = ("stage", "time", "seconds", "tokens_per", "peak", "rollout", "mismatch", "calibration")
    ours, theirs = tiny.lines(found), tiny.lines(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name, value in b.items():
            if not name.startswith(own):
                assert a[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("role", ROLES)
def test_ppo_ptx_of_two_ranks_is_that_of_one(
    house: tiny.House, one: Path, two: Path, role: str, zero_stage: int
) -> None:
    start = house.wide if role != "critic" else house.reward("wide")
    assert_same(two / f"ppo-{zero_stage}" / role, one / "ppo-0" / role, start)
    assert_same_numbers(two / f"ppo-{zero_stage}", one / "ppo-0")


@pytest.mark.parametrize("how", [{"tokens_per_microbatch": 40}, {"zero_stage": 2}, {"zero_stage": 3}])
def test_ppo_ptx_does_not_depend_on_budget_or_zero_stage(
    house: tiny.House, one: Path, tmp_path: Path, how: dict[str, int]
) -> None:
    tiny.run_ppo(house, tmp_path, **tiny.PPO_PTX, eval_prompts=house.data("prompts-held-out"), **how)
    for role in ROLES:
        start = house.wide if role != "critic" else house.reward("wide")
        assert_same(tmp_path / role, one / "ppo-0" / role, start)
    assert_same_numbers(tmp_path, one / "ppo-0")


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sft_and_reward_of_two_ranks_are_those_of_one(house: tiny.House, one: Path, two: Path, stage: str) -> None:
    # A bias that moves all scores alike moves no difference of two scores.
    untrained = ("transformer.ln_f.bias",) if stage == "reward" else ()
    assert_same(two / stage / "model", one / stage / "model", house.wide, untrained)
    assert_same_numbers(two / stage, one / stage)


def test_training_loads_in_transformers(house: tiny.House, two: Path) -> None:
    """What two ranks wrote under ZeRO 3 is whole: transformers computes the same log-probs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pyrlhf.model import CausalLM

    folder = two / "ppo-3" / "model"
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)("one red bird")["input_ids"])
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    ours = CausalLM.from_pretrained(folder)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    found = ours.logits(ours(tokens, torch.arange(len(tokens)), cu_seqlens))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
