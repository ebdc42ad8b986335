"""One training step of GPT-2 small: forward, PPO's policy loss on the responses, backward; against the same in transformers.

    python bench_training_step.py [float32 | bfloat16] [--tokens N] [--rounds N]

2048 packed tokens in sequences of 64 to 512, a quarter of each the prompt, random weights. Ours runs packed. transformers runs
right-padded with an attention mask and SDPA, once with logits at every position, as trainers commonly do, and once with
logits at the response positions only, the least that its interface allows. Log-probs in float32 and the entropy that
trainers log are part of all three. The losses and the norms of the gradients must agree.

Then what bounds our step: the operations that no implementation can leave out, at the speed of this machine's best matrix
product; and where our step's time goes, by op, from torch.profiler.

Target on 2 cores: 2.5 times faster than transformers in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import GEMM, Candidate, best_gemm, in_own_process, report, save
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from pyrlhf import CausalLM, ops
from pyrlhf.rlhf.losses import response_rows

CLIP = 0.2
SHORTEST, LONGEST = 64, 512


@dataclass
class Batch:
    """Packed sequences, and the same padded; response tokens in the packed order."""

    tokens: Tensor  # int64 [T]
    positions: Tensor
    cu_seqlens: Tensor  # int32 [S + 1]
    rows: Tensor  # int64 [N], where response tokens are predicted
    targets: Tensor  # int64 [N]
    old_logprobs: Tensor  # float32 [N]
    advantages: Tensor
    padded: Tensor  # int64 [S, L]
    mask: Tensor  # int64 [S, L], 1 for tokens
    predicting: Tensor  # bool [S, L], `rows`

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()


def make_batch(tokens_in_all: int, vocabulary: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := tokens_in_all - sum(lengths)) > LONGEST:
        drawn = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        lengths.append(min(drawn, left - SHORTEST))
    lengths.append(left)
    tokens = torch.randint(vocabulary, (tokens_in_all,), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows, _ = response_rows(cu_seqlens, torch.tensor([length // 4 for length in lengths]))
    sequences = tokens.split(lengths)
    at = torch.zeros(tokens_in_all, dtype=torch.bool)
    at[rows] = True
    return Batch(
        tokens,
        torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens,
        rows,
        tokens[rows + 1],
        torch.empty(0),
        torch.randn(len(rows), generator=generator),
        pad_sequence(list(sequences), batch_first=True),
        pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
        pad_sequence(list(at.split(lengths)), batch_first=True),
    )


# -- the steps: each returns the loss after its backward ---------------------------------------------------------------------


def ours(model: CausalLM, batch: Batch) -> Tensor:
    logprobs, _ = model(batch.tokens, batch.positions, batch.cu_seqlens, rows=batch.rows, targets=batch.targets)
    zeros = torch.zeros_like(batch.advantages)
    out = ops.ppo_loss(logprobs, batch.old_logprobs, batch.advantages, zeros, zeros, zeros, clip=CLIP)
    out.policy.backward()
    return out.policy.detach()


def eager_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    log_ratio = logprobs - batch.old_logprobs
    ratio = log_ratio.exp()
    plain, bounded = -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    with torch.no_grad():  # what trainers log
        (bounded > plain).float().mean()
        (ratio - 1 - log_ratio).mean()
    return torch.max(plain, bounded).mean()


def log_entropy(logp: Tensor) -> Tensor:
    with torch.no_grad():
        return -(logp.exp() * logp).sum(-1).mean()


def every_position(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    logits = model(batch.padded, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
    logp = logits.float().log_softmax(-1)
    logprobs = logp.gather(2, batch.padded[:, 1:, None])[..., 0][batch.predicting[:, :-1]]
    log_entropy(logp)
    loss = eager_loss(logprobs, batch)
    loss.backward()
    return loss.detach()


def response_positions(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    hidden = model.transformer(batch.padded, attention_mask=batch.mask, use_cache=False).last_hidden_state
    logp = model.lm_head(hidden[batch.predicting]).float().log_softmax(-1)
    logprobs = logp.gather(1, batch.targets[:, None])[:, 0]
    log_entropy(logp)
    loss = eager_loss(logprobs, batch)
    loss.backward()
    return loss.detach()


def step(way: Callable[[Any, Batch], Tensor], model: torch.nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        return way(model, batch)

    return run


def gradient_norm(model: torch.nn.Module) -> Tensor:
    return torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()


def check(steps: dict[str, tuple[Callable[[], Tensor], torch.nn.Module]], tolerance: float) -> None:
    """The same loss and the same norm of all gradients in every way."""
    found = {name: (run(), gradient_norm(model)) for name, (run, model) in steps.items()}
    for name, (loss, norm) in found.items():
        print(f"{name}: loss {loss:.6f}, gradient norm {norm:.5f}")
    (loss, norm), *others = found.values()
    for other_loss, other_norm in others:
        torch.testing.assert_close(other_loss, loss, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(other_norm, norm, atol=0.0, rtol=10 * tolerance)


# -- what bounds the step ----------------------------------------------------------------------------------------------------


def useful_flops(config: GPT2Config, batch: Batch) -> dict[str, int]:
    """Multiplications and additions of forward and backward that every implementation has to do; nothing is computed twice."""
    width, vocabulary = config.n_embd, config.vocab_size
    pairs = sum(length * (length + 1) // 2 for length in batch.lengths)
    return {
        "linear layers": 3 * 2 * len(batch.tokens) * 12 * width * width * config.n_layer,
        "attention": 6 * 2 * pairs * width * config.n_layer,  # two products forward, four backward
        "LM head": 3 * 2 * len(batch.rows) * width * vocabulary,
    }


def show_bound(case: str, flops: dict[str, int], median_ms: float, gemm_flops_ms: float) -> None:
    table = Table()
    for heading in ("part", "GFLOP", "ms at the best matrix product's speed", "of our step"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    rows = []
    for part, count in {**flops, "all": sum(flops.values())}.items():
        least = count / gemm_flops_ms
        rows.append({"part": part, "gflop": round(count * 1e-9, 1), "least_ms": round(least, 1)})
        table.add_row(part, f"{count * 1e-9:.0f}", f"{least:.0f}", f"{100 * least / median_ms:.0f} %")
    print(f"What bounds it: {case}")
    Console(width=120).print(table)
    save("training_step", f"{case}, bound", rows)


# -- where the time goes -----------------------------------------------------------------------------------------------------


@contextmanager
def named_ops() -> Iterator[None]:
    """Every op of pyrlhf.ops that the model calls runs under the name ``op <name>``."""
    names = [name for name in ops.__all__ if f"{name}_ref" in ops.__all__]
    plain = {name: getattr(ops, name) for name in names}

    def named(name: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with record_function(f"op {name}"):
                return plain[name](*args, **options)

        return run

    for name in names:
        setattr(ops, name, named(name))
    try:
        yield
    finally:
        for name in names:
            setattr(ops, name, plain[name])


def above(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def by_op(events: Any) -> dict[str, float]:
    """Milliseconds by op, backward included: a node of the backward carries the number of the forward that made it."""
    made_by: dict[int, str] = {}
    for event in events:
        ranges = [e.name for e in above(event) if e.name.startswith("op ")]
        if ranges and event.sequence_nr >= 0 and not event.name.startswith("op "):
            made_by[event.sequence_nr] = ranges[-1]
    out: dict[str, float] = defaultdict(float)
    for event in events:
        names = [e.name for e in above(event) if e.name.startswith("op ")]
        nodes = [e for e in above(event) if e.name.startswith("autograd::engine::evaluate_function")]
        if names:
            name = names[-1]
        elif nodes:
            name = made_by.get(nodes[-1].sequence_nr) or nodes[-1].name.rpartition(": ")[2]
        else:
            name = [e.name for e in above(event)][-1]
        out[name.removeprefix("op ")] += event.self_cpu_time_total / 1e3
    return dict(out)


def show_profile(case: str, run: Callable[[], object], least_share: float = 0.004) -> None:
    with named_ops():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
    times = by_op([e for e in profile.events() if e.thread is not None])
    total = sum(times.values())
    table = Table()
    for heading in ("op", "ms", "share"):
        table.add_column(heading, justify="left" if heading == "op" else "right")
    rows = []
    small = sum(ms for ms in times.values() if ms < least_share * total)
    large = {name: ms for name, ms in times.items() if ms >= least_share * total}
    for name, ms in [*sorted(large.items(), key=lambda item: -item[1]), ("everything smaller", small)]:
        rows.append({"op": name, "ms": round(ms, 1), "share": round(ms / total, 3)})
        table.add_row(name, f"{ms:.0f}", f"{100 * ms / total:.1f} %")
    table.add_row("all", f"{total:.0f}", "")
    print(f"Where it goes, forward and backward together: {case}")
    Console(width=120).print(table)
    save("training_step", f"{case}, by op", rows)


# -- the benchmark -----------------------------------------------------------------------------------------------------------


WAYS = {
    "transformers, logits everywhere": every_position,
    "transformers, logits of responses": response_positions,
}


def models(dtype: torch.dtype, tokens: int) -> tuple[CausalLM, GPT2LMHeadModel, Batch]:
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa")
    theirs = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = CausalLM.from_pretrained(folder, dtype=dtype)
    batch = make_batch(tokens, config.vocab_size)
    with torch.no_grad():
        logprobs, _ = model(batch.tokens, batch.positions, batch.cu_seqlens, rows=batch.rows, targets=batch.targets)
        batch.old_logprobs = logprobs + 0.2 * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1))
    return model, theirs.to(dtype).train(), batch


def their_step(way: str, dtype: torch.dtype, tokens: int) -> Callable[[], Tensor]:
    _, theirs, batch = models(dtype, tokens)
    return step(WAYS[way], theirs, batch)


def main(dtype: torch.dtype, tokens: int, rounds: int) -> None:
    model, theirs, batch = models(dtype, tokens)
    steps = {
        "pyrlhf": (step(ours, model, batch), model),
        **{name: (step(way, theirs, batch), theirs) for name, way in WAYS.items()},
    }
    check(steps, tolerance=1e-5 if dtype == torch.float32 else 1e-3)
    flops = useful_flops(theirs.config, batch)
    case = (
        f"GPT-2 small, {tokens} tokens in {len(batch.lengths)} sequences (padded: {batch.padded.numel()}), "
        f"{len(batch.rows)} of responses, {str(dtype).removeprefix('torch.')}"
    )
    candidates = {name: Candidate(run, flops=sum(flops.values())) for name, (run, _) in steps.items()}
    for name in WAYS:
        alone = in_own_process(their_step, name, dtype, tokens)
        candidates[f"{name}, torch's memory settings"] = Candidate(alone, flops=sum(flops.values()))
    candidates[GEMM] = best_gemm(dtype, times=20)
    timings = report("training_step", case, candidates, ours="pyrlhf", rounds=rounds)
    show_bound(case, flops, timings["pyrlhf"].median, candidates[GEMM].flops / timings[GEMM].median)
    show_profile(case, steps["pyrlhf"][0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=2048, help="at least 64")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    given = parser.parse_args()
    for name in given.dtypes:
        main(getattr(torch, name), given.tokens, given.rounds)
