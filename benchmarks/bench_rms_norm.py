"""rms_norm with its residual addition, forward and backward on 4096 x 1024, and forward on the 32 rows of a decode step, against
torch eager: the upcasting form of transformers' LlamaRMSNorm, and torch.nn.functional.rms_norm, each after the addition.

On a GPU: 32768 x 4096 in bfloat16 forward, and forward and backward, against torch.compile too.

Targets: 3 times faster than torch eager on 2 cores; 80 % of the copy speed and torch.compile's time on a GPU. Bytes: x, residual,
the normalised and the sum; in the backward their two gradients, the sum and the gradient of x.
"""

from __future__ import annotations

import torch
from common import DEVICE, Candidate, gradients, report, report_both_directions
from torch import Tensor

from pyrlhf import ops

EPS = 1e-5


def fused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, eps=EPS, residual=residual)


def reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm_ref(x, weight, eps=EPS, residual=residual)


def upcasting(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    wide = summed.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(summed.dtype), summed


def functional(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return torch.nn.functional.rms_norm(summed, weight.shape, weight, EPS), summed


WAYS = {
    "pyrlhf": fused,
    "rms_norm_ref (torch)": reference,
    "torch eager, upcasting (LlamaRMSNorm)": upcasting,
    "torch eager, F.rms_norm": functional,
}


def on_gpu(rows: int = 32768, size: int = 4096) -> None:
    torch.manual_seed(0)
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    x, residual, *cotangents = (torch.randn(rows, size, **like) for _ in range(4))
    inputs = [x.requires_grad_(), residual.requires_grad_(), torch.ones(size, **like).requires_grad_()]
    ways = {
        **{key: way for key, way in WAYS.items() if key != "rms_norm_ref (torch)"},
        "torch.compile, upcasting": torch.compile(upcasting),
        "torch.compile, F.rms_norm": torch.compile(functional),
    }
    for way in ways.values():
        torch.testing.assert_close(way(*inputs), fused(*inputs))
    size_of_one = x.numel() * x.element_size()
    report_both_directions(
        "rms_norm",
        f"{rows} x {size}, bfloat16, residual",
        ways,
        inputs,
        cotangents,
        moved=(4 * size_of_one, 8 * size_of_one),
        aims={"share_of_copy": 0.8, "torch.compile, F.rms_norm": 1.0},
    )


def main(size: int = 1024) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        x, residual, *cotangents = (torch.randn(4096, size).to(dtype) for _ in range(4))
        inputs = [x.requires_grad_(), residual.requires_grad_(), torch.ones(size, dtype=dtype, requires_grad=True)]
        for way in (upcasting, functional):
            torch.testing.assert_close(fused(*inputs), way(*inputs))
        moved = 8 * x.numel() * x.element_size()
        report(
            "rms_norm",
            f"4096 x {size}, {name}, residual, forward and backward",
            {key: Candidate(gradients(way, inputs, cotangents), moved) for key, way in WAYS.items()},
            ours="pyrlhf",
        )
        few = [x.detach()[:32], residual.detach()[:32], inputs[2].detach()]
        report(
            "rms_norm",
            f"32 x {size}, {name}, residual, forward",
            {key: Candidate(lambda w=way, a=few: w(*a), moved // 256) for key, way in WAYS.items()},
            ours="pyrlhf",
            rounds=300,
        )


if __name__ == "__main__":
    on_gpu() if DEVICE.type == "cuda" else main()
