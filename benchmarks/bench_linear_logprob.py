"""linear_logprob, forward and backward, against all logits in torch: log_softmax, gather, entropy; and what each holds in memory.

Targets on 2 cores, GPT-2's head on 1024 rows: the arithmetic is four products of rows x dim x vocabulary (two in each
direction: the backward makes the logits again), so the limit is the rate of the best product here, timed beside them. The ways that keep the logits do three. Memory: an eighth of what torch takes, beside inputs and gradients.

Targets on an H200, Llama 3's head on 8192 rows, bfloat16: forward 600 TFLOP/s, a tenth of torch's memory. Time against torch is
bounded by arithmetic: torch's three products take 33 ms at 790 TFLOP/s, and its passes over logits that are made float32 move
some 120 bytes a logit, 30 ms at 4.3 TB/s; our four products take 44 ms at that rate, so 1.4 times torch is the most there is.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import DEVICE, GEMM, ON_GPU, Candidate, best_gemm, in_own_process, report
from torch import Tensor

from pyrlhf import ops

CASES = {"GPT-2's head": (1024, 768, 50_257), "a small model's head": (64, 256, 8192)}
if ON_GPU:
    CASES = {"Llama 3's head": (8192, 4096, 128_256), "GPT-2's head": (8192, 768, 50_257)}
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
ROUNDS, BUDGET = (10, 6.0) if ON_GPU else (30, 25.0)
PLAIN, WIDENED = "torch, all logits", "torch, all logits, made float32"
Outputs = tuple[Tensor, Tensor]


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    return of_logits(torch.nn.functional.linear(hidden, weight), targets)


def all_logits_widened(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    """As trainers do, because ratios of two policies need more than bfloat16."""
    return of_logits(torch.nn.functional.linear(hidden, weight).float(), targets)


def of_logits(logits: Tensor, targets: Tensor) -> Outputs:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Outputs]] = {
    "pyrlhf": ops.linear_logprob,
    PLAIN: all_logits,
    WIDENED: all_logits_widened,
}


def inputs(rows: int, dim: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, dim, device=DEVICE) for n in (rows, vocabulary))
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight / dim**0.5)]
    return leaves[0], leaves[1], torch.randint(0, vocabulary, (rows,), device=DEVICE)


def step(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], None]:
    def run() -> None:
        hidden.grad = weight.grad = None
        logprob, entropy = WAYS[way](hidden, weight, targets)
        (logprob.sum() - 0.01 * entropy.sum()).backward()

    return run


def made_step(way: str, case: str, dtype: torch.dtype) -> Callable[[], None]:
    return step(way, *inputs(*CASES[case], dtype))


def held(way: str, case: str, dtype: torch.dtype) -> float:
    """MiB of memory that a step takes beside inputs and gradients: on a CPU in a process of its own."""
    if ON_GPU:
        return held_on_gpu(way, inputs(*CASES[case], dtype))
    command = [sys.executable, __file__, "held", way, case, str(dtype).removeprefix("torch.")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def held_on_gpu(way: str, given: tuple[Tensor, Tensor, Tensor]) -> float:
    step(way, *given)()  # kernels are compiled, the library has its workspace
    given[0].grad = given[1].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(way, *given)()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - given[0].nbytes - given[1].nbytes) / 2**20


def print_held(way: str, case: str, dtype: torch.dtype) -> None:
    given = inputs(*CASES[case], dtype)
    small = [x.detach()[:64].requires_grad_(x.is_floating_point()) for x in given]
    step(way, small[0], small[1], small[2] % 64)()  # code and buffers of its libraries are there
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = high_water_kib()
    step(way, *given)()
    gradients = sum(x.numel() * x.element_size() for x in given[:2]) / 1024
    print((high_water_kib() - before - gradients) / 1024)


def high_water_kib() -> int:
    """The most memory this process has had. (Its ru_maxrss starts at that of the process that made it.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))


def both_directions(case: str, dtype: torch.dtype) -> None:
    rows, dim, vocabulary = CASES[case]
    given = inputs(rows, dim, vocabulary, dtype)
    ways = [way for way in WAYS if dtype == torch.bfloat16 or way != WIDENED]
    with torch.no_grad():
        for a, b in zip(WAYS[ways[-1]](*given), ops.linear_logprob(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    flops = 2 * rows * dim * vocabulary
    candidates = {
        way: Candidate(
            step(way, *given),
            flops=(4 if way == "pyrlhf" else 3) * flops,
            extra={"held_mib": held(way, case, dtype)},
        )
        for way in ways
    }
    ours = candidates["pyrlhf"].extra
    ours["times_less_held"] = candidates[PLAIN].extra["held_mib"] / ours["held_mib"]
    if not ON_GPU:
        candidates[f"{PLAIN}, torch's memory settings"] = Candidate(
            in_own_process(made_step, PLAIN, case, dtype), flops=3 * flops, extra=candidates[PLAIN].extra
        )
    candidates[GEMM] = best_gemm(dtype, times=1 if rows < 100 or ON_GPU else 20)
    report(
        "linear_logprob",
        f"{case}: {rows} x {dim} x {vocabulary}, {str(dtype).removeprefix('torch.')}, forward and backward",
        candidates,
        ours="pyrlhf",
        aims={WIDENED: 1.1, "times_less_held": 10.0, "share_of_gemm": 0.8} if ON_GPU and dim >= 4096 else None,
        rounds=ROUNDS,
        budget=BUDGET,
    )


@torch.no_grad()
def forward_alone(case: str, dtype: torch.dtype) -> None:
    rows, dim, vocabulary = CASES[case]
    given = inputs(rows, dim, vocabulary, dtype)
    candidates = {
        way: Candidate(partial(function, *given), flops=2 * rows * dim * vocabulary) for way, function in WAYS.items()
    }
    report(
        "linear_logprob",
        f"{case}: {rows} x {dim} x {vocabulary}, {str(dtype).removeprefix('torch.')}, forward",
        {**candidates, GEMM: best_gemm(dtype)},
        ours="pyrlhf",
        aims={WIDENED: 1.4, "gflop_s": 600_000.0} if dim >= 4096 else None,
        rounds=ROUNDS,
        budget=BUDGET,
    )


def main() -> None:
    for case in CASES:
        for dtype in DTYPES:
            both_directions(case, dtype)
            if ON_GPU:
                forward_alone(case, dtype)


if __name__ == "__main__":
    if sys.argv[1:2] == ["held"]:
        print_held(sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4]))
    else:
        main()
