"""Tries tiles for linear_logprob's Triton kernels on the GPU that is here; prints TFLOP/s, best first. The table in
kernels/linear_logprob.py is changed by hand: nothing is tuned at run time.

    python benchmarks/tune_linear_logprob.py [rows dim vocabulary]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import once

from pyrlhf.kernels import linear_logprob as kernels

TILES = [
    *((128, 256, 64, 8, stages) for stages in (3, 4)),
    *((256, 128, 64, 8, stages) for stages in (3, 4)),
    *((128, 128, 64, warps, stages) for warps in (4, 8) for stages in (3, 4)),
    (128, 128, 128, 8, 3),
    *((128, 256, 32, 8, stages) for stages in (3, 4)),
    (128, 128, 32, 4, 4),
]
GROUPS = (8, 16, 32)


def median(run: Callable[[], Any]) -> float:
    run()
    return statistics.median(once(run) for _ in range(7))


def main(rows: int = 8192, dim: int = 4096, vocabulary: int = 128_256) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device=device).to(dtype)
    weight = (torch.randn(vocabulary, dim, device=device) / dim**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    faults = torch.zeros(1, dtype=torch.int32, device=device)
    ones = torch.ones(rows, device=device)
    key = ("large" if kernels._large(hidden) else "small", 2)
    flops = 2 * rows * dim * vocabulary
    found: dict[str, list[tuple[float, str]]] = {}

    def tried(name: str, products: int, what: str, run: Callable[[], Any]) -> None:
        found.setdefault(name, []).append((products * flops / median(run) * 1e-9, what))

    for values in TILES:
        kernels._TILES[key] = kernels.Tiles(*values)
        for kernels._GROUP in GROUPS:
            what = f"{kernels._TILES[key]}, group {kernels._GROUP}"
            try:
                forward = (hidden, weight, targets, None, 1.0)
                _, entropy, lse = kernels.forward(*forward, faults, 0)
                backward = (ones, ones, *forward[:4], entropy, lse, 1.0)
                tried("forward", 1, what, lambda given=forward: kernels.forward(*given, faults, 0))
                tried("logits' gradient", 1, what, lambda b=backward: kernels.backward(*b, [False] * 3))
                tried("hidden's gradient too", 2, what, lambda b=backward: kernels.backward(*b, [True, False, False]))
            except Exception as error:  # too much shared memory for this GPU
                print(f"{what}: {str(error).splitlines()[0]}")
    for name, results in found.items():
        print(f"\n{name}")
        for rate, what in sorted(results, reverse=True)[:10]:
            print(f"{rate:8.1f} TFLOP/s  {what}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
