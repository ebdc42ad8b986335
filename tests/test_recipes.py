"""The recipes that users start from: they load, and much reduced runs of them go through every stage on the real data."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.recipe import STAGES, Recipe, load_recipe, run_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

_PPO = ["ppo.updates=2", "ppo.batch_size=8", "ppo.minibatches=2", "ppo.max_new_tokens=8", "ppo.ptx_tokens=16"]
_REWARD = ["reward.batch_size=4", "reward.epochs=1"]
_SCRATCH = [
    "tokenizer.vocab_size=300",
    "pretrain.epochs=1",
    "pretrain.context=32",
    "sft.epochs=1",
    "sft.batch_size=4",
    "sft.prompt.max_tokens=16",
    "sft.response.max_tokens=16",
    "reward.prompt.max_tokens=16",
    "reward.response.max_tokens=16",
    "ppo.max_prompt_tokens=16",
]
REDUCED = {
    "stories": ["generate.count=24", "generate.held_out=8", "generate.max_new_tokens=24", "reward.data.groups=8",
                "reward.eval_data.limit=60", "reward.eval_every=0", *_REWARD, *_PPO],
    "pandalm": [*_SCRATCH, *_REWARD, *_PPO],
    "oasst_zh": [*_SCRATCH, *_REWARD, *_PPO],
}  # fmt: skip
DATA = {"stories": ("stories260k", "sst_fine"), "pandalm": ("pandalm",), "oasst_zh": ("oasst_zh",)}


def reduced(name: str, output: Path) -> Recipe:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"output={output}", *REDUCED[name]])
    shorten(recipe)
    return recipe


def shorten(recipe: Recipe, rows: int = 12) -> None:
    """Every set that has a limit reads at most `rows` rows, every set that skips the others reads as many."""
    for stage in ("pretrain", "sft", "reward", "ppo"):
        config = getattr(recipe, stage)
        for name, value in vars(config).items():
            if getattr(value, "path", "") and (value.skip or value.limit) and value.format != "labelled_lines":
                object.__setattr__(getattr(config, name), "limit", rows)


def numbers(folder: Path) -> dict[str, Any]:
    """All numbers of a stage, the last of each name."""
    found: dict[str, Any] = {}
    for row in read(folder / "metrics.jsonl"):
        found |= row
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert Path(recipe.output) == ROOT / "runs" / path.stem
    assert list(recipe.stages) == sorted(recipe.stages, key=STAGES.index)
    assert recipe.ppo.ptx_coef > 0, "the recipes show PPO-ptx"
    assert str(ROOT.parent) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["oasst_zh", "pandalm"])  # stories: below, on one rank and on two
def test_a_reduced_recipe_runs(name: str, tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    for data in DATA[name]:
        shared_data(data)
    recipe = reduced(name, tmp_path / "out")
    check_run(recipe, run_recipe(recipe))


def check_run(recipe: Recipe, out: Path) -> None:
    """Every stage has left what the next one, and the user, needs."""
    for i, stage in enumerate(recipe.stages, 1):
        folder = out / f"{i:02d}-{stage}"
        assert (folder / "done.json").exists()
        if stage in ("pretrain", "sft", "ppo"):
            CausalLM.from_pretrained(folder / "model")
        if stage == "reward":
            ScalarModel.from_pretrained(folder / "model")
            assert numbers(folder)["eval/pairs"] > 0
    ppo = out / f"{len(recipe.stages):02d}-ppo"
    last = numbers(ppo)
    assert last["step"] == 2
    assert last["skipped_steps"] == 0
    assert last["eval/ptx_perplexity"] > 1
    first = next(row for row in read(ppo / "metrics.jsonl") if row["step"] == 1)
    assert first["first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["kl"] == pytest.approx(0.0, abs=1e-4)
    assert any("start" in row and "policy" in row for row in read(ppo / "samples.jsonl")), "answers side by side"


def launch(script: str, *words: str, **env: str) -> subprocess.Popen[str]:
    """Start a launcher script on the CPU with this Python's deepspeed first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env}
    return subprocess.Popen(
        ["bash", str(ROOT / "recipes" / script), *words],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_two_launched_ranks_do_what_one_does(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """recipes/run_deepspeed.sh 2: the same samples, numbers and weights as one process; everything is said once."""
    for data in DATA["stories"]:
        shared_data(data)
    recipe = reduced("stories", tmp_path / "one")
    one = run_recipe(recipe)
    check_run(recipe, one)
    two = tmp_path / "two"
    words = ("2", str(ROOT / "recipes" / "stories.yaml"), f"output={two}", *REDUCED["stories"])
    run = launch("run_deepspeed.sh", *words, MASTER_PORT=free_port())
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    for stage in ("generate", "reward", "ppo"):
        assert said.count(f"{stage}: starting in") == 1, said
    for name in ("samples", "held_out"):
        a, b = ((out / "01-generate" / f"{name}.jsonl").read_text(encoding="utf-8") for out in (one, two))
        assert a == b
    for stage in ("02-reward", "03-ppo"):
        a, b = numbers(one / stage), numbers(two / stage)
        shared = [n for n in ("loss", "eval/accuracy", "reward", "kl", "policy_loss", "ptx_loss", "eval/kl") if n in a]
        assert shared
        assert [b[n] for n in shared] == pytest.approx([a[n] for n in shared], rel=1e-4, abs=1e-5)
        weights, others = (load_file(out / stage / "model" / "model.safetensors") for out in (one, two))
        assert max(float((weights[n] - others[n]).abs().max()) for n in weights) < 1e-5


def test_launchers_say_how_they_are_used(tmp_path: Path) -> None:
    for script, words in (
        ("run_deepspeed.sh", ()),
        ("run_deepspeed.sh", ("recipes/stories.yaml",)),
        ("run_multinode.sh", ("hosts", "localhost", "recipes/stories.yaml")),
    ):
        run = launch(script, *words, NODE_RANK="")
        said, _ = run.communicate(timeout=60)
        assert run.returncode == 2
        assert f"recipes/{script}" in said
        assert "RECIPE.yaml" in said
    run = launch("run_multinode.sh", str(tmp_path / "none"), "localhost", "recipes/stories.yaml", NODE_RANK="0")
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "cannot read the hostfile" in said
