"""Generation: ours against transformers and CTranslate2, against the machine's limits, and against itself without its ideas.

    python bench_rollout.py [throughput | decode | stories | continuous | shared | exact ...] [--prompts N ...] [--new-tokens N]
        [--dtypes bf16 fp32] [--max-batch N] [--longest N] [--rounds N]
    python bench_rollout.py [gpt | llama | agreement ...] [--small]     # on a GPU

Random weights made on the spot; transformers and CTranslate2 read the same files. Every response has all its tokens (no
end-of-sequence token) except in "continuous". Tokens are drawn from the whole distribution at temperature 1. transformers
generates in a process of its own, with torch's own memory settings; CTranslate2 in the interpreter that PYRLHF_BENCH_PEERS
names (see peers/README.md). Greedy responses of ours and transformers', float32, must be equal.

throughput  GPT-2 small, 16 prompts of 64, and 1; 64 new tokens, the prompts' forward included.
            Targets at 16: 5 times transformers in bfloat16, 10 times in float32, 2.5 times CTranslate2 in int8.
decode      the same without the prompts' forward, against the roofline: the larger of weight bytes at this machine's read
            speed and operations at its best matrix product's. Only matrices that a step must use are counted, no attention.
            Target: half of it. llama.cpp's batched bench on such a machine, decode alone and without sampling, made 323
            tokens/s of 16 sequences and 95 of one in bfloat16, 276 and 47 in float32: aims 2 and 1.2 times that.
stories     stories260k, float32, 64 prompts, 128 new tokens. Target: 6 times transformers.
continuous  64 prompts, response lengths geometric with mean 64, at most 256: GPT-2 small's layers with a vocabulary of 64 from
            which every token is drawn alike, one of them the end of sequence. Target: 1.8 times our engine without
            continuous batching, which starts the next `max_batch` prompts when the last of these has ended; its ended rows
            leave the batch, or, as in a static batch, are computed until the last has ended.
shared      8 samples of one 512-token prompt against 8 prompts of that length: the first token after a third of the time,
            a quarter of the pages at most.
exact       what training by the sampler's kernels costs, and how far the log-probs of the two are apart with and without.

On a GPU, models of a billion random weights, bfloat16, everything in one run (--small: tiny models of the same kind, anywhere):

gpt         OPT-1.3B's shape, 8 prompts of 256, 128 new tokens. Aims: 180 ms (DeepSpeed reports 360.8 ms on an H100 for its hybrid
            engine with CUDA graphs, its pull request 8271), 5 times transformers.
llama       Llama 3.2 1B's shape, 256 prompts of 64, response lengths geometric with mean 256, at most 1024: one token in 256 ends.
            Aim: the bytes of weights and of keys and values that its steps read pass at 60 % of the copy speed, prompts included.
agreement   how far the sampler's log-probs are from those of training's forward, 32 prompts of 64, 128 new tokens. Aim: 5e-3 nats on
            the mean. Beside it how far training's forward in bfloat16 is from that in float32, which is what rounding does.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import (
    DEVICE,
    GEMM,
    ON_GPU,
    READ,
    Candidate,
    NotMeasured,
    best_gemm,
    in_own_process,
    in_peers,
    llama_shape,
    memory_read,
    report,
    save,
    with_random_weights,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.utils import logging

from pyrlhf import CausalLM, EngineConfig, HybridEngine, ModelConfig
from pyrlhf.engine import OptimizerConfig
from pyrlhf.rlhf.experience import Experience, Responses, assemble
from pyrlhf.rollout import Generator, Rollouts, Sampling
from pyrlhf.stages.loop import forget_peak_memory, peak_memory_gib

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Prompts = list[list[int]]


def random_prompts(count: int, length: int, vocabulary: int) -> Prompts:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def gpt2(folder: str) -> str:
    """GPT-2 small with random weights."""
    CausalLM(ModelConfig.preset("gpt2")).save_pretrained(folder)
    return folder


def all_tokens(count: int) -> Sampling:
    return Sampling(max_new_tokens=count, eos_id=-1)


# -- ways to generate --------------------------------------------------------------------------------------------------------


def ours(generator: Generator, prompts: Prompts, sampling: Sampling, n: int = 1) -> Candidate:
    """Generation of ours; beside it what packing the weights took, the first time, and the prompts' forward in the last run."""
    extra: dict[str, float] = {}

    def run() -> Rollouts:
        out = generator.generate(prompts, sampling, n=n)
        extra.setdefault("refresh_ms", 1e3 * out.timings.refresh_seconds)
        extra["prefill_ms"] = 1e3 * out.timings.prefill_seconds
        return out

    return Candidate(run, extra=extra, tokens=len(prompts) * n * sampling.max_new_tokens)


def theirs(
    folder: str, dtype: torch.dtype, prompts: Prompts, new_tokens: int, sample: bool = True
) -> Callable[[], Prompts]:
    """Generation of transformers; it returns the responses."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompts)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    torch.manual_seed(0)

    def run() -> Prompts:
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **how)
        if out.shape[1] != tokens.shape[1] + new_tokens:
            raise RuntimeError(f"expected {new_tokens} new tokens, found {out.shape[1] - tokens.shape[1]}")
        return out[:, tokens.shape[1] :].tolist()

    return run


def check(folder: str | Path, prompts: Prompts, new_tokens: int) -> None:
    """The same greedy tokens in float32."""
    greedy = replace(all_tokens(new_tokens), temperature=0.0)
    out = Generator(CausalLM.from_pretrained(folder)).generate(prompts, greedy)
    found = [out.response(i) for i in range(len(out))]
    if found != theirs(str(folder), torch.float32, prompts, new_tokens, sample=False)():
        raise RuntimeError("greedy responses differ from transformers'")


# -- the cases ---------------------------------------------------------------------------------------------------------------


def throughput(given: argparse.Namespace) -> None:
    vocabulary, threads = ModelConfig.preset("gpt2").vocab_size, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        gpt2(folder)
        check(folder, random_prompts(2, 64, vocabulary), 16)
        for count in given.prompts:
            prompts = random_prompts(count, 64, vocabulary)
            candidates, absent = {}, {}
            for name, dtype in DTYPES.items():
                generator = Generator(CausalLM.from_pretrained(folder, dtype=dtype), max_batch=count)
                candidates[f"pyrlhf {name}"] = ours(generator, prompts, all_tokens(given.new_tokens))
            for name, dtype in DTYPES.items():
                alone = in_own_process(theirs, folder, dtype, prompts, given.new_tokens)
                candidates[f"transformers {name}"] = Candidate(alone, tokens=count * given.new_tokens)
            sizes = ("--prompts", count, "--prompt-tokens", 64, "--new-tokens", given.new_tokens)
            try:
                run = in_peers("ct2_generate.py", folder, *sizes, "--threads", threads)
                candidates["CTranslate2 int8"] = Candidate(run, tokens=count * given.new_tokens)
            except NotMeasured as why:
                absent["CTranslate2 int8"] = str(why)
            case = f"GPT-2 small, {many(count)} of 64, {given.new_tokens} new tokens"
            report("rollout", case, candidates, "pyrlhf bf16", absent=absent, rounds=given.rounds, warm=False)


def many(prompts: int) -> str:
    return f"{prompts} prompt{'s' if prompts > 1 else ''}"


def decode(given: argparse.Namespace) -> None:
    config = ModelConfig.preset("gpt2")
    steps = given.new_tokens - 1  # the first token comes from the prompts' forward
    for count, name in itertools.product(given.prompts, given.dtypes):
        dtype = DTYPES[name]
        model = CausalLM(config, dtype=dtype)
        numbers = matrix_numbers(model)
        way = ours(
            Generator(model, max_batch=count), random_prompts(count, 64, config.vocab_size), all_tokens(steps + 1)
        )
        way.part = lambda out: 1e3 * out.timings.decode_seconds
        way.tokens, way.bytes, way.flops = count * steps, steps * numbers * dtype.itemsize, 2 * numbers * count * steps
        candidates = {"pyrlhf": way, READ: memory_read(), GEMM: best_gemm(dtype, times=20)}
        case = f"GPT-2 small {name}, {many(count)} of 64, {given.new_tokens} new tokens, decode alone"
        timings = report("rollout", case, candidates, "pyrlhf", rounds=given.rounds, warm=False)
        reading = way.bytes * timings[READ].median / candidates[READ].bytes
        multiplying = way.flops * timings[GEMM].median / candidates[GEMM].flops
        show_roofline(case, steps, reading, multiplying, timings["pyrlhf"].median)


def matrix_numbers(model: CausalLM) -> int:
    """Numbers in the matrices that one step multiplies by, each counted once: the layers' and the head's."""
    layers = sum(p.numel() for p in model.trunk.layers.parameters() if p.ndim == 2)
    return layers + model.head.weight.numel()


def show_roofline(case: str, steps: int, reading: float, multiplying: float, ours_ms: float) -> None:
    table = Table(title=f"Roofline: {case}", title_justify="left")
    headings = ("reading the weights", "products", "the larger", "ours", "ours reaches")
    limit = max(reading, multiplying)
    for heading in headings:
        table.add_column(heading, justify="right")
    times = [f"{ms / steps:.2f} ms a step" for ms in (reading, multiplying, limit, ours_ms)]
    table.add_row(*times, f"{100 * limit / ours_ms:.0f} %")
    Console(width=120).print(table)
    found = {"reading_ms": reading, "products_ms": multiplying, "ours_ms": ours_ms}
    row = {name: round(ms / steps, 3) for name, ms in found.items()}
    save("rollout", f"{case}, roofline", [{"way": "a step", **row, "share_of_roofline": round(limit / ours_ms, 3)}])


def stories(given: argparse.Namespace) -> None:
    if not STORIES.is_dir():
        print(f"stories260k: not measured: no checkpoint at {STORIES}")
        return
    model = CausalLM.from_pretrained(STORIES)
    count, length, new_tokens = 64, 16, 128
    prompts = random_prompts(count, length, model.config.vocab_size)
    check(STORIES, prompts[:4], 32)
    alone = in_own_process(theirs, str(STORIES), torch.float32, prompts, new_tokens)
    candidates = {
        "pyrlhf": ours(Generator(model, max_batch=count), prompts, all_tokens(new_tokens)),
        "transformers": Candidate(alone, tokens=count * new_tokens),
    }
    case = f"stories260k fp32, {count} prompts of {length}, {new_tokens} new tokens"
    report("rollout", case, candidates, "pyrlhf", rounds=max(given.rounds, 5))


# -- against ourselves -------------------------------------------------------------------------------------------------------


def flat_model(dtype: torch.dtype, vocabulary: int = 64) -> CausalLM:
    """GPT-2 small's layers before a small vocabulary. Its last norm is scaled down until all tokens are about as likely."""
    model = CausalLM(replace(ModelConfig.preset("gpt2"), vocab_size=vocabulary, bos_id=None, eos_id=0), dtype=dtype)
    assert model.trunk.norm is not None
    model.trunk.norm.weight.data.mul_(0.02)
    return model


def chunks(generator: Generator, prompts: Prompts) -> list[range]:
    """What an engine without continuous batching has in its batch, one chunk after the other."""
    size = generator.max_batch
    return [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]


def in_chunks(generator: Generator, prompts: Prompts, sampling: Sampling) -> list[Rollouts]:
    """The next chunk starts when all of the last have ended; the ended ones leave the batch."""
    return [
        generator.generate([prompts[i] for i in chunk], sampling, sample_ids=chunk)
        for chunk in chunks(generator, prompts)
    ]


def in_static_chunks(generator: Generator, prompts: Prompts, most: list[int]) -> None:
    """The same, but ended rows are computed until the last of their chunk has ended."""
    for chunk, length in zip(chunks(generator, prompts), most, strict=True):
        generator.generate([prompts[i] for i in chunk], all_tokens(length), sample_ids=chunk)


def continuous(given: argparse.Namespace) -> None:
    for name in given.dtypes:
        continuous_batching(name, given.max_batch, given.longest, given.rounds)


def continuous_batching(dtype: str, max_batch: int, longest: int, rounds: int) -> None:
    count, length, sampling = 64, 32, Sampling(max_new_tokens=longest)
    generator = Generator(flat_model(DTYPES[dtype]), max_batch=max_batch)
    prompts = random_prompts(count, length, generator.policy.config.vocab_size)
    together, apart = generator.generate(prompts, sampling), in_chunks(generator, prompts, sampling)
    if not torch.equal(together.tokens, torch.cat([part.tokens for part in apart])):
        raise RuntimeError("a response depends on the responses beside it")
    most = [int(part.response_lengths.max()) for part in apart]
    mean = float(together.response_lengths.float().mean())
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "pyrlhf": (lambda: generator.generate(prompts, sampling), together.timings.steps),
        "chunk after chunk": (
            lambda: in_chunks(generator, prompts, sampling),
            sum(part.timings.steps for part in apart),
        ),
        "chunk after chunk, ended rows stay": (
            lambda: in_static_chunks(generator, prompts, most),
            sum(length - 1 for length in most),
        ),
    }
    tokens = int(together.response_lengths.sum())
    candidates = {way: Candidate(run, tokens=tokens, extra={"steps": steps}) for way, (run, steps) in runs.items()}
    case = f"GPT-2 small's layers {dtype}, {count} prompts of {length}, {mean:.0f} new tokens of 1-{longest}, {max_batch} at a time"
    report("rollout", case, candidates, "pyrlhf", rounds=rounds, warm=False)


def shared(given: argparse.Namespace) -> None:
    samples, length = 8, 512
    model = CausalLM(ModelConfig.preset("gpt2"), dtype=torch.bfloat16)
    prompts = random_prompts(samples, length, model.config.vocab_size)
    sampling = all_tokens(given.new_tokens)
    ways = {f"{samples} samples of one prompt": (prompts[:1], samples), f"{samples} prompts": (prompts, 1)}
    case = f"GPT-2 small bf16, {samples} responses to prompts of {length}, {given.new_tokens} new tokens"
    for what, part in {"all of it": None, "to the first token": first_token_ms}.items():
        candidates = {}
        for name, (asked, n) in ways.items():
            candidate = ours(Generator(model, max_batch=samples), asked, sampling, n=n)
            candidate.extra["peak_pages"] = candidate.run().timings.peak_pages
            candidate.part, candidate.tokens = part, candidate.tokens if part is None else 0
            candidates[name] = candidate
        report("rollout", f"{case}, {what}", candidates, next(iter(ways)), rounds=given.rounds, warm=False)


def exact(given: argparse.Namespace) -> None:
    count, length = 16, 64
    prompts = random_prompts(count, length, ModelConfig.preset("gpt2").vocab_size)
    for name in given.dtypes:
        candidates = {}
        for way, same_kernels in (("pyrlhf", False), ("pyrlhf, exact", True)):
            config = EngineConfig(device="cpu", dtype=name, exact=same_kernels)
            engine = HybridEngine(CausalLM(ModelConfig.preset("gpt2")), config, OptimizerConfig())
            out = engine.generate(prompts, all_tokens(given.new_tokens))
            e = assemble(Responses.of(out), torch.zeros(count))

            def run(engine: HybridEngine = engine, e: Experience = e) -> torch.Tensor:
                logprobs, _ = engine(e.tokens, e.positions, e.cu_seqlens, rows=e.rows, targets=e.targets)
                engine.backward(-logprobs.mean(), last=False)
                return logprobs.detach()

            delta = (run() - out.logprobs).abs()
            apart = {"mean_micronats": 1e6 * float(delta.mean()), "max_micronats": 1e6 * float(delta.max())}
            candidates[way] = Candidate(run, extra=apart)
        case = f"GPT-2 small {name}, {count} x {length} + {given.new_tokens} tokens, forward and backward"
        report("rollout", case, candidates, "pyrlhf", rounds=given.rounds, warm=False)


def first_token_ms(out: Rollouts) -> float:
    return 1e3 * out.timings.first_token_seconds


# -- on a GPU ----------------------------------------------------------------------------------------------------------------


def with_peak(make: Callable[[], Candidate]) -> Candidate:
    """What ``make`` gives, and beside it the largest memory of its first run and all that it holds."""
    held = torch.cuda.memory_allocated() / 2**30 if ON_GPU else 0.0
    candidate = make()
    forget_peak_memory()
    candidate.run()
    candidate.extra["peak_gib"] = peak_memory_gib() - held
    return candidate


def gpt(given: argparse.Namespace) -> None:
    width, layers, heads, vocabulary = (64, 2, 4, 512) if given.small else (2048, 24, 32, 50_272)
    count, length, new_tokens = (4, 16, 8) if given.small else (8, 256, 128)
    shape = ModelConfig(vocabulary, width, layers, heads, max_positions=2048, activation="relu")
    prompts = random_prompts(count, length, vocabulary)

    def own() -> Candidate:
        model = with_random_weights(CausalLM(shape, dtype=torch.bfloat16, device="meta"))
        return ours(Generator(model, max_batch=count), prompts, all_tokens(new_tokens))

    candidates = {
        "pyrlhf": with_peak(own),
        "transformers": with_peak(lambda: Candidate(opt(shape, prompts, new_tokens), tokens=count * new_tokens)),
    }
    case = f"OPT, width {width}, {layers} layers, bf16, {many(count)} of {length}, {new_tokens} new tokens"
    aims = {"median_ms": 180.0, "transformers": 5.0}
    report("rollout", case, candidates, "pyrlhf", aims=aims, rounds=given.rounds, budget=30.0, warm=False)


def opt(shape: ModelConfig, prompts: Prompts, new_tokens: int) -> Callable[[], object]:
    """transformers' OPT of this shape, its weights random."""
    config = OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        word_embed_proj_dim=shape.hidden_size,
        ffn_dim=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
    )
    with torch.device(DEVICE):
        model = OPTForCausalLM(config).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompts, device=DEVICE)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}

    def run() -> None:
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **how)
        if out.shape[1] != tokens.shape[1] + new_tokens:
            raise RuntimeError(f"expected {new_tokens} new tokens, found {out.shape[1] - tokens.shape[1]}")

    return run


def llama(given: argparse.Namespace) -> None:
    count, length, mean, longest = (16, 8, 16, 64) if given.small else (256, 64, 256, 1024)
    config = llama_shape(given.small)
    prompts = random_prompts(count, length, config.vocab_size)
    sampling = Sampling(max_new_tokens=longest, eos_id=-1, stop_ids=tuple(range(config.vocab_size // mean)))

    def own() -> Candidate:
        model = with_random_weights(CausalLM(config, dtype=torch.bfloat16, device="meta"))
        assert model.trunk.norm is not None
        model.trunk.norm.weight.data.mul_(0.02)  # all tokens are about as likely, so that one in `mean` ends
        way = ours(Generator(model, max_batch=count), prompts, sampling)
        way.bytes = matrix_numbers(model) * 2  # of a step
        return way

    way = with_peak(own)
    out = way.run()
    lengths = out.response_lengths
    seen = int((lengths * length + lengths * (lengths - 1) // 2 - length).sum())  # keys that all steps look back on
    way.bytes = out.timings.steps * way.bytes + seen * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    way.tokens, way.extra["steps"] = int(lengths.sum()), out.timings.steps
    case = (
        f"Llama, width {config.hidden_size}, {config.num_layers} layers, bf16, {many(count)} of {length}, "
        f"{float(lengths.float().mean()):.0f} new tokens of 1-{longest}"
    )
    aims = {"share_of_copy": 0.6}
    report("rollout", case, {"pyrlhf": way}, "pyrlhf", aims=aims, rounds=given.rounds, warm=False)


def agreement(given: argparse.Namespace) -> None:
    count, length, new_tokens = (4, 8, 16) if given.small else (32, 64, 128)
    config = llama_shape(given.small)
    model = with_random_weights(CausalLM(config, dtype=torch.bfloat16, device="meta"))
    generator = Generator(model, max_batch=count)
    out = generator.generate(random_prompts(count, length, config.vocab_size), all_tokens(new_tokens))
    e = assemble(Responses.of(out), torch.zeros(count)).to(DEVICE)

    def trained_view() -> torch.Tensor:
        logprobs, _ = model(e.tokens, e.positions, e.cu_seqlens, rows=e.rows, targets=e.targets)
        return logprobs.detach()

    seen = trained_view()
    delta, apart = (seen.cpu() - out.logprobs).abs(), {}
    apart["mean_micronats"], apart["max_micronats"] = 1e6 * float(delta.mean()), 1e6 * float(delta.max())
    rounding = (seen - trained_view_in_float32(model, trained_view)).abs().mean()
    apart["rounding_micronats"] = 1e6 * float(rounding)
    case = f"Llama, width {config.hidden_size}, bf16, {count} x {length} + {new_tokens} tokens, training's forward"
    way = Candidate(trained_view, extra=apart, tokens=len(e.tokens))
    report("rollout", case, {"pyrlhf": way}, "pyrlhf", aims={"mean_micronats": 5e3}, rounds=given.rounds)


def trained_view_in_float32(model: CausalLM, view: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The same by the same weights with float32 in between."""
    model.float()
    try:
        with torch.no_grad():
            return view()
    finally:
        model.bfloat16()


ANYWHERE = (throughput, decode, stories, continuous, shared, exact)
FOR_A_GPU = (gpt, llama, agreement)
CASES = {case.__name__: case for case in (*ANYWHERE, *FOR_A_GPU)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    usual = [case.__name__ for case in (FOR_A_GPU if ON_GPU else ANYWHERE)]
    parser.add_argument("cases", nargs="*", default=usual, help=" ".join(CASES))
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[16, 1], help="numbers of prompts in throughput, decode"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), help="of decode and continuous")
    parser.add_argument("--new-tokens", type=int, default=64, help="at least 2; in throughput, decode, shared")
    parser.add_argument("--max-batch", type=int, default=16, help="sequences decoded together in continuous")
    parser.add_argument("--longest", type=int, default=256, help="longest response in continuous")
    parser.add_argument("--rounds", type=int, default=3 if ON_GPU else 5, help="at least 2")
    parser.add_argument("--small", action="store_true", help="tiny models in gpt, llama and agreement")
    given = parser.parse_args()
    for name in given.cases:
        CASES[name](given)
