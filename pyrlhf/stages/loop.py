"""What the loops of all stages share: resuming, counting, logging, saving; drawing batches; a language-model minibatch."""

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

from pyrlhf.data import EpochSampler, pack, share_by_tokens
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
    def prompts(self) -> list[list[int]]:
        return [tokens[:length] for tokens, length in zip(self.tokens, self.prompt_lengths, strict=True)]

    @property
    def targets(self) -> int:
        """Tokens that carry a loss."""
        return sum(len(t) - max(p, 1) for t, p in zip(self.tokens, self.prompt_lengths, strict=True))

    @property
    def longest(self) -> int:
        return max(map(len, self.tokens))


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
    show_every: int = 0,
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
        show_every: steps between printed lists of all numbers; 0 prints none.
        state: what else a checkpoint holds; updated in place when one is loaded.
        before: called once before step 0, not when resuming.
        after: called after each step with the number of finished steps (evaluation, sample tables).
    """
    state = {} if state is None else state
    first = _resume(engines, folder, state)
    metrics.truncate_after(first if first else -1)  # lines of step 0 come from `before`, which runs again
    if first:
        metrics.note(f"going on from step {first} of {total}")
    elif before is not None:
        before()
    with metrics.progress(total, description, completed=first) as bar:
        for k in range(first, total):
            began = time.perf_counter()
            forget_peak_memory()
            numbers, tokens = step(k)
            seconds = time.perf_counter() - began
            phases = [peak for name, peak in numbers.items() if name.startswith("peak_memory_gib/")]
            numbers |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
            numbers["peak_memory_gib"] = max([peak_memory_gib(), *phases])
            numbers["skipped_steps"] = sum(engine.skipped_steps for engine in engines.values())
            metrics.log(k + 1, numbers, show=bool(show_every) and k % show_every == 0)
            bar.advance(1, tokens=tokens)
            if after is not None:
                after(k + 1)
            if save_every and (k + 1) % save_every == 0 and k + 1 < total:
                save_snapshot(folder / "checkpoint", k + 1, engines, {"step": k + 1, **state})


def _resume(engines: Mapping[str, ZeroEngine], folder: Path, state: dict[str, Any]) -> int:
    """Load the last checkpoint into `engines` and `state`; the number of steps it has behind it, 0 without one."""
    snapshot = latest(folder / "checkpoint")
    if snapshot is None:
        return 0
    state |= load_snapshot(snapshot, engines)
    return int(state.pop("step"))


def peak_memory_gib() -> float:
    """Largest memory since `forget_peak_memory`: what torch had allocated of the GPU where it is in use, else what this process held."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak_memory() -> None:
    """Measure anew from here. Where the system cannot (outside Linux), the largest so far stays."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Stopwatch:
    """Seconds and peak memory of each phase of a step, and its tokens a second."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, tokens: int | None = None) -> None:
        """The phase that ends here, with the tokens it handled if they are to be counted."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.numbers |= {f"seconds/{phase}": seconds, f"peak_memory_gib/{phase}": peak_memory_gib()}
        forget_peak_memory()
        if tokens is not None:
            self.numbers[f"tokens_per_second/{phase}"] = tokens / max(seconds, 1e-9)


def draws(items: int, count: int, *, seed: int) -> Callable[[int], list[int]]:
    """k -> the k-th `count` indices of an endless row of shuffled epochs over `items`. Unlike an epoch's last batch, all are full."""
    sampler = EpochSampler(items, 1, seed=seed)
    return lambda k: [sampler.batch(i)[0] for i in range(k * count, (k + 1) * count)]


def microbatches(batch: Sequences, budget: int, world: World) -> Iterator[tuple[Sequences, bool, bool]]:
    """This rank's share of a minibatch in micro-batches of at most `budget` tokens: (examples, idle, last)."""
    plan = share_by_tokens([len(t) for t in batch.tokens], budget, rank=world.rank, world_size=world.size)
    for i, indices in enumerate(plan):
        yield (batch.select(indices) if indices else IDLE), not indices, i == len(plan) - 1


def language_model_step(engine: ZeroEngine, batch: Sequences, budget: int) -> tuple[dict[str, float], int]:
    """One optimizer step on the mean next-token loss of a minibatch; its numbers and tokens."""
    loss = backward_language_model(engine, batch, budget)
    report = engine.step()
    numbers = {"loss": loss, "perplexity": perplexity(loss), "grad_norm": report.grad_norm, "lr": report.lr}
    return numbers, sum(map(len, batch.tokens))


def backward_language_model(engine: ZeroEngine, batch: Sequences, budget: int, *, coef: float = 1.0) -> float:
    """Accumulate the gradient of coef · (mean next-token loss of the minibatch over the world); returns the mean loss, in nats."""
    total, weight = torch.zeros((), dtype=torch.float64, device=engine.device), 1.0 / max(batch.targets, 1)
    for examples, idle, last in microbatches(batch, budget, engine.world):
        loss = _loss(engine, examples, 0.0 if idle else weight, engine.device)
        engine.backward(coef * loss, last=last)
        total += loss.detach()
    return float(engine.world.sum(total))


def evaluate_language_model(engine: ZeroEngine, data: Sequences, budget: int) -> float:
    """Mean next-token loss over `data`, in nats a token."""
    total, weight = torch.zeros((), dtype=torch.float64, device=engine.device), 1.0 / max(data.targets, 1)
    with torch.no_grad():
        for examples, idle, _ in microbatches(data, budget, engine.world):
            total += _loss(engine, examples, 0.0 if idle else weight, engine.device)
    return float(engine.world.sum(total))


def _loss(forward: Forward, examples: Sequences, weight: float, device: torch.device) -> torch.Tensor:
    prompt_lengths = torch.tensor(examples.prompt_lengths)
    return language_model_loss(forward, pack(examples.tokens), prompt_lengths, weight, device=device)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    with contextlib.suppress(OverflowError):
        return math.exp(loss)
    return math.inf
