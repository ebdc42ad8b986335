"""Two ranks, every ZeRO stage, against one rank without ZeRO. All of it runs in one pair of processes, started once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import training

from pyrlhf.engine import EngineConfig, init_world

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found, and all that they printed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONFAULTHANDLER": "1"}  # one that crashes says where
    command = [sys.executable, training.__file__, str(folder)]
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
    return torch.load(folder / "results.pt", weights_only=False) | {"said": said}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """One rank, ZeRO 0."""
    world = init_world(EngineConfig(device="cpu"))
    return {f"train {kind}": training.train(kind, world, 0) for kind in training.LOSSES}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        error = (found[name] - weight).norm() / weight.norm().clamp(min=1e-30)
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["lm", "scalar"])
def test_the_same_weights_as_one_rank(two: dict[str, Any], one: dict[str, Any], kind: str, stage: int) -> None:
    found, expected = two[f"train {kind} {stage}"], one[f"train {kind}"]
    assert_close(found["weights"], expected["weights"])
    assert_close(found["average"], expected["average"])
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found["unchanged"]
    for scores in found["scores"]:
        torch.testing.assert_close(scores, expected["scores"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_samples_do_not_depend_on_ranks(two: dict[str, Any], one: dict[str, Any], stage: int) -> None:
    def by_id(ranks: list[Any]) -> dict[int, list[int]]:
        return {sample: response for rank in ranks for response, sample, _ in rank}

    found = by_id(two[f"train lm {stage}"]["rollouts"])
    assert len(found) == 5
    assert found == by_id(one["train lm"]["rollouts"])


def test_a_rollout_gathers_each_weight_once(two: dict[str, Any]) -> None:
    found = two["gathers"]
    assert found["steps"] >= 5
    tied = {"trunk.embed.tokens.weight": 2}  # for its packed copy, and to look tokens up
    assert found["counts"] == {name: tied.get(name, 1) for name in found["counts"]}
    assert len(found["counts"]) == len(list(training.CausalLM(training.CONFIG).named_parameters()))
    assert found["whole"] == 0


def test_a_wrong_request_on_one_rank_is_told_on_all(two: dict[str, Any]) -> None:
    first, last = two["wrong"]
    assert last.startswith("prompts[0]: expected at least one token")
    assert first == f"rank 1: {last}"


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_after_generation(two: dict[str, Any], one: dict[str, Any], stage: int) -> None:
    assert two[f"train lm {stage}"]["after"] == pytest.approx(one["train lm"]["after"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_one_bad_rank_skips_the_step_on_all(two: dict[str, Any], stage: int) -> None:
    found = two[f"bad {stage}"]
    assert found["untouched"]
    assert found["skipped"] == 1
    for bad, good in found["reports"]:
        assert bad.skipped
        assert "loss" in bad.reason
        assert not good.skipped
        assert good.grad_norm > 0


def test_what_the_main_rank_alone_does_or_suffers_reaches_all(two: dict[str, Any]) -> None:
    (value, error), (other, told) = two["from main"]
    assert value == other == "made by 0"
    assert error == 'KeyError: "a reward function\'s own mistake"'
    assert told == f"RuntimeError: rank 0 failed: {error}"


@pytest.mark.parametrize("stage", STAGES)
def test_resumes_bit_for_bit(two: dict[str, Any], stage: int) -> None:
    found = two[f"resumed {stage}"]
    assert found["equal"] == [True, True]
    assert found["steps"] == 4
    assert found["client"] == [{"rank": 0, "step": 2}, {"rank": 1, "step": 2}]


def test_a_frozen_model_is_sharded_and_left_alone(two: dict[str, Any]) -> None:
    found = two["frozen 3"]
    assert torch.equal(found["first"], found["second"])
    model = training.CausalLM(training.CONFIG, seed=5)
    for name, weight in model.state_dict().items():
        assert torch.equal(found["whole"][name], weight)
    torch.testing.assert_close(found["first"], model(*training.packed(training.sequences(0))))


def test_nothing_reaches_the_terminal(two: dict[str, Any]) -> None:
    assert two["said"] == ["", ""]
