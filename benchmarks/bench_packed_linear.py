"""packed_linear, the linear layer of a decode step, against torch's F.linear and against oneDNN over a weight that it has
reordered beforehand: 3072 x 768, a different weight at every call, more of them than any cache holds. And packing itself.

Targets on 2 cores, times faster than F.linear: bfloat16 3 (1 row), 2.5 (8), 2 (16), 1.5 (32); float32 5 (8 rows); one row of
bfloat16 at 80 % of the speed at which this machine reads memory. Bytes: the weight's. Times are of all weights together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from common import READ, Candidate, memory_read, report
from torch import Tensor

from pyrlhf import ops

OUT, IN = 3072, 768
CACHES = 320 << 20  # bytes, many times the last-level cache


def reordered(weights: list[Tensor], rows: int) -> list[Tensor]:
    return [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]


def over(weights: list, multiply: Callable[..., Tensor]) -> Callable[[], None]:
    def run() -> None:
        for weight in weights:
            multiply(weight)

    return run


def case(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = CACHES // (OUT * IN * dtype.itemsize)
    weights = [(torch.randn(OUT, IN) * IN**-0.5).to(dtype) for _ in range(count)]
    x, bias = torch.randn(rows, IN).to(dtype), torch.randn(OUT).to(dtype)
    packed, onednn = [ops.pack_weight(w, dtype) for w in weights], reordered(weights, rows)
    linear = torch.nn.functional.linear
    torch.testing.assert_close(ops.packed_linear(x, packed[0], bias), linear(x, weights[0], bias), rtol=0.02, atol=0.02)
    size = {"bytes": count * OUT * IN * dtype.itemsize, "flops": 2 * rows * count * OUT * IN}
    pointwise = torch.ops.mkldnn._linear_pointwise
    report(
        "packed_linear",
        f"{rows} x {IN} by {OUT}, {str(dtype).removeprefix('torch.')}, {count} weights",
        {
            "pyrlhf": Candidate(over(packed, lambda w: ops.packed_linear(x, w, bias)), **size),
            "torch F.linear": Candidate(over(weights, lambda w: linear(x, w, bias)), **size),
            "oneDNN, reordered": Candidate(over(onednn, lambda w: pointwise(x, w, bias, "none", [], "")), **size),
            READ: memory_read(),
        },
        ours="pyrlhf",
        budget=20.0,
    )


def packing(source: torch.dtype, target: torch.dtype, out: int = 50_257) -> None:
    """One large weight after an optimizer step, and one that has not changed."""
    weight, other = (torch.randn(out, IN).to(source) for _ in range(2))
    by_turns = itertools.cycle((other, weight))
    changing, same = ops.pack_weight(weight, target), ops.pack_weight(weight, target)
    size = {"bytes": weight.numel() * (source.itemsize + target.itemsize)}
    plain, transposed = torch.empty(out, IN, dtype=target), torch.empty(IN, out, dtype=target)
    names = [str(dtype).removeprefix("torch.") for dtype in (source, target)]
    report(
        "packed_linear",
        f"packing {out} x {IN}, {names[0]} to {names[1]}",
        {
            "pyrlhf": Candidate(lambda: changing.update(next(by_turns)), **size),
            "pyrlhf, unchanged": Candidate(lambda: same.update(weight), bytes=weight.numel() * source.itemsize),
            "torch copy, transposed": Candidate(lambda: transposed.copy_(weight.t()), **size),
            "torch copy, as it is": Candidate(lambda: plain.copy_(weight), **size),
        },
        ours="pyrlhf",
        budget=10.0,
    )


def main() -> None:
    for rows in (1, 8, 16, 32, 64):
        case(rows, torch.bfloat16)
    for rows in (1, 8, 32):
        case(rows, torch.float32)
    for source, target in ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        packing(source, target)


if __name__ == "__main__":
    main()
