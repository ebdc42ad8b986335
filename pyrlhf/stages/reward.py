"""Reward model from K ranked answers: all C(K, 2) pairs of a prompt in one forward (Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pyrlhf.data import DataConfig, EncodedRanking, EpochSampler, LengthRule, Tokenizer, pack_groups, share_by_tokens
from pyrlhf.engine import EngineConfig, OptimizerConfig, ZeroEngine, init_world
from pyrlhf.engine.checkpoint import save_model
from pyrlhf.evaluate import reward_accuracy, score_rankings
from pyrlhf.metrics import Metrics
from pyrlhf.model import ScalarModel
from pyrlhf.rlhf.losses import RankedBatch, reward_model_loss
from pyrlhf.stages.checks import check_context, check_settings
from pyrlhf.stages.inputs import load_demonstrations, load_rankings
from pyrlhf.stages.loop import run_steps


@dataclass
class RewardConfig:
    """Reward-model training.

    Args:
        data: rankings of K >= 2 answers.
        eval_data: held-out rankings.
        demonstrations: answers whose mean score becomes 0; empty: the best answers of the training rankings.
        model: folder of the language model to start from; empty: the SFT stage's (or the run's start model).
        prompt: how long a prompt may be.
        response: how long an answer may be, EOS included.
        epochs: passes over the data.
        batch_size: prompts of an optimizer step.
        optimizer: AdamW and its schedule.
        calibrate: what is fitted afterwards: the bias (mean 0), bias and gain (mean 0, variance 1), or nothing.
        eval_every: steps between evaluations on eval_data; 0: only at the end.
        save_every: steps between checkpoints; 0: none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    eval_data: DataConfig = field(default_factory=DataConfig)
    demonstrations: DataConfig = field(default_factory=DataConfig)
    model: str = ""
    prompt: LengthRule = field(default_factory=lambda: LengthRule(1024))
    response: LengthRule = field(default_factory=lambda: LengthRule(1024))
    epochs: int = 1
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, schedule="cosine"))
    calibrate: Literal["bias", "bias_and_gain", "none"] = "bias_and_gain"
    eval_every: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        check_settings("reward", self, at_least={"epochs": 1, "batch_size": 1, "eval_every": 0, "save_every": 0})


def train_reward(
    config: RewardConfig,
    *,
    model: Path,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
) -> Path:
    """Train a scalar head on the language model in `model`, and all of its trunk; returns folder/model, a Hugging Face checkpoint."""
    world, budget = init_world(engine), engine.tokens_per_microbatch
    rules = (config.prompt, config.response, metrics)
    rankings = load_rankings("reward.data", config.data, tokenizer, *rules)
    held_out = load_rankings("reward.eval_data", config.eval_data, tokenizer, *rules) if config.eval_data.path else []
    good = demonstrations(config, rankings, tokenizer, metrics)
    sampler = EpochSampler(len(rankings), min(config.batch_size, len(rankings)), seed=seed)
    total = config.epochs * sampler.steps_per_epoch
    reward = ZeroEngine(ScalarModel.from_causal_lm(model, seed=seed), world, engine, config.optimizer, total)
    longest = max(len(r.prompt) + max(map(len, r.answers)) for r in rankings)
    check_context("reward.prompt, reward.response", longest, reward.module.config)

    def step(k: int) -> tuple[dict[str, float], int]:
        return reward_step(reward, [rankings[i] for i in sampler.batch(k)], budget)

    def after(done: int) -> None:
        if held_out and (done == total or (config.eval_every and done % config.eval_every == 0)):
            found = reward_accuracy(reward, held_out, tokens_per_batch=budget, world=world)
            numbers = {"eval/loss": found.loss, "eval/accuracy": found.accuracy, "eval/pairs": found.pairs}
            numbers |= {f"eval/accuracy_k{k}": accuracy for k, (accuracy, _) in found.by_k.items()}
            metrics.log(done, numbers, show=True)

    run_steps(
        total,
        step,
        engines={"reward": reward},
        folder=folder,
        metrics=metrics,
        description="reward model",
        save_every=config.save_every,
        after=after,
    )
    if good:
        metrics.log(total, calibrate(reward, good, budget, gain=config.calibrate == "bias_and_gain"), show=True)
    save_model(reward, folder / "model", tokenizer, kind="scalar")
    reward.close()
    return folder / "model"


def reward_step(engine: ZeroEngine, batch: Sequence[EncodedRanking], budget: int) -> tuple[dict[str, float], int]:
    """One optimizer step on the mean ranking loss of a batch of prompts; its numbers and tokens."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for groups, idle, last in micro_groups(batch, budget, engine):
        loss, stats = reward_model_loss(engine, groups, 0.0 if idle else 1.0 / len(batch))
        engine.backward(loss, last=last)
        if not idle:
            sums += torch.stack([loss.detach(), stats.accuracy * stats.pairs, stats.pairs])
    report = engine.step()
    mean, right, pairs = engine.world.sum(sums).tolist()
    numbers = {"loss": mean, "accuracy": right / pairs, "pairs": pairs, "grad_norm": report.grad_norm, "lr": report.lr}
    return numbers, sum(map(tokens_of, batch))


def tokens_of(ranking: EncodedRanking) -> int:
    return len(ranking.prompt) + sum(map(len, ranking.answers))


#: What a rank computes, with weight 0, while others still have micro-batches.
IDLE = EncodedRanking([0], [[0], [0]], (0, 1))


def micro_groups(
    batch: Sequence[EncodedRanking], budget: int, engine: ZeroEngine
) -> Iterator[tuple[RankedBatch, bool, bool]]:
    """This rank's prompts with their answers, in micro-batches of at most `budget` tokens: (groups, idle, last)."""
    world = engine.world
    plan = share_by_tokens([tokens_of(r) for r in batch], budget, rank=world.rank, world_size=world.size)
    for i, indices in enumerate(plan):
        yield rank_batch([batch[j] for j in indices] or [IDLE], engine.device), not indices, i == len(plan) - 1


def rank_batch(rankings: Sequence[EncodedRanking], device: torch.device) -> RankedBatch:
    """Pack prompts and answers, each prompt once."""
    groups = pack_groups([(r.prompt, r.answers) for r in rankings]).to(device)
    ranks = torch.tensor([rank for r in rankings for rank in r.ranks], dtype=torch.int32, device=device)
    return RankedBatch(groups.batch, groups.last, groups.cu_groups, ranks)


def demonstrations(
    config: RewardConfig, rankings: Sequence[EncodedRanking], tokenizer: Tokenizer, metrics: Metrics
) -> list[EncodedRanking]:
    """The answers that the scores are calibrated on, as groups of a prompt; none where nothing is calibrated."""
    if config.calibrate == "none":
        return []
    if not config.demonstrations.path:
        return [EncodedRanking(r.prompt, best_answers(r), (0,)) for r in rankings]
    rules = (config.prompt, config.response, metrics)
    found = load_demonstrations("reward.demonstrations", config.demonstrations, tokenizer, *rules)
    pairs = zip(found.tokens, found.prompt_lengths, strict=True)
    return [EncodedRanking(tokens[:p], [tokens[p:]], (0,)) for tokens, p in pairs]


def best_answers(ranking: EncodedRanking) -> list[list[int]]:
    best = min(ranking.ranks)
    return [answer for answer, rank in zip(ranking.answers, ranking.ranks, strict=True) if rank == best]


def calibrate(engine: ZeroEngine, good: Sequence[EncodedRanking], budget: int, *, gain: bool) -> dict[str, float]:
    """Move (and with `gain` scale) the scores so that those of `good` have mean 0 (and variance 1); what they were before.

    Scores that are all the same have no variance to scale to 1, and are only moved.
    """
    groups = score_rankings(engine, good, tokens_per_batch=budget, world=engine.world)
    scores = torch.tensor([score for group in groups for score in group], dtype=torch.float64)
    mean, std = float(scores.mean()), float(scores.std(unbiased=False))
    engine.module.calibrate(mean, std if gain and std > 0 else None)
    return {"calibration/mean": mean, "calibration/std": std, "calibration/answers": len(scores)}
