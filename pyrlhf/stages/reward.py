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
from pyrlhf.metrics import Metrics
from pyrlhf.model import ScalarModel
from pyrlhf.rlhf.losses import RankedBatch, reward_model_loss
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


def train_reward(
    config: RewardConfig, *, model: Path, tokenizer: Tokenizer, engine: EngineConfig, seed: int, folder: Path, metrics: Metrics
) -> Path:
    """Train a scalar head on the language model in `model`, and all of its trunk; returns folder/model.

    """
    world = init_world(engine)
    rules = (config.prompt, config.response, metrics)
    rankings = load_rankings(config.data, tokenizer, *rules)
    held_out = load_rankings(config.eval_data, tokenizer, *rules) if config.eval_data.path else []
    sampler = EpochSampler(len(rankings), min(config.batch_size, len(rankings)), seed=seed)
    total = config.epochs * sampler.steps_per_epoch
    reward = ZeroEngine(ScalarModel.from_causal_lm(model, seed=seed), world, engine, config.optimizer, total)

    def step(k: int) -> tuple[dict[str, float], int]:
        batch = [rankings[i] for i in sampler.batch(k)]
        loss, right, pairs = 0.0, 0.0, 0.0
        for groups, idle, last in micro_groups(batch, engine.tokens_per_microbatch, reward):
            part, stats = reward_model_loss(reward, groups, 0.0 if idle else 1.0 / len(batch))
            reward.backward(part, last=last)
            if not idle:
                loss += float(part.detach())
                right, pairs = right + float(stats.accuracy * stats.pairs), pairs + float(stats.pairs)
        report = reward.step()
        loss, right, pairs = (world.sum(x) for x in (loss, right, pairs))
        numbers = {"loss": loss, "accuracy": right / pairs, "pairs": pairs, "grad_norm": report.grad_norm, "lr": report.lr}
        return numbers | {"skipped_steps": float(reward.skipped_steps)}, sum(map(tokens_of, batch))

    def after(done: int) -> None:
        if held_out and (done == total or (config.eval_every and done % config.eval_every == 0)):
            metrics.log(done, {f"eval/{k}": v for k, v in accuracy(reward, held_out, engine.tokens_per_microbatch).items()})

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
    calibrate(config, reward, rankings, tokenizer, engine.tokens_per_microbatch, metrics)
    return save_model(reward, folder / "model", tokenizer, kind="scalar")


def tokens_of(ranking: EncodedRanking) -> int:
    return len(ranking.prompt) + sum(map(len, ranking.answers))


#: What a rank computes, with weight 0, while others still have micro-batches.
IDLE = EncodedRanking([0], [[0], [0]], (0, 1))


def micro_groups(
    batch: Sequence[EncodedRanking], budget: int, engine: ZeroEngine
) -> Iterator[tuple[RankedBatch, bool, bool]]:
    """This rank's prompts with their answers, in micro-batches of at most `budget` tokens: (groups, idle, last)."""
    plan = share_by_tokens(
        [tokens_of(r) for r in batch], budget, rank=engine.world.rank, world_size=engine.world.size
    )
    for i, indices in enumerate(plan):
        yield rank_batch([batch[j] for j in indices] or [IDLE], engine.device), not indices, i == len(plan) - 1


def rank_batch(rankings: Sequence[EncodedRanking], device: torch.device) -> RankedBatch:
    """Pack prompts and answers, each prompt once."""
    groups = pack_groups([(r.prompt, r.answers) for r in rankings]).to(device)
    ranks = torch.tensor([rank for r in rankings for rank in r.ranks], dtype=torch.int32, device=device)
    return RankedBatch(groups.batch, groups.last, groups.cu_groups, ranks)


def scores_of(engine: ZeroEngine, rankings: Sequence[EncodedRanking], budget: int) -> list[list[float]]:
    """The model's score of every answer, prompt by prompt, the same on every rank."""
    world, found = engine.world, dict[int, list[float]]()
    plan = share_by_tokens([tokens_of(r) for r in rankings], budget, rank=world.rank, world_size=world.size)
    with torch.no_grad():
        for indices in plan:
            members = [rankings[i] for i in indices] or [IDLE]
            packed = rank_batch(members, engine.device)
            place = packed.packed
            scores = engine(place.tokens, place.positions, place.cu_seqlens, place.prefix, rows=packed.last_tokens)
            parts = scores.float().cpu().split([len(r.answers) for r in members])
            found |= dict(zip(indices, (p.tolist() for p in parts), strict=False))
    for part in world.gather(found):
        found |= part
    return [found[i] for i in range(len(rankings))]


def accuracy(engine: ZeroEngine, rankings: Sequence[EncodedRanking], budget: int) -> dict[str, float]:
    """Share of pairs put in the right order, and the loss, over held-out rankings."""
    from pyrlhf import ops

    scores = torch.tensor([s for group in scores_of(engine, rankings, budget) for s in group])
    cu_groups = torch.tensor([0, *[len(r.answers) for r in rankings]]).cumsum(0).int()
    ranks = torch.tensor([rank for r in rankings for rank in r.ranks], dtype=torch.int32)
    loss, stats = ops.ranking_loss(scores, cu_groups, ranks)
    return {"loss": float(loss), "accuracy": float(stats.accuracy), "pairs": float(stats.pairs)}


def calibrate(
    config: RewardConfig,
    engine: ZeroEngine,
    rankings: Sequence[EncodedRanking],
    tokenizer: Tokenizer,
    budget: int,
    metrics: Metrics,
) -> None:
    """Move (and scale) the scores so that demonstrations have mean 0 (and variance 1)."""
    if config.calibrate == "none":
        return
    if config.demonstrations.path:
        examples = load_demonstrations(config.demonstrations, tokenizer, config.prompt, config.response, metrics)
        good = [
            EncodedRanking(tokens[:p], [tokens[p:]], (0,)) for tokens, p in zip(examples.tokens, examples.prompt_lengths, strict=True)
        ]
    else:
        good = [EncodedRanking(r.prompt, [a for a, rank in zip(r.answers, r.ranks, strict=True) if rank == min(r.ranks)], (0,)) for r in rankings]
    scores = torch.tensor([s for group in scores_of(engine, good, budget) for s in group])
    std = float(scores.std(unbiased=False))
    engine.module.calibrate(float(scores.mean()), std if config.calibrate == "bias_and_gain" else None)
