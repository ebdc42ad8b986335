"""linear at GPT-2 small's four shapes, forward alone and with the backward, against F.linear.

    python bench_linear.py [float32 | bfloat16] [rows ...]

Target on 2 cores, float32: 1.25 times F.linear forward, 1.15 times with the backward, from 1024 rows on; bfloat16, which
F.linear gives to oneDNN too: as fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from common import GEMM, Candidate, best_gemm, report
from torch import Tensor
from torch.nn import functional as F

from pyrlhf import ops

SHAPES = {"qkv": (768, 2304), "output": (768, 768), "up": (768, 3072), "down": (3072, 768)}  # K, N
ROWS = (64, 256, 1024, 2048, 4096)
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(function: Linear, inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(function: Linear, inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(function(*inputs), inputs, grad)

    return run


def one(name: str, rows: int, dtype: torch.dtype) -> None:
    k, n = SHAPES[name]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((rows, k), (n, k), (n,))]
    grad = torch.randn(rows, n).to(dtype)
    for ours, torchs in zip(
        forward_backward(ops.linear, inputs, grad)(), forward_backward(F.linear, inputs, grad)(), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=1e-2 * rows**0.5 if dtype != torch.float32 else 1e-3)
    flops = 2 * rows * k * n
    case = f"{name}: {rows} rows, {k} to {n}, {str(dtype).removeprefix('torch.')}"
    report(
        "linear",
        f"{case}, forward",
        {
            "pyrlhf": Candidate(forward(ops.linear, inputs), flops=flops),
            "F.linear": Candidate(forward(F.linear, inputs), flops=flops),
            GEMM: best_gemm(dtype),
        },
        ours="pyrlhf",
        budget=3.0,
    )
    report(
        "linear",
        f"{case}, forward and backward",
        {
            "pyrlhf": Candidate(forward_backward(ops.linear, inputs, grad), flops=3 * flops),
            "F.linear": Candidate(forward_backward(F.linear, inputs, grad), flops=3 * flops),
            GEMM: best_gemm(dtype),
        },
        ours="pyrlhf",
        budget=5.0,
    )


def main(*words: str) -> None:
    dtypes = [word for word in words if not word.isdecimal()] or ["float32", "bfloat16"]
    rows = [int(word) for word in words if word.isdecimal()] or ROWS
    torch.manual_seed(0)
    for dtype in dtypes:
        for count in rows:
            for name in SHAPES:
                one(name, count, getattr(torch, dtype))


if __name__ == "__main__":
    main(*sys.argv[1:])
