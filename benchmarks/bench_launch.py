"""What a call of each op costs the CPU on a GPU machine, where the work itself is next to nothing; and its kernel in a CUDA graph.

Target: 15 microseconds a call. In a graph a call costs nothing; the device's own time for some of them is shown beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from common import DEVICE, ON_GPU, Candidate, launch_microseconds, report

from pyrlhf import ops

ROWS, HEADS, DIM, TOKENS = 4, 8, 64, 64
IN_A_GRAPH = 20


def calls() -> dict[str, Callable[[], object]]:
    """Each op on inputs that the device is done with before the CPU has made the next call."""
    tokens = [torch.randn(TOKENS, device=DEVICE) for _ in range(6)]
    two, order = torch.tensor([0, 16, TOKENS], device=DEVICE).int(), torch.arange(TOKENS, device=DEVICE).int()
    x, weight, bias = (torch.randn(*shape, 1024, device=DEVICE).bfloat16() for shape in ((ROWS,), (), ()))
    q, k, v = (torch.randn(ROWS, HEADS, DIM, device=DEVICE).bfloat16() for _ in range(3))
    caches = [torch.randn(2 * ROWS, 16, HEADS, DIM, device=DEVICE).bfloat16() for _ in range(2)]
    table, lengths = order[: 2 * ROWS].view(ROWS, 2).contiguous(), torch.full((ROWS,), 20, device=DEVICE).int()
    ids, frequencies = torch.arange(ROWS, device=DEVICE), torch.rand(DIM // 2, device=DEVICE)
    logits = torch.randn(ROWS, 512, device=DEVICE)
    return {
        "activation": lambda: ops.activation(x, "gelu"),
        "decode_attention": lambda: ops.decode_attention(q, *caches, table, lengths),
        "gae": lambda: ops.gae(*tokens[:2], two),
        "layer_norm": lambda: ops.layer_norm(x, weight, bias, eps=1e-5),
        "ppo_loss": lambda: ops.ppo_loss(*tokens),
        "ranking_loss": lambda: ops.ranking_loss(tokens[0], two, order),
        "rms_norm": lambda: ops.rms_norm(x, weight, eps=1e-5),
        "rotary": lambda: ops.rotary(q, k, ids, frequencies),
        "sample": lambda: ops.sample(logits, ids, ids, seed=1, top_p=0.9),
        "write_kv": lambda: ops.write_kv(k, v, *caches, ids),
    }


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            run()
    return graph


@torch.no_grad()
def main() -> None:
    if not ON_GPU:
        sys.exit("bench_launch.py measures a GPU; none is here")
    for op, run in calls().items():
        eager = Candidate(run, extra={"launch_us": launch_microseconds(run)})
        report(
            "launch",
            op,
            {"pyrlhf": eager, f"{IN_A_GRAPH} calls in a graph": Candidate(graph_of(run).replay)},
            ours="pyrlhf",
            aims={"launch_us": 15},
            budget=1.0,
        )


if __name__ == "__main__":
    main()
