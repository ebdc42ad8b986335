"""layer_norm with its residual addition, forward and backward on 4096 x 1024, and forward on the 32 rows of a decode step, against
torch eager: the addition, then torch.nn.functional.layer_norm. On a GPU: 32768 x 4096 in bfloat16 forward, and forward and
backward, against torch.compile too; the targets there are 80 % of the copy speed and torch.compile's time.

torch's layer_norm is one pass itself. Left to gain are the addition's pass forward and that of its gradient backward: 11 arrays read
or written against 8, so 3 times faster is out of reach where memory is the limit.
Bytes: x, residual, the normalised and the sum; in the backward their two gradients, the sum and the gradient of x.
"""

from __future__ import annotations

import torch
from common import DEVICE, Candidate, gradients, report, report_both_directions
from torch import Tensor

from pyrlhf import ops

EPS = 1e-5


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.layer_norm(x, weight, bias, eps=EPS, residual=residual)


def reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.layer_norm_ref(x, weight, bias, eps=EPS, residual=residual)


def functional(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return torch.nn.functional.layer_norm(summed, weight.shape, weight, bias, EPS), summed


WAYS = {"pyrlhf": fused, "layer_norm_ref (torch)": reference, "torch eager, F.layer_norm": functional}


def on_gpu(rows: int = 32768, size: int = 4096) -> None:
    torch.manual_seed(0)
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    x, residual, *cotangents = (torch.randn(rows, size, **like) for _ in range(4))
    parameters = [f(size, **like).requires_grad_() for f in (torch.ones, torch.zeros)]
    inputs = [x.requires_grad_(), residual.requires_grad_(), *parameters]
    ways = {
        "pyrlhf": fused,
        "torch eager, F.layer_norm": functional,
        "torch.compile, F.layer_norm": torch.compile(functional),
    }
    for way in ways.values():
        torch.testing.assert_close(way(*inputs), fused(*inputs))
    size_of_one = x.numel() * x.element_size()
    report_both_directions(
        "layer_norm",
        f"{rows} x {size}, bfloat16, residual",
        ways,
        inputs,
        cotangents,
        moved=(4 * size_of_one, 8 * size_of_one),
        aims={"share_of_copy": 0.8, "torch.compile, F.layer_norm": 1.0},
    )


def main(size: int = 1024) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        x, residual, *cotangents = (torch.randn(4096, size).to(dtype) for _ in range(4))
        parameters = [f(size, dtype=dtype, requires_grad=True) for f in (torch.ones, torch.zeros)]
        inputs = [x.requires_grad_(), residual.requires_grad_(), *parameters]
        torch.testing.assert_close(fused(*inputs), functional(*inputs), atol=1e-5, rtol=1.6e-2)
        moved = 8 * x.numel() * x.element_size()
        report(
            "layer_norm",
            f"4096 x {size}, {name}, residual, forward and backward",
            {key: Candidate(gradients(way, inputs, cotangents), moved) for key, way in WAYS.items()},
            ours="pyrlhf",
        )
        few = [x.detach()[:32], residual.detach()[:32], *(p.detach() for p in parameters)]
        report(
            "layer_norm",
            f"32 x {size}, {name}, residual, forward",
            {key: Candidate(lambda w=way, a=few: w(*a), moved // 256) for key, way in WAYS.items()},
            ours="pyrlhf",
            rounds=300,
        )


if __name__ == "__main__":
    on_gpu() if DEVICE.type == "cuda" else main()
