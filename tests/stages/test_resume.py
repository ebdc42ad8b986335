"""A stage that is interrupted after its checkpoint and started again ends with the same weights and the same log, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pyrlhf.metrics import Metrics, read_lines
from pyrlhf.stages import PretrainConfig, train_pretrain, train_reward, train_sft


class Interrupted(Exception):
    pass


class Interrupting(Metrics):
    """Metrics of a run that breaks off when it logs `last`."""

    def __init__(self, folder: Path, last: int) -> None:
        super().__init__(folder, folder.name)
        self.last = last

    def log(self, step: int, numbers: Mapping[str, Any], *, show: bool = False) -> None:
        super().log(step, numbers, show=show)
        if step == self.last and "seconds" in numbers:
            raise Interrupted


def pretrain(house: tiny.House, folder: Path, metrics: Metrics) -> None:
    config = PretrainConfig(data=house.data("text"), context=32, batch_size=8, optimizer=tiny.LEARNING, save_every=2)
    train_pretrain(config, model=house.model, **house.common(folder, metrics=metrics))


def sft(house: tiny.House, folder: Path, metrics: Metrics) -> None:
    config = tiny.sft_config(house, epochs=3, eval_data=house.data("demonstrations-held-out"), save_every=2)
    train_sft(config, model=house.model, **house.common(folder, metrics=metrics))


def reward(house: tiny.House, folder: Path, metrics: Metrics) -> None:
    config = tiny.reward_config(house, eval_data=house.data("rankings-held-out"), eval_every=1, save_every=2)
    train_reward(config, model=house.model, **house.common(folder, metrics=metrics))


def ppo(house: tiny.House, folder: Path, metrics: Metrics) -> None:
    settings = {
        "ptx_coef": 1.0,
        "ema_decay": 0.5,
        "kl_target": 1e-3,
        "kl_horizon": 40,
        "eval_every": 1,
        "save_every": 2,
    }
    held_out = {"eval_prompts": house.data("prompts-held-out"), "sample_every": 1}
    tiny.run_ppo(house, folder, model="terse", updates=5, metrics=metrics, **settings, **held_out)


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a clock or the machine's memory has a say in."""
    passing = ("stage", "time", "seconds", "tokens_per", "peak")
    return [{k: v for k, v in line.items() if not k.startswith(passing)} for line in lines]


@pytest.mark.parametrize("last", [1, 3, 4])  # before the first checkpoint, soon after it, at the second
@pytest.mark.parametrize("stage", [pretrain, sft, reward, ppo])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(
    house: tiny.House, tmp_path: Path, stage: Callable[[tiny.House, Path, Metrics], None], last: int
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    stage(house, straight, Metrics(straight, "stage"))
    with pytest.raises(Interrupted):
        stage(house, broken, Interrupting(broken, last))
    assert (broken / "checkpoint").exists() == (last > 2)
    stage(house, broken, Metrics(broken, "stage"))
    checkpoints = [path.parent.relative_to(straight) for path in straight.glob("*/model.safetensors")]
    assert Path("model") in checkpoints
    assert stage is not ppo or {Path("ema"), Path("critic")} <= set(checkpoints)
    for folder in checkpoints:
        ours, theirs = tiny.weights(broken / folder), tiny.weights(straight / folder)
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert steady(tiny.lines(broken)) == steady(tiny.lines(straight))  # no step twice, none missing
    if stage is ppo:
        assert len({line["kl_coef"] for line in tiny.steps(straight)}) == 5
        assert (broken / "evaluation.json").read_text() == (straight / "evaluation.json").read_text()
        assert steady(read_lines(broken / "samples.jsonl")) == steady(read_lines(straight / "samples.jsonl"))
