"""Between two rounds: the policy's samples are ranked, by a labeller or by people, and join the older rankings."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrlhf.data import DataConfig, Tokenizer, encode_prompts, read_prompts, read_rankings, shard
from pyrlhf.engine import EngineConfig, HybridEngine, World
from pyrlhf.evaluate.samples import prompt_part, prompt_text, sample_answers
from pyrlhf.metrics import Metrics, rewrite
from pyrlhf.model import CausalLM
from pyrlhf.rollout import Sampling
from pyrlhf.settings import SettingsError
from pyrlhf.stages.ppo import PPOConfig
from pyrlhf.stages.reward import RewardConfig

#: (prompt, responses) -> a score of each response, higher better.
Labeller = Callable[[str, list[str]], Sequence[float]]


@dataclass
class RankingConfig:
    """The samples that are ranked between rounds.

    Args:
        prompts: how many prompts of PPO's are answered for each round.
        samples: answers to each of them (K).
        batch_size: prompts whose answers are generated together.
    """

    prompts: int = 256
    samples: int = 4
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("samples", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")


class RankingsNeeded(RuntimeError):
    """The run waits for people: the message says which file to provide."""


def load_labeller(name: str) -> Labeller:
    """The function ``package.module:function``.

    Raises SettingsError saying what is missing.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise SettingsError(f"`labeller`: expected package.module:function, found {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(f"`labeller`: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SettingsError(f"`labeller`: {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def collect_rankings(
    config: RankingConfig,
    *,
    policy: Path,
    ppo: PPOConfig,
    reward: RewardConfig,
    earlier: Path | None,
    labeller: Labeller | None,
    world: World,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    folder: Path,
    metrics: Metrics,
) -> Path:
    """Answer some of PPO's prompts with ``policy``, have the answers ranked, and add the older rankings.

    Args:
        earlier: the last round's file of all rankings; None: those of ``reward.data``.
        labeller: ranks the answers; None: people do, in folder/rankings.jsonl.

    Returns:
        folder/all_rankings.jsonl, old rankings and new ones.

    Raises:
        RankingsNeeded: there is no labeller and no folder/rankings.jsonl yet.
    """
    unranked, ranked, everything = (folder / f"{name}.jsonl" for name in ("to_rank", "rankings", "all_rankings"))
    if not unranked.exists():
        rows = _draw(config, policy, ppo, world, tokenizer, engine, seed, metrics)
        if world.is_main:
            rewrite(unranked, rows)
    world.barrier()

    def join() -> None:
        if labeller is not None:
            rewrite(ranked, _label(_read(unranked), labeller, tokenizer))
        if ranked.exists():
            old = DataConfig(path=str(earlier)) if earlier is not None else reward.data
            new = DataConfig(path=str(ranked))
            rewrite(everything, [*_ranking_rows(old), *_ranking_rows(new)])
            metrics.note(f"{len(_read(everything))} rankings in {everything}")

    world.from_main(join)
    if not ranked.exists():
        raise RankingsNeeded(
            f"{unranked} holds {config.samples} answers to each prompt. Rank them: add to every line "
            f'"ranks": [...] (1 is best, equal numbers are ties) or "scores": [...] (higher is better), '
            f"save the file as {ranked}, and run the same command again"
        )
    return everything


def _draw(
    config: RankingConfig,
    policy: Path,
    ppo: PPOConfig,
    world: World,
    tokenizer: Tokenizer,
    engine: EngineConfig,
    seed: int,
    metrics: Metrics,
) -> list[dict[str, Any]]:
    """Rows {prompt | messages, responses} of the whole world, in the prompts' order."""
    records, _ = read_prompts(ppo.prompts)
    prompts, _ = encode_prompts(records, tokenizer, ppo.prompt_rule)
    chosen = random.Random(seed).sample(prompts, min(config.prompts, len(prompts)))
    model = HybridEngine(
        CausalLM.from_pretrained(policy), engine, world=world, max_batch=config.batch_size * config.samples
    )
    sampling = Sampling(max_new_tokens=ppo.max_new_tokens, temperature=ppo.temperature, seed=seed)
    rows: list[dict[str, Any]] = []
    with metrics.progress(len(chosen), "samples to rank") as bar:
        for first in range(0, len(chosen), config.batch_size * world.size):
            everyone = list(range(first, min(first + config.batch_size * world.size, len(chosen))))
            mine = shard(everyone, world.rank, world.size)
            part = sample_answers(
                model.generate,
                tokenizer,
                [chosen[i] for i in mine],
                sampling,
                n=config.samples,
                first_id=mine[0] * config.samples if mine else 0,
            )
            rows += [_distinct(row) for rank in world.gather(part) for row in rank]
            bar.advance(len(everyone))
    model.close()
    return rows


def _distinct(row: dict[str, Any]) -> dict[str, Any]:
    """Without empty answers, which nobody can rank."""
    return {**{k: v for k, v in row.items() if k != "finish"}, "responses": [r for r in row["responses"] if r.strip()]}


def _label(rows: Iterable[dict[str, Any]], labeller: Labeller, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    ranked = []
    for row in rows:
        if len(row["responses"]) < 2:
            continue
        scores = [float(score) for score in labeller(prompt_text(row, tokenizer), list(row["responses"]))]
        if len(scores) != len(row["responses"]):
            raise ValueError(f"labeller: expected {len(row['responses'])} scores, found {len(scores)}")
        ranked.append({**row, "scores": scores})
    return ranked


def _ranking_rows(config: DataConfig) -> list[dict[str, Any]]:
    rankings, _ = read_rankings(config)
    return [{**prompt_part(r.prompt), "responses": list(r.responses), "ranks": list(r.ranks)} for r in rankings]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
