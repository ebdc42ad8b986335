"""Tries tiles for attention's Triton kernels on the GPU that is here; prints TFLOP/s, best first. The table in kernels/attention.py
is changed by hand: nothing is tuned at run time.

    python benchmarks/tune_attention.py [tokens heads dim]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from common import once

from pyrlhf.kernels import attention as kernels

LONG, SHORT = (64, 128), (32, 64, 128)  # the side whose sums a program holds, and the one it goes along
EDGES, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)


def candidates(by_key: bool) -> list[kernels.Tiles]:
    """Tiles whose masked ones are as wide as the others, or half as wide."""
    found = []
    for long, short, edge, warps, stages in product(LONG, SHORT, EDGES, WARPS, STAGES):
        if edge in (short, short // 2):
            queries, keys = (short, long) if by_key else (long, short)
            found.append(kernels.Tiles(queries, keys, edge, warps, stages))
    return found


def median(run: Callable[[], Any]) -> float:
    run()
    return statistics.median(once(run) for _ in range(7))


def main(tokens: int = 16_384, heads: int = 16, dim: int = 128) -> None:
    """One causal sequence in bfloat16. The backward's two passes are tried one at a time, beside the table's tiles of the other."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, heads, dim, device=device).to(dtype) for _ in range(4))
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    faults = torch.zeros(2, dtype=torch.int32, device=device)
    masks = (cu_seqlens, None, True, None, dim**-0.5, faults, 0)
    out, lse = kernels.forward(q, k, v, *masks)
    key = ("large" if kernels._large(q) else "small", 2, max(64, kernels.width_of(q)))
    table = kernels._TILES[key]
    pairs = tokens * (tokens + 1) // 2 * dim * heads
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "forward": (4, lambda: kernels.forward(q, k, v, *masks)),
        "by_query": (10, lambda: kernels.backward(grad, q, k, v, out, lse, *masks)),
        "by_key": (10, lambda: kernels.backward(grad, q, k, v, out, lse, *masks)),
    }
    for name, (flops, run) in runs.items():
        found = []
        for tiles in candidates(name == "by_key"):
            kernels._TILES[key] = table._replace(**{name: tiles})
            try:
                found.append((flops * pairs / median(run) * 1e-9, tiles))
            except Exception as error:  # too much shared memory for this GPU
                print(f"{name}, {tiles}: {str(error).splitlines()[0]}")
        kernels._TILES[key] = table
        print(f"\n{name}{'' if name == 'forward' else ': the whole backward'}; the table has {getattr(table, name)}")
        for rate, tiles in sorted(found, reverse=True)[:10]:
            print(f"{rate:8.1f} TFLOP/s  {tiles}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
