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
from pyrlhf.rlhf.experience import Responses, score_responses
from pyrlhf.rollout import Sampling
from pyrlhf.stages.inputs import load_demonstrations
from pyrlhf.stages.loop import Sequences, backward_language_model, evaluate_language_model, perplexity, run_steps


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
    world = init_world(engine)
    data = load_demonstrations(config.data, tokenizer, config.prompt, config.response, metrics)
    held_out = (
        load_demonstrations(config.eval_data, tokenizer, config.prompt, config.response, metrics) if config.eval_data.path else None
    )
    sampler = EpochSampler(len(data), min(config.batch_size, len(data)), seed=seed)
    total = config.epochs * sampler.steps_per_epoch
    policy = HybridEngine(CausalLM.from_pretrained(model), engine, config.optimizer, total, world=world)
    path = config.reward_model or reward_model
    judge = ZeroEngine(ScalarModel.from_pretrained(path), world, engine) if path else None
    budget = engine.tokens_per_microbatch
    state: dict[str, Any] = {"best": -math.inf, "best_step": 0}

    def step(k: int) -> tuple[dict[str, float], int]:
        batch = data.select(sampler.batch(k))
        loss = backward_language_model(policy, batch, budget)
        report = policy.step()
        numbers = {"loss": loss, "perplexity": perplexity(loss), "grad_norm": report.grad_norm, "lr": report.lr}
        return numbers | {"skipped_steps": float(policy.skipped_steps)}, sum(map(len, batch.tokens))

    def after(done: int) -> None:
        if held_out is None or done % sampler.steps_per_epoch:
            return
        loss = evaluate_language_model(policy, held_out, budget)
        merit, numbers = -loss, {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
        if judge is not None:
            merit = numbers["eval/reward"] = mean_reward(policy, judge, held_out, config.max_new_tokens, seed, tokenizer, budget)
        metrics.log(done, numbers)
        if merit > state["best"]:
            state.update(best=merit, best_step=done)
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
    if held_out is None or not math.isfinite(state["best"]):
        return save_model(policy, folder / "model", tokenizer)
    metrics.note(f"kept epoch {state['best_step'] // sampler.steps_per_epoch} of {config.epochs}")
    return folder / "model"


def mean_reward(
    policy: HybridEngine, judge: ZeroEngine, data: Sequences, max_new_tokens: int, seed: int, tokenizer: Tokenizer, budget: int
) -> float:
    """The reward model's mean score of one sampled answer to each held-out prompt."""
    prompts = [tokens[:length] for tokens, length in zip(data.tokens, data.prompt_lengths, strict=True)]
    rollouts = policy.generate(prompts, Sampling(max_new_tokens=max_new_tokens, seed=seed), n=1)
    scores = score_responses(judge, Responses.of(rollouts), world=policy.world, budget=budget, eos_id=tokenizer.eos_id)
    return float(scores.mean())
