"""Pretraining: next-token loss over text (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pyrlhf.data import DataConfig, EpochSampler, Tokenizer
from pyrlhf.engine import EngineConfig, OptimizerConfig, ZeroEngine, init_world
from pyrlhf.engine.checkpoint import save_model
from pyrlhf.metrics import Metrics
from pyrlhf.model import CausalLM
from pyrlhf.stages.checks import check_context, check_settings
from pyrlhf.stages.inputs import load_texts
from pyrlhf.stages.loop import Sequences, evaluate_language_model, language_model_step, perplexity, run_steps


@dataclass
class PretrainConfig:
    """Next-token training on text.

    Args:
        data: the text.
        eval_data: held-out text.
        context: tokens of an example.
        join: documents run on into each other, closed with EOS; else every document is an example of its own.
        epochs: passes over the data.
        batch_size: examples of an optimizer step.
        optimizer: AdamW and its schedule.
        eval_every: steps between evaluations on eval_data; 0: only at the end.
        save_every: steps between checkpoints; 0: none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    eval_data: DataConfig = field(default_factory=DataConfig)
    context: int = 512
    join: bool = True
    epochs: int = 1
    batch_size: int = 64
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=2.5e-4, eps=1e-8, weight_decay=0.01, schedule="cosine", warmup_steps=100
        )
    )
    eval_every: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        least = {"context": 2, "epochs": 1, "batch_size": 1, "eval_every": 0, "save_every": 0}
        check_settings("pretrain", self, at_least=least)


def train_pretrain(
    config: PretrainConfig,
    *,
    model: Path,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
) -> Path:
    """Train the language model in `model` on text; returns folder/model, a Hugging Face checkpoint."""
    world, budget = init_world(engine), engine.tokens_per_microbatch

    def load(name: str, source: DataConfig) -> Sequences:
        return load_texts(f"pretrain.{name}", source, tokenizer, config.context, metrics, join=config.join)

    data = load("data", config.data)
    held_out = load("eval_data", config.eval_data) if config.eval_data.path else None
    sampler = EpochSampler(len(data), min(config.batch_size, len(data)), seed=seed)
    total = config.epochs * sampler.steps_per_epoch
    policy = ZeroEngine(CausalLM.from_pretrained(model), world, engine, config.optimizer, total)
    check_context("pretrain.context", data.longest, policy.module.config)

    def step(k: int) -> tuple[dict[str, float], int]:
        return language_model_step(policy, data.select(sampler.batch(k)), budget)

    def after(done: int) -> None:
        if held_out is not None and (done == total or (config.eval_every and done % config.eval_every == 0)):
            loss = evaluate_language_model(policy, held_out, budget)
            metrics.log(done, {"eval/loss": loss, "eval/perplexity": perplexity(loss)}, show=True)

    run_steps(
        total,
        step,
        engines={"policy": policy},
        folder=folder,
        metrics=metrics,
        description="pretraining",
        save_every=config.save_every,
        after=after,
    )
    save_model(policy, folder / "model", tokenizer)
    policy.close()
    return folder / "model"
