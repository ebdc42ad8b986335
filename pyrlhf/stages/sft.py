"""Supervised fine-tuning on demonstrations: next-token loss on the answers (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrlhf.data import DataConfig, EpochSampler, LengthRule, Tokenizer
from pyrlhf.engine import EngineConfig, HybridEngine, OptimizerConfig, ZeroEngine, init_world
from pyrlhf.engine.checkpoint import save_model
from pyrlhf.metrics import Metrics
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rollout import Sampling
from pyrlhf.stages.actors import model_scores, respond, stop_ids
from pyrlhf.stages.checks import check_context, check_settings
from pyrlhf.stages.inputs import load_demonstrations
from pyrlhf.stages.loop import evaluate_language_model, language_model_step, perplexity, run_steps


@dataclass
class SFTConfig:
    """Supervised fine-tuning.

    Args:
        data: demonstrations.
        eval_data: held-out demonstrations; they choose the checkpoint, by reward-model score where there is a reward model, else by
            their loss. Without them the last epoch's is taken.
        prompt: how long a prompt may be.
        response: how long an answer may be, EOS included.
        epochs: passes over the data.
        batch_size: demonstrations of an optimizer step.
        optimizer: AdamW and its schedule.
        reward_model: folder of a reward model that chooses the checkpoint; empty: none.
        max_new_tokens: budget of the answers that the reward model scores.
        save_every: steps between checkpoints; 0: none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    eval_data: DataConfig = field(default_factory=DataConfig)
    prompt: LengthRule = field(default_factory=lambda: LengthRule(1024))
    response: LengthRule = field(default_factory=lambda: LengthRule(1024))
    epochs: int = 16
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9.65e-6, schedule="cosine"))
    reward_model: str = ""
    max_new_tokens: int = 256
    save_every: int = 500

    def __post_init__(self) -> None:
        check_settings("sft", self, at_least={"epochs": 1, "batch_size": 1, "max_new_tokens": 1, "save_every": 0})


def train_sft(
    config: SFTConfig,
    *,
    model: Path,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
    reward_model: Path | None = None,
) -> Path:
    """Train the language model in `model` on demonstrations; returns folder/model, the chosen epoch as a Hugging Face checkpoint."""
    world, budget = init_world(engine), engine.tokens_per_microbatch
    rules = (config.prompt, config.response, metrics)
    data = load_demonstrations("sft.data", config.data, tokenizer, *rules)
    held_out = (
        load_demonstrations("sft.eval_data", config.eval_data, tokenizer, *rules) if config.eval_data.path else None
    )
    sampler = EpochSampler(len(data), min(config.batch_size, len(data)), seed=seed)
    total = config.epochs * sampler.steps_per_epoch
    policy = HybridEngine(CausalLM.from_pretrained(model), engine, config.optimizer, total, world=world)
    check_context("sft.prompt, sft.response", data.longest, policy.module.config)
    path = config.reward_model or reward_model
    judge = ZeroEngine(ScalarModel.from_pretrained(path), world, engine) if path and held_out is not None else None
    sampling = Sampling(config.max_new_tokens, seed=seed, stop_ids=stop_ids(tokenizer))
    state: dict[str, Any] = {"best": {"merit": -math.inf, "step": 0}}

    def step(k: int) -> tuple[dict[str, float], int]:
        return language_model_step(policy, data.select(sampler.batch(k)), budget)

    def after(done: int) -> None:
        if held_out is None or done % sampler.steps_per_epoch:
            return
        loss = evaluate_language_model(policy, held_out, budget)
        merit, numbers = -loss, {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
        if judge is not None:
            responses = respond(policy, held_out.prompts, sampling)
            merit = numbers["eval/reward"] = float(model_scores(judge, tokenizer, budget)(responses).mean())
        metrics.log(done, numbers, show=True)
        if merit > state["best"]["merit"]:
            state["best"] = {"merit": merit, "step": done}
            save_model(policy, folder / "model", tokenizer)

    run_steps(
        total,
        step,
        engines={"policy": policy},
        folder=folder,
        metrics=metrics,
        description="SFT",
        save_every=config.save_every,
        state=state,
        after=after,
    )
    if state["best"]["step"]:
        metrics.note(f"kept epoch {state['best']['step'] // sampler.steps_per_epoch} of {config.epochs}")
    else:
        save_model(policy, folder / "model", tokenizer)
    for used in filter(None, (policy, judge)):
        used.close()
    return folder / "model"
