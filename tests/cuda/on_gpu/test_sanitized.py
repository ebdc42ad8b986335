"""One small call of every CUDA kernel, forward and backward, for compute-sanitizer (benchmarks/gpu.sh): it is slow, and watches all."""

from __future__ import annotations

import pytest
import torch

from pyrlhf import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, HEADS, DIM = 5, 4, 64


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def finite(*outputs: torch.Tensor) -> None:
    torch.stack([out.float().sum() for out in outputs]).sum().backward()
    torch.cuda.synchronize()
    assert all(bool(out.isfinite().all()) for out in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 1023])
def test_norms_and_activation(dtype: torch.dtype, size: int) -> None:
    x, residual, weight, bias = (
        floats(*shape, dtype=dtype) for shape in ((ROWS, size), (ROWS, size), (size,), (size,))
    )
    finite(*ops.rms_norm(x, weight, eps=1e-5, residual=residual))
    finite(*ops.layer_norm(x, weight, bias, eps=1e-5, residual=residual))
    finite(ops.activation(x, "gelu"))
    finite(ops.activation(floats(ROWS, 2 * size, dtype=dtype), "silu", gated=True))


def test_losses_and_advantages() -> None:
    bounds = torch.tensor([0, 3, 3, 200], device="cuda").int()
    rewards, values = floats(200), floats(200)
    advantages, returns = ops.gae(rewards, values, bounds)
    loss = ops.ppo_loss(floats(200), *(t.detach() for t in (rewards, advantages)), values, values.detach(), returns)
    finite(loss.policy, loss.value)
    finite(ops.ranking_loss(floats(200), bounds, torch.arange(200, device="cuda").int())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding(dtype: torch.dtype) -> None:
    with torch.no_grad():
        q, k, v = (floats(ROWS, HEADS, DIM, dtype=dtype) for _ in range(3))
        caches = [torch.zeros(8, 16, HEADS, DIM, dtype=dtype, device="cuda") for _ in range(2)]
        ids = torch.arange(ROWS, device="cuda")
        q, k = ops.rotary(q, k, ids, torch.rand(DIM // 2, device="cuda"))
        ops.write_kv(k, v, *caches, ids)
        table = torch.arange(8, device="cuda").int().repeat(ROWS, 1)
        out = ops.decode_attention(q, *caches, table, torch.tensor([1, 17, 0, 128, 5], device="cuda").int())
        tokens, logprobs = ops.sample(
            floats(ROWS, 1001, dtype=dtype), ids, ids, seed=3, top_k=40, top_p=0.9, min_p=0.01
        )
        torch.cuda.synchronize()
        assert bool(out.isfinite().all())
        assert bool((tokens >= 0).all())
        assert bool(logprobs.isfinite().all())
