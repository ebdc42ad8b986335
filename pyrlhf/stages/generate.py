"""Samples of a model as text files: prompts for PPO, text for the ptx term, answers to be ranked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyrlhf.data import DataConfig, LengthRule, Tokenizer, shard
from pyrlhf.engine import EngineConfig, HybridEngine, init_world
from pyrlhf.metrics import Metrics
from pyrlhf.model import CausalLM
from pyrlhf.rollout import Sampling
from pyrlhf.stages.inputs import load_prompts


@dataclass
class GenerateConfig:
    """Sampling text from a model.

    Args:
        model: folder of the model; empty: the run's start model.
        prompts: what to continue; empty: nothing but the beginning-of-text token.
        max_prompt_tokens: longer prompts are dropped or truncated.
        too_long: what becomes of longer prompts.
        keep: which end of a truncated prompt stays.
        count: samples in all; the prompts are gone through as often as it takes.
        held_out: so many of them, the last ones, go into held_out.jsonl instead of samples.jsonl.
        max_new_tokens: budget of a sample.
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        batch_size: samples generated at once.
    """

    model: str = ""
    prompts: DataConfig = field(default_factory=DataConfig)
    max_prompt_tokens: int = 1024
    too_long: Literal["drop", "truncate"] = "drop"
    keep: Literal["start", "end"] = "end"
    count: int = 1000
    held_out: int = 0
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("held_out", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"generate.{name}: expected at least {least}, found {getattr(self, name)}")
        if self.held_out >= self.count:
            raise ValueError(f"generate.held_out: expected fewer than count ({self.count}), found {self.held_out}")


def write_samples(
    config: GenerateConfig,
    *,
    model: Path,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
) -> Path:
    """Write folder/samples.jsonl and folder/held_out.jsonl, one {"text", "prompt", "response", "finish"} a line; returns the folder."""
    world = init_world(engine)
    rule = LengthRule(config.max_prompt_tokens, config.too_long, config.keep)
    prompts = load_prompts(config.prompts, tokenizer, rule, metrics) if config.prompts.path else [tokenizer.encode_prompt("")]
    policy = HybridEngine(CausalLM.from_pretrained(config.model or model), engine, world=world, max_batch=config.batch_size)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed=seed)
    rows: list[dict[str, Any]] = []
    with metrics.progress(config.count, "sampling") as bar:
        for first in range(0, config.count, config.batch_size * world.size):
            ids = shard(range(first, min(first + config.batch_size * world.size, config.count)), world.rank, world.size)
            rollouts = policy.generate([prompts[i % len(prompts)] for i in ids], sampling, sample_ids=ids)
            part = [_row(rollouts, i, prompts[id_ % len(prompts)], tokenizer) for i, id_ in enumerate(ids)]
            everyone = [row for rank in world.gather(part) for row in rank]
            rows += everyone
            bar.advance(len(everyone), tokens=int(rollouts.logprobs.numel()) * world.size)
    if world.is_main:
        split = config.count - config.held_out
        _write(folder / "samples.jsonl", rows[:split])
        _write(folder / "held_out.jsonl", rows[split:])
    world.barrier()
    return folder


def _row(rollouts: Any, i: int, prompt: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    response = rollouts.response(i)
    text = {"prompt": tokenizer.decode(prompt), "response": tokenizer.decode_response(prompt, response)}
    return {"text": tokenizer.decode([*prompt, *response]), **text, "finish": rollouts.finish[i]}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
