"""The whole loop on one GPU, in bfloat16 under every ZeRO stage: what each stage logs and leaves, the demo, the stories recipe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrlhf.data import pack_groups
from pyrlhf.metrics import read_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LANGUAGE = {"loss", "perplexity", "grad_norm", "lr", "seconds", "tokens_per_second", "peak_memory_gib", "skipped_steps"}
PPO = {
    *("reward", "kl", "entropy", "ratio_max", "clip_fraction", "value_loss", "explained_variance", "ptx_loss"),
    *("grad_norm", "critic_grad_norm", "mismatch/mean", "mismatch/max", "seconds/refresh", "seconds/decode"),
    *("peak_memory_gib/rollout", "peak_memory_gib/experience", "peak_memory_gib/training"),
    *("rollout/cache_bytes", "rollout/peak_pages", "rollout/preemptions"),
}


def run(*command: object) -> str:
    ran = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-6000:]
    return ran.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="ZeRO needs DeepSpeed")
    folder = tmp_path_factory.mktemp("loop")
    run(Path(__file__).with_name("loop.py"), DEVICE, folder)
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if "seconds" in line]


def test_a_batch_goes_to_the_device_without_a_wait() -> None:
    groups = pack_groups([([1, 2, 3], [[4], [5, 6]]), ([7], [[8, 9], [10]])])
    groups.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = groups.to(DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.batch.tokens.tolist() == groups.batch.tokens.tolist()
    assert there.cu_groups.tolist() == groups.cu_groups.tolist()


@pytest.mark.parametrize("zero", range(4))
def test_every_stage_learns(trained: Path, zero: int) -> None:
    falls = {"pretrain": 1.0, "sft": 0.5, "reward": 0.1}
    for stage, fall in falls.items():
        lines = steps(trained / str(zero) / stage)
        assert lines[-1]["loss"] < lines[0]["loss"] - fall, stage
        assert lines[-1]["skipped_steps"] == 0
        assert (trained / str(zero) / stage / "model" / "model.safetensors").exists()
    assert steps(trained / str(zero) / "pretrain")[0].keys() >= LANGUAGE
    ppo = steps(trained / str(zero) / "ppo")
    assert len(ppo) == 2
    for line in ppo:
        assert line.keys() >= PPO
        assert all(math.isfinite(line[name]) for name in PPO)
        assert line["mismatch/mean"] <= 5e-3
        assert line["skipped_steps"] == 0
        peaks = [line[f"peak_memory_gib/{phase}"] for phase in ("rollout", "experience", "training")]
        assert 0 < max(peaks) <= line["peak_memory_gib"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_zero_stages_agree(trained: Path, stage: str) -> None:
    """One rank: the same arithmetic but for the order of sums in the gradient's norm."""
    for a, *others in zip(*(steps(trained / str(zero) / stage) for zero in range(4)), strict=True):
        for b in others:
            assert b["loss"] == pytest.approx(a["loss"], abs=0.05)


@pytest.mark.parametrize("zero", range(4))
def test_masters_are_float32_and_nothing_moves_a_bit(trained: Path, zero: int) -> None:
    """Resuming, activation checkpointing, and moving the masters to the host and back leave the same weights."""
    found = torch.load(trained / "results.pt", weights_only=False)[zero]
    assert found.pop("states") == {torch.float32}
    assert found.pop("weights") == {torch.bfloat16}
    assert found == dict.fromkeys(found, True)
    assert found.keys() >= {"average is finite", "resumed", "checkpointed"} | (
        {"offloaded", "offloading frees memory"} if zero > 1 else set()
    )


def test_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the stages need DeepSpeed")
    run("-m", "pyrlhf", "demo", "--quick", "--device", DEVICE, "--output", tmp_path / "demo")
    table = json.loads((tmp_path / "demo" / "table.json").read_text())
    assert table["policies"].keys() == {"SFT", "PPO", "PPO-ptx"}
    assert all(math.isfinite(value) for row in table["policies"].values() for value in row.values())


def test_the_stories_recipe(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """Unchanged but for its length."""
    pytest.importorskip("deepspeed", reason="the stages need DeepSpeed")
    shared_data("stories260k"), shared_data("sst_fine")
    recipe = Path(__file__).parents[3] / "recipes" / "stories.yaml"
    shorter = ["generate.count=192", "generate.held_out=64", "reward.data.groups=640", "ppo.updates=3"]
    run("-m", "pyrlhf", "run", recipe, f"output={tmp_path / 'stories'}", f"engine.device={DEVICE}", *shorter)
    table = json.loads((tmp_path / "stories" / "03-ppo" / "evaluation.json").read_text())
    assert table["policy"]["kl"] > 0
    assert all(math.isfinite(value) for row in table.values() for value in row.values())
