"""What the loops of all stages share: resuming, counting, logging, saving; and a language-model minibatch."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyrlhf.data import pack, share_by_tokens
from pyrlhf.engine import World, ZeroEngine
from pyrlhf.engine.checkpoint import latest, load_snapshot, save_snapshot
from pyrlhf.metrics import Metrics
from pyrlhf.rlhf.losses import Forward, language_model_loss

#: A step's numbers for metrics.jsonl and the tokens it processed.
Step = Callable[[int], tuple[dict[str, float], int]]


@dataclass
class Sequences:
    """Tokenised examples; the first `prompt_lengths[i]` tokens of example i are context without a loss."""

    tokens: list[list[int]]
    prompt_lengths: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, indices: Sequence[int]) -> Sequences:
        return Sequences([self.tokens[i] for i in indices], [self.prompt_lengths[i] for i in indices])

    @property
    def targets(self) -> int:
        """Tokens that carry a loss."""
        return sum(len(t) - max(p, 1) for t, p in zip(self.tokens, self.prompt_lengths, strict=True))


#: What a rank computes, with weight 0, while others still have micro-batches.
IDLE = Sequences([[0, 0]], [1])


def run_steps(
    total: int,
    step: Step,
    *,
    engines: Mapping[str, ZeroEngine],
    folder: Path,
    metrics: Metrics,
    description: str,
    save_every: int = 0,
    state: dict[str, Any] | None = None,
    before: Callable[[], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Run steps 0 .. total-1, going on from the last checkpoint in `folder` if there is one.

    Args:
        total: number of steps.
        step: computes step k and returns its numbers and tokens; everything random in it must be a function of k.
        engines: what a checkpoint holds, by name.
        folder: the stage's folder; checkpoints lie in folder/checkpoint.
        metrics: where the numbers go.
        description: shown beside the progress bar.
        save_every: steps between checkpoints; 0 saves none.
        state: what else a checkpoint holds (JSON types); updated in place when one is loaded.
        before: called once before step 0, not when resuming.
        after: called after each step with the number of finished steps (evaluation, sample tables).
    """
    state = {} if state is None else state
    first = 0
    if (snapshot := latest(folder / "checkpoint")) is not None:
        state |= load_snapshot(snapshot, engines)
        first = state.pop("step")
        metrics.note(f"going on from step {first} of {total}")
    metrics.truncate_after(first)
    if first == 0 and before is not None:
        before()
    with metrics.progress(total, description, completed=first) as bar:
        for k in range(first, total):
            began = time.perf_counter()
            numbers, tokens = step(k)
            numbers["seconds"] = time.perf_counter() - began
            numbers["peak_memory_gib"] = peak_memory_gib()
            metrics.log(k + 1, numbers)
            bar.advance(1, tokens=tokens)
            if after is not None:
                after(k + 1)
            if save_every and (k + 1) % save_every == 0 and k + 1 < total:
                save_snapshot(folder / "checkpoint", k + 1, engines, {"step": k + 1, **state})


def peak_memory_gib() -> float:
    """Largest memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def microbatches(batch: Sequences, budget: int, world: World) -> Iterator[tuple[Sequences, bool, bool]]:
    """This rank's share of a minibatch in micro-batches of at most `budget` tokens: (examples, idle, last)."""
    plan = share_by_tokens([len(t) for t in batch.tokens], budget, rank=world.rank, world_size=world.size)
    for i, indices in enumerate(plan):
        yield (batch.select(indices) if indices else IDLE), not indices, i == len(plan) - 1


def backward_language_model(engine: ZeroEngine, batch: Sequences, budget: int, *, coef: float = 1.0) -> float:
    """Accumulate the gradient of coef · (mean next-token loss of the minibatch over the world); returns the mean loss, in nats."""
    total, tokens = 0.0, batch.targets
    for examples, idle, last in microbatches(batch, budget, engine.world):
        weight = 0.0 if idle else coef / tokens
        loss = _loss(engine, examples, weight, engine.device)
        engine.backward(loss, last=last)
        total += float(loss.detach())
    return float(engine.world.sum(total)) / coef if coef else math.nan


def evaluate_language_model(engine: ZeroEngine, data: Sequences, budget: int) -> float:
    """Mean next-token loss over `data`, in nats a token."""
    total = 0.0
    with torch.no_grad():
        for examples, idle, _ in microbatches(data, budget, engine.world):
            total += float(_loss(engine, examples, 0.0 if idle else 1.0 / data.targets, engine.device))
    return float(engine.world.sum(total))


def _loss(forward: Forward, examples: Sequences, weight: float, device: torch.device) -> torch.Tensor:
    packed = pack(examples.tokens).to(device)
    prompt_lengths = torch.tensor(examples.prompt_lengths, device=device)
    return language_model_loss(forward, packed, prompt_lengths, weight)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    with contextlib.suppress(OverflowError):
        return math.exp(loss)
    return math.inf
