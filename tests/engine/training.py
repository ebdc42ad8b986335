"""A tiny model, its data and a training loop that the tests of one process and of two share. As a script it is one of two ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrlhf.engine import Ema, EngineConfig, HybridEngine, OptimizerConfig, World, ZeroEngine, init_world
from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
from pyrlhf.rollout import Sampling

# Large enough that ZeRO 3 really shards (weights under 10,000 numbers stay whole).
CONFIG = ModelConfig(vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, max_positions=48, norm="rms", eos_id=3)
STEPS = 3


def sequences(step: int) -> list[list[int]]:
    """The six sequences of one update, of unequal lengths."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = [7, 12, 3, 9, 5, 16]
    return [torch.randint(4, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def packed(batch: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions, cu_seqlens"""
    lengths = torch.tensor([len(s) for s in batch])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return torch.tensor([t for s in batch for t in s]), positions, cu_seqlens


def language_loss(engine: ZeroEngine, batch: list[list[int]]) -> Tensor:
    """Summed negative log-probs of each sequence's next tokens."""
    tokens, positions, cu_seqlens = packed(batch)
    rows = torch.cat([torch.arange(int(a), int(b) - 1) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)])
    logprob, _ = engine(tokens, positions, cu_seqlens, rows=rows, targets=tokens[rows + 1], temperature=0.7)
    return -logprob.sum()


def scalar_loss(engine: ZeroEngine, batch: list[list[int]]) -> Tensor:
    """Squared error of each token's score to a number made from its id."""
    tokens, positions, cu_seqlens = packed(batch)
    return ((engine(tokens, positions, cu_seqlens) - (tokens % 5).float()) ** 2).sum()


def update(engine: ZeroEngine, loss_of: Callable[..., Tensor], step: int, factor: float = 1.0) -> Any:
    """One update; ranks hold different numbers of micro-batches, of 1 sequence on the first rank and 2 on the last."""
    world = engine.world
    batch = sequences(step)
    mine = batch[world.rank :: world.size]
    size = 1 + world.rank
    parts = [mine[i : i + size] for i in range(0, len(mine), size)]
    tokens = world.sum(float(sum(len(s) for s in mine)))
    total = world.max(len(parts))
    for i in range(total):
        weight = factor / tokens if i < len(parts) else 0.0
        engine.backward(loss_of(engine, parts[min(i, len(parts) - 1)]) * weight, last=i == total - 1)
    return engine.step()


def make(
    kind: str, world: World, stage: int, dtype: str = "fp32", seed: int = 1, lr: float = 1e-3, **settings: Any
) -> ZeroEngine:
    config = EngineConfig(device="cpu", dtype=dtype, zero_stage=stage, **settings)
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.1, max_grad_norm=1.0, schedule="cosine", warmup_steps=1)
    if kind == "scalar":
        return ZeroEngine(ScalarModel(CONFIG, seed=seed), world, config, optimizer, total_steps=10)
    return HybridEngine(CausalLM(CONFIG, seed=seed), config, optimizer, total_steps=10, world=world)


LOSSES = {"lm": language_loss, "scalar": scalar_loss}


def train(kind: str, world: World, stage: int) -> dict[str, Any]:
    """Three updates; weights, average, gradient norms and (lm) greedy and drawn samples afterwards."""
    engine = make(kind, world, stage)
    ema = Ema(engine, decay=0.5)
    norms = []
    for step in range(STEPS):
        norms.append(update(engine, LOSSES[kind], step).grad_norm)
        ema.update()
    result: dict[str, Any] = {"norms": norms, "weights": engine.full_state_dict()}
    with ema.swapped():
        result["average"] = engine.full_state_dict()
    result["unchanged"] = _equal(engine.full_state_dict(), result["weights"])
    result["scores"] = world.gather(score(engine))
    if isinstance(engine, HybridEngine):
        result["rollouts"] = world.gather(generate(engine))
        result["after"] = update(engine, LOSSES[kind], STEPS).grad_norm
    engine.close()
    return result


def score(engine: ZeroEngine) -> Tensor:
    with torch.no_grad():
        return engine(*packed(sequences(0)))


def generate(engine: HybridEngine) -> list[tuple[list[int], int, str]]:
    """(response, sample id, finish) of this rank's share of five prompts; ranks have different numbers of them."""
    share = range(engine.world.rank, 5, engine.world.size)
    prompts = [sequences(0)[i][:4] for i in share]
    out = engine.generate(prompts, Sampling(max_new_tokens=6 + engine.world.rank, seed=7), sample_ids=list(share))
    return [(out.response(i)[:6], int(out.sample_ids[i]), out.finish[i]) for i in range(len(out))]


def gathers(world: World) -> dict[str, Any]:
    """ZeRO 3: how often one `generate` makes each weight whole, how many are whole afterwards, and how many forwards it ran."""
    engine = make("lm", world, 3)
    assert isinstance(engine, HybridEngine)
    counts: dict[str, int] = {}
    names = {id(p): name for name, p in engine.module.named_parameters()}
    generator: Any = engine._generator
    whole = generator._gather

    def counted(parameters: Any) -> Any:
        for p in parameters:
            counts[names[id(p)]] = counts.get(names[id(p)], 0) + 1
        return whole(parameters)

    generator._gather = counted
    generate(engine)
    sharded = [p for p in engine.module.parameters() if p.ds_numel >= 10_000]  # smaller ones stay whole
    result = {"counts": counts, "whole": sum(p.numel() > 0 for p in sharded), "steps": engine.timings.steps}
    engine.close()
    return result


def wrong_on_one_rank(world: World) -> list[str]:
    """What each rank is told when the last one asks for the impossible, and that the engine is still of use."""
    engine = make("lm", world, 3)
    assert isinstance(engine, HybridEngine)
    try:
        engine.generate([[5]] if world.is_main else [[]], Sampling())
    except ValueError as error:
        said = str(error)
    generate(engine)
    engine.close()
    return world.gather(said)


def one_bad_rank(world: World, stage: int) -> dict[str, Any]:
    """A loss that is not finite on the last rank only, then a good update."""
    engine = make("lm", world, stage)
    update(engine, language_loss, 0)
    before = engine.full_state_dict()
    bad = update(engine, language_loss, 1, float("inf") if world.rank == world.size - 1 else 1.0)
    untouched = _equal(before, engine.full_state_dict())
    good = update(engine, language_loss, 2)
    result = {"reports": world.gather((bad, good)), "untouched": untouched, "skipped": engine.skipped_steps}
    engine.close()
    return result


def from_main(world: World) -> list[tuple[Any, str]]:
    """(a value that the main rank alone computes, the error that the main rank alone meets), as each rank sees them."""

    def compute() -> str:
        return f"made by {world.rank}"

    def fail() -> None:
        raise KeyError("a reward function's own mistake")

    value = world.from_main(compute)
    try:
        world.from_main(fail)
    except (KeyError, RuntimeError) as error:
        return world.gather((value, f"{type(error).__name__}: {error}"))
    return []


def resumed(world: World, stage: int, folder: Path, dtype: str = "fp32") -> dict[str, Any]:
    """Weights and average after four updates straight, and after two, a save, and two by an engine that loaded it."""

    def go(engine: ZeroEngine, ema: Ema, steps: range) -> None:
        for step in steps:
            update(engine, language_loss, step)
            ema.update()

    def end(engine: ZeroEngine, ema: Ema) -> list[dict[str, Tensor]]:
        with ema.swapped():
            average = engine.full_state_dict()
        return [engine.full_state_dict(), average]

    straight = make("lm", world, stage, dtype)
    ema = Ema(straight)
    go(straight, ema, range(2))
    straight.save(folder, {"rank": world.rank, "step": 2})
    go(straight, ema, range(2, 4))
    expected = end(straight, ema)
    straight.close()
    again = make("lm", world, stage, dtype, seed=2)
    ema = Ema(again)
    client = again.load(folder)
    go(again, ema, range(2, 4))
    found = end(again, ema)
    result = {"client": world.gather(client), "steps": again.steps}
    again.close()
    return result | {"equal": [_equal(a, b) for a, b in zip(expected, found, strict=True)]}


def frozen(world: World, stage: int) -> dict[str, Any]:
    """A frozen model beside a trained one: its scores, before and after the other's update."""
    config = EngineConfig(device="cpu", zero_stage=stage)
    reference = ZeroEngine(CausalLM(CONFIG, seed=5), world, config)
    policy = make("lm", world, stage)
    first = score(reference)
    update(policy, language_loss, 0)
    result = {"first": first, "second": score(reference), "whole": reference.full_state_dict()}
    policy.close()
    reference.close()
    return result


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main(folder: Path) -> None:
    """Run everything on two ranks; rank 0 writes what the tests look at."""
    world = init_world(EngineConfig(device="cpu"))
    results: dict[str, Any] = {}
    for stage in range(4):
        for kind in LOSSES:
            results[f"train {kind} {stage}"] = train(kind, world, stage)
        results[f"bad {stage}"] = one_bad_rank(world, stage)
        results[f"resumed {stage}"] = resumed(world, stage, folder / f"stage{stage}")
    results["from main"] = from_main(world)
    results["gathers"] = gathers(world)
    results["wrong"] = wrong_on_one_rank(world)
    results["frozen 3"] = frozen(world, 3)
    if world.is_main:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
