"""What every benchmark shares: interleaved timing, the machine's own copy speed measured in the same run, a table, a JSON file.

Where there is a GPU, everything runs there (`DEVICE`): a run is timed by events on the device, after its L2 cache was filled
with something else; ``CUDA_VISIBLE_DEVICES=`` keeps a benchmark on the CPU. Candidates take turns, so that a slow minute of the
machine hits all of them; ratios of one run are what counts. Every result is judged against the machine: bytes (or operations) a
second, and the share of the speed at which this machine copies memory.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
from pyrlhf.ops import linear
from pyrlhf.ops._core import core
from pyrlhf.ops._memory import keep_freed_memory

_Model = TypeVar("_Model", CausalLM, ScalarModel)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
RESULTS = Path(__file__).resolve().parent / "results"
COPY = "copy (the machine's limit)"
READ = "read (the machine's limit)"
GEMM = "gemm (the machine's limit)"
PEERS = "PYRLHF_BENCH_PEERS"


@dataclass
class Candidate:
    """One way of doing the work. bytes: read plus written by a perfect implementation; flops: of one run.

    tokens: made by one run, for a column of tokens a second. extra: further figures of it that the benchmark has measured
    (``run`` may do so), a column each. part: milliseconds out of what ``run`` returns, where only a part of it counts.
    """

    run: Callable[[], Any]
    bytes: int = 0
    flops: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    part: Callable[[Any], float] | None = None

    def time(self) -> float:
        """Milliseconds of one run."""
        return once(self.run) if self.part is None else self.part(self.run())


@dataclass
class Timing:
    """Milliseconds a run: median, the 20th and 80th percentile as its spread, and the best."""

    median: float
    low: float
    high: float
    best: float


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A run of ``function`` and its backward, for `Candidate`; nothing is added to what the leaves hold already."""
    return lambda: torch.autograd.grad(function(*inputs), inputs, cotangents)


def measure(
    candidates: dict[str, Candidate], rounds: int = 30, budget: float = 60.0, warm: bool = True
) -> dict[str, Timing]:
    """Times the candidates and a memory copy in turn, for ``rounds`` rounds or until ``budget`` seconds are spent (5 at least).

    ``warm``: each timed run follows an untimed one. False where a run takes seconds, to which caches mean nothing.
    """
    if not ON_GPU:
        keep_freed_memory()  # as in a training run of ours; the other candidates gain by it too
    candidates = {**candidates, COPY: memory_copy()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.run()
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 5 and time.perf_counter() - began > budget:
            break
        for name, candidate in candidates.items():
            if warm or name in (COPY, READ, GEMM):
                candidate.run()  # its own memory back in the allocator and the caches, as in a loop of its own
            samples[name].append(candidate.time())
    return {name: summary(times) for name, times in samples.items()}


def in_own_process(make: Callable[..., Callable[[], object]], *args: object) -> Callable[[], None]:
    """``make(*args)()`` in a process that keeps torch's own memory settings, as a program without pyrlhf has them.

    There the temporaries of a step go back to the system, and the next step pays a page fault for each 4 KiB of them.
    Candidates of this process gain by `keep_freed_memory`, ours or not. ``make`` is a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, make, args), daemon=True).start()
    here.recv()

    def run() -> None:
        here.send(None)
        here.recv()

    return run


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> None:
    run = make(*args)
    run()
    with suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(None)
            pipe.recv()
            run()


class NotMeasured(Exception):
    """Why a candidate cannot be measured here."""


def in_peers(script: str, *args: object) -> Callable[[], dict[str, float]]:
    """One run a call of ``peers/<script>``, by the interpreter that the environment variable PYRLHF_BENCH_PEERS names.

    It returns what the script measured itself. The script's first run is over when this returns (see peers/channel.py).

    Raises:
        NotMeasured: no such interpreter (peers/README.md says how to make it), or the script failed.
    """
    python = os.environ.get(PEERS)
    if not python:
        raise NotMeasured(f"{PEERS} is not set, see benchmarks/peers/README.md")
    command = [python, str(RESULTS.parent / "peers" / script), *map(str, args)]
    # of this process's packages and its world
    own = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    pipe = subprocess.PIPE
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
    except OSError as error:
        raise NotMeasured(f"{PEERS}: {error}") from None

    def run() -> dict[str, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [""]
            raise NotMeasured(f"{script} ended with {process.wait()}: {said[-1]}")
        found: dict[str, float] = json.loads(answer)
        return found

    run()
    return run


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one run; on a GPU those that the device took, its L2 cache being cold."""
    if ON_GPU:
        _other_data().zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def _other_data() -> Tensor:
    return torch.empty(256 << 18, device=DEVICE)  # 256 MiB, more than any L2


def launch_microseconds(run: Callable[[], object], times: int = 300) -> float:
    """What a call costs the CPU: ``times`` calls in a row, none waited for. For work that takes the device less than that."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / times


def summary(times: list[float]) -> Timing:
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")  # within what was seen, however few
    return Timing(statistics.median(times), low, high, min(times))


def memory_copy(megabytes: int = 2048 if ON_GPU else 64) -> Candidate:
    source = torch.ones(megabytes << 18, device=DEVICE)
    target = torch.empty_like(source)
    return Candidate(lambda: target.copy_(source), bytes=2 * 4 * source.numel())


def memory_read(megabytes: int = 2048 if ON_GPU else 256) -> Candidate:
    """The limit of what reads much and writes little: the sum of a large buffer. Offer it under the name READ."""
    source = torch.ones(megabytes << 18, device=DEVICE)
    return Candidate(source.sum, bytes=4 * source.numel())


def best_gemm(dtype: torch.dtype, times: int = 1) -> Candidate:
    """``times`` products of the size that runs fastest here: on a CPU inputs that fit in cache, sums that are long."""
    rows, inner = (8192, 8192) if ON_GPU else (1024, 2048)
    a, b = (torch.randn(rows, inner, device=DEVICE).to(dtype) for _ in range(2))
    product = torch.nn.functional.linear if ON_GPU else linear

    def run() -> None:
        for _ in range(times):
            product(a, b)

    return Candidate(run, flops=times * 2 * rows * rows * inner)


def llama_shape(small: bool) -> ModelConfig:
    """Llama 3.2 1B's, or a tiny one to try a benchmark on."""
    own = {"rope_scaling": None, "bos_id": None, "eos_id": None, "extra_eos_ids": ()}
    if small:
        own |= {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        own |= {"vocab_size": 1024, "intermediate_size": 128}
    return ModelConfig.preset("llama-3.2-1b", **own)


@torch.no_grad()
def with_random_weights(model: _Model) -> _Model:
    """A pyrlhf model made on the meta device, with weights as its own initialisation makes them, but drawn where everything runs.

    That one draws on the CPU, which takes a model of a billion weights 10 s.
    """
    model._materialise(DEVICE)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            last = name.endswith(("attention.output.weight", "mlp.down.weight"))
            weight.normal_(0.0, 0.02 / (2 * model.config.num_layers) ** 0.5 if last else 0.02)
        else:
            weight.fill_(float("norm" in name and not name.endswith("bias")))
    if isinstance(model, ScalarModel):
        model.head.gain.fill_(1.0)
        model.head.shift.fill_(0.0)
    return model


def report(
    op: str,
    case: str,
    candidates: dict[str, Candidate],
    ours: str,
    *,
    absent: dict[str, str] | None = None,
    aims: dict[str, float] | None = None,
    **options: float,
) -> dict[str, Timing]:
    """Measures, prints the table and writes it to ``results/<machine>.json`` under ``op`` and ``case``.

    Where a candidate is named GEMM (see `best_gemm`), every rate of operations is also given as a share of its rate.
    ``absent``: candidates that cannot be measured here, and why. ``aims``: what ours should reach, for summary.py: another
    way's name -> so many times its speed; "share_of_copy" (or another column of ours) -> at least that; "launch_us" or a column that
    ends in another unit of `AT_MOST` in summary.py -> at most that.
    """
    timings = measure(candidates, **options)  # type: ignore[arg-type]
    every = {**candidates, COPY: memory_copy()}
    limits = [limit for limit in (COPY, READ, GEMM) if limit in every]
    speeds = {limit: work(every[limit], limit) / timings[limit].median for limit in limits}
    rows = [row(name, timings[name], every[name], speeds, timings[ours].median) for name in timings]
    show(op, case, rows)
    for name, why in (absent or {}).items():
        print(f"{name}: not measured: {why}")
    save(op, case, [*rows, *({"way": name, "not_measured": why} for name, why in (absent or {}).items())], aims)
    return timings


def report_both_directions(
    op: str,
    case: str,
    ways: dict[str, Callable[..., Any]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    moved: tuple[int, int],
    aims: dict[str, float],
) -> None:
    """`report` of "pyrlhf" among ``ways`` twice: forward without gradients, then with them; ``moved``: the bytes of each."""
    given = [x.detach() for x in inputs]
    forward = {key: Candidate(functools.partial(way, *given), moved[0]) for key, way in ways.items()}
    both = {key: Candidate(gradients(way, inputs, cotangents), moved[1]) for key, way in ways.items()}
    for what, candidates in (("forward", forward), ("forward and backward", both)):
        report(op, f"{case}, {what}", candidates, ours="pyrlhf", aims=aims, budget=5.0)


def work(candidate: Candidate, limit: str) -> int:
    """What this limit counts: operations or bytes."""
    return candidate.flops if limit == GEMM else candidate.bytes


def row(name: str, timing: Timing, candidate: Candidate, speeds: dict[str, float], ours: float) -> dict[str, object]:
    per_ms = 1 / timing.median
    shares = {limit: work(candidate, limit) * per_ms / speed for limit, speed in speeds.items()}
    return {
        "way": name,
        **{f"{key}_ms": round(value, 4) for key, value in asdict(timing).items()},
        "gb_s": round(candidate.bytes * per_ms * 1e-6, 2) if candidate.bytes else None,
        "gflop_s": round(candidate.flops * per_ms * 1e-6, 2) if candidate.flops else None,
        **{f"share_of_{limit.split()[0]}": round(share, 3) or None for limit, share in shares.items()},
        "times_ours": round(timing.median / ours, 2),
        **({"tokens_s": round(1e3 * candidate.tokens * per_ms, 1)} if candidate.tokens else {}),
        **{key: round(value, 1) for key, value in candidate.extra.items()},
    }


def show(op: str, case: str, rows: list[dict[str, object]]) -> None:
    where = machine() if ON_GPU else f"{machine()}, {torch.get_num_threads()} threads"
    table = Table(title=f"{op}: {case} ({where})", title_justify="left")
    shares = [key for key in rows[0] if key.startswith("share_of_")]
    extra = list(dict.fromkeys(key for r in rows for key in list(r)[list(r).index("times_ours") + 1 :]))
    headings = {"way": "way", "median_ms": "median ms", "spread": "20-80 %", "gb_s": "GB/s", "gflop_s": "GFLOP/s"}
    headings |= {key: key.removeprefix("share_").replace("_", " ") for key in shares}
    headings |= {"times_ours": "x ours", **{key: key for key in extra}}
    rows = [{**r, "spread": f"{r['low_ms']}-{r['high_ms']}"} for r in rows]
    told = [key for key in headings if any(r.get(key) is not None for r in rows)]
    for key in told:
        table.add_column(headings[key], justify="left" if key == "way" else "right")
    for r in rows:
        table.add_row(*("" if r.get(key) is None else str(r[key]) for key in told))
    Console(width=140).print(table)


def save(op: str, case: str, rows: list[dict[str, object]], aims: dict[str, float] | None = None) -> None:
    """Merges these rows into the machine's file: other ops and cases stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "ops": {}}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if ON_GPU:
        settings = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        settings = {"threads": torch.get_num_threads(), "isa": core().isa()}
    kept["ops"].setdefault(op, {})[case] = {**settings, **versions, "rows": rows, **({"aims": aims} if aims else {})}
    kept["ops"] = dict(sorted(kept["ops"].items()))
    path.write_text(json.dumps(kept, indent=1) + "\n")


def machine() -> str:
    """A name for this kind of machine: the GPU ("h200"), or processor, its family (Zen 4 is 25, Zen 5 is 26), cores, best instruction set."""
    if ON_GPU:
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
        return next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), "-".join(words))
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    told = dict(re.findall(r"(model name|cpu family)\s*:\s*(.+)", text))
    words = re.findall(r"[a-z0-9]+", told.get("model name", platform.machine()).lower())
    brand = [w for w in words if w not in ("r", "tm", "cpu", "processor", "core", "amd", "intel", "with", "ghz")][:2]
    family = [f"family{told['cpu family']}"] if "cpu family" in told else []
    return "-".join([*brand, *family, f"{os.cpu_count()}core", core().isas_available()[-1]])
