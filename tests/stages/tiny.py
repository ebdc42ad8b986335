"""Tiny models and data, made on the spot, that the tests of the stages share. As a script it is one of two ranks."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pyrlhf.data import DataConfig, Tokenizer
from pyrlhf.engine import EngineConfig, OptimizerConfig, init_world
from pyrlhf.metrics import Metrics, read_lines
from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
from pyrlhf.stages import PPOConfig, RewardConfig, SFTConfig, train_ppo, train_reward, train_sft

WORDS = ["red", "green", "blue", "one", "two", "three", "sea", "tree", "sky", "bird"]
# AdamW divides by a gradient's size + eps: where an element has next to no gradient but rounding's (the bias of keys has no
# other), rounding moves it by lr / eps times itself. 1e-4 is far below the gradients that matter and keeps that small.
LEARNING = OptimizerConfig(lr=3e-3, eps=1e-4)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def liking_of_e(answer: str) -> int:
    """What the labellers like."""
    return answer.count("e")


@dataclass
class House:
    """Where the tiny data and models are."""

    folder: Path
    tokenizer: Tokenizer

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def wide(self) -> Path:
        """A model whose weights ZeRO 3 really shards: those under 10,000 numbers stay whole."""
        return self.folder / "wide"

    def reward(self, model: str = "model") -> Path:
        return self.folder / f"{model}-reward"

    def data(self, name: str, **settings: Any) -> DataConfig:
        return DataConfig(str(self.folder / f"{name}.jsonl"), **settings)

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> DataConfig:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.data(name)

    def common(self, folder: Path, *, metrics: Metrics | None = None, **engine: Any) -> dict[str, Any]:
        """What every stage is given."""
        return {
            "tokenizer": self.tokenizer,
            "engine": EngineConfig(**({"device": "cpu"} | engine)),
            "seed": 7,
            "folder": folder,
            "metrics": metrics or Metrics(folder, folder.name),
        }


def build(folder: Path) -> House:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    house = House(folder, Tokenizer.train([text(rng, 50)], 258))
    house.write("text", [{"text": text(rng, 12)} for _ in range(40)])
    house.write("text-held-out", [{"text": text(rng, 12)} for _ in range(8)])
    for name, count in (("demonstrations", 24), ("demonstrations-held-out", 6)):
        house.write(name, [{"prompt": f"say {w}:", "response": f" {w} {w}"} for w in rng.choices(WORDS, k=count)])
    house.write("rankings", [ranking(rng, 2 + i % 4) for i in range(24)])
    house.write("rankings-held-out", [ranking(rng, 3) for _ in range(8)])
    house.write("prompts", [{"prompt": f"{text(rng, 1 + i % 3)}:"} for i in range(10)])
    house.write("prompts-held-out", [{"prompt": f"tell {i}:"} for i in range(6)])
    for name, width in (("model", 16), ("wide", 64)):
        config = ModelConfig(
            vocab_size=house.tokenizer.vocab_size,
            hidden_size=width,
            num_layers=2,
            num_heads=2,
            max_positions=64,
            bos_id=house.tokenizer.bos_id,
            eos_id=house.tokenizer.eos_id,
            model_type="gpt2",
        )
        CausalLM(config, seed=1).save_pretrained(folder / name, house.tokenizer)
        ScalarModel(config, seed=2).save_pretrained(house.reward(name), house.tokenizer)
    terse = ending_often(CausalLM.from_pretrained(house.model))
    terse.save_pretrained(folder / "terse", house.tokenizer)
    ScalarModel.from_pretrained(house.reward()).save_pretrained(house.reward("terse"), house.tokenizer)
    return house


@torch.no_grad()
def ending_often(model: CausalLM) -> CausalLM:
    """End-of-sequence gets about every sixth draw, so that some responses end and some are cut."""
    model.trunk.norm.bias[0] = 2.0
    model.head.weight[model.config.eos_id, 0] = 1.9
    return model


def ranking(rng: random.Random, k: int) -> dict[str, Any]:
    """K answers, those with more "e" ranked better; equal numbers tie."""
    answers = rng.sample([f" {w} {v}" for w in WORDS for v in WORDS], k)
    return {"prompt": "more:", "responses": answers, "scores": [liking_of_e(a) for a in answers]}


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward function with an easy task: the share of ASCII letters among a response's characters."""
    return [sum(c.isascii() and c.isalpha() for c in r) / max(len(r), 1) for r in responses]


def ppo_config(house: House, **settings: Any) -> PPOConfig:
    defaults: dict[str, Any] = {
        "prompts": house.data("prompts"),
        "ptx_data": house.data("text"),
        "updates": 2,
        "batch_size": 8,
        "minibatches": 2,
        "max_new_tokens": 6,
        "ptx_per_episode": 1,
        "ptx_tokens": 16,
        "policy_optimizer": OptimizerConfig(lr=1e-3),
        "critic_optimizer": OptimizerConfig(lr=1e-3),
    }
    return PPOConfig(**(defaults | settings))


def run_ppo(house: House, folder: Path, *, model: str = "model", **settings: Any) -> Path:
    """PPO from a tiny random policy against a tiny random reward model."""
    names = {field.name for field in fields(EngineConfig)} | {"metrics"}
    engine = {name: settings.pop(name) for name in names & settings.keys()}
    start = house.folder / model
    reward = None if settings.get("reward_function") else house.reward(model)
    config = ppo_config(house, **settings)
    return train_ppo(config, policy=start, reference=start, reward=reward, **house.common(folder, **engine))


def sft_config(house: House, **settings: Any) -> SFTConfig:
    defaults = {"data": house.data("demonstrations"), "epochs": 2, "batch_size": 8, "optimizer": LEARNING}
    return SFTConfig(**(defaults | settings))


def reward_config(house: House, **settings: Any) -> RewardConfig:
    defaults = {"data": house.data("rankings"), "epochs": 2, "batch_size": 8, "optimizer": LEARNING}
    return RewardConfig(**(defaults | settings))


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    return read_lines(folder / "metrics.jsonl")


def steps(folder: Path) -> list[dict[str, Any]]:
    """Those that its steps wrote."""
    return [line for line in lines(folder) if "seconds" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint's weight file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


#: What is trained again under other numbers of ranks, ZeRO stages and budgets: name -> how.
PPO_PTX = {"updates": 3, "ptx_coef": 27.8, "samples_per_prompt": 2, "epochs": 2, "ema_decay": 0.5, "model": "wide"}


def train_all(house: House, folder: Path, stages: Sequence[int]) -> None:
    """PPO-ptx under each ZeRO stage, SFT and reward under none."""
    for stage in stages:
        run_ppo(
            house, folder / f"ppo-{stage}", zero_stage=stage, **PPO_PTX, eval_prompts=house.data("prompts-held-out")
        )
    train_sft(sft_config(house), model=house.wide, **house.common(folder / "sft", tokens_per_microbatch=40))
    train_reward(reward_config(house), model=house.wide, **house.common(folder / "reward", tokens_per_microbatch=60))


def main(house: Path, folder: Path) -> None:
    world = init_world(EngineConfig(device="cpu"))
    there = House(house, Tokenizer.from_pretrained(house / "model"))
    common = there.common

    def with_main(path: Path, **engine: Any) -> dict[str, Any]:
        return common(path, metrics=Metrics(path, path.name, is_main=world.is_main), **engine)

    there.common = with_main  # type: ignore[method-assign]
    train_all(there, folder, (0, 3))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
