"""Samples of a model as text files: prompts for PPO, text for the ptx term, answers to be ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyrlhf.data import DataConfig, LengthRule, Tokenizer
from pyrlhf.engine import EngineConfig, HybridEngine
from pyrlhf.metrics import Metrics, rewrite
from pyrlhf.model import CausalLM
from pyrlhf.rlhf.experience import Responses
from pyrlhf.rollout import Sampling
from pyrlhf.stages.actors import respond, stop_ids, texts
from pyrlhf.stages.checks import check_settings
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
        count: samples in all; the prompts are gone through as often as it takes. Those without any text are left out.
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
        check_settings("generate", self, at_least={"count": 1, "held_out": 0, "max_new_tokens": 1, "batch_size": 1})
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
    rule = LengthRule(config.max_prompt_tokens, config.too_long, config.keep)
    prompts = [tokenizer.encode_prompt("")]
    if config.prompts.path:
        prompts = load_prompts("generate.prompts", config.prompts, tokenizer, rule, metrics)
    policy = HybridEngine(CausalLM.from_pretrained(config.model or model), engine, max_batch=config.batch_size)
    world, at_once = policy.world, config.batch_size * policy.world.size
    stops = stop_ids(tokenizer)
    sampling = Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, seed=seed, stop_ids=stops
    )
    rows: list[dict[str, Any]] = []
    with metrics.progress(config.count, "sampling") as bar:
        for first in range(0, config.count, at_once):
            ids = range(first, min(first + at_once, config.count))
            responses = respond(policy, [prompts[i % len(prompts)] for i in ids], sampling, first_id=first)
            rows += text_rows(responses, tokenizer)
            bar.advance(len(responses), tokens=responses.tokens)
    rows = _with_text(rows, config, metrics)
    if world.is_main:
        split = len(rows) - config.held_out
        folder.mkdir(parents=True, exist_ok=True)
        rewrite(folder / "samples.jsonl", rows[:split])
        rewrite(folder / "held_out.jsonl", rows[split:])
    world.barrier()
    policy.close()
    return folder


def text_rows(responses: Responses, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """{"text", "prompt", "response", "finish"} of each response."""
    pairs = zip(responses.sequences, *texts(responses, tokenizer), responses.finish, strict=True)
    return [{"text": tokenizer.decode(s), "prompt": p, "response": r, "finish": why} for s, p, r, why in pairs]


def _with_text(rows: Sequence[dict[str, Any]], config: GenerateConfig, metrics: Metrics) -> list[dict[str, Any]]:
    """Those that hold anything to read: a model may end at once, and an empty text is no data."""
    kept = [row for row in rows if row["text"].strip()]
    if len(kept) < len(rows):
        metrics.note(f"{len(rows) - len(kept)} of {len(rows)} samples left out: empty texts")
    if len(kept) <= config.held_out:
        raise ValueError(
            f"generate.count: expected more than held_out ({config.held_out}) samples with text, found {len(kept)} among {len(rows)}; "
            "raise count, or give generate.prompts"
        )
    return kept
