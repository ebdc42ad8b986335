"""decode_attention over a paged cache, against torch's scaled_dot_product_attention over keys and values that lie together:
gathered beforehand (which no server can do), and gathered in the call.

Bytes: every key and value that is seen, once. FLOPs: 4 a key, channel and query head. Target on 2 cores, for B 16, 32 query
and 8 key heads of 128, 2048 tokens, bfloat16: 3 times SDPA and 60 % of the speed of reading. On a GPU 85 % of the speed of
copying, for 64 rows of 4096 tokens and for one of 128k.
"""

from __future__ import annotations

import torch
from common import DEVICE, ON_GPU, READ, Candidate, memory_read, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf import ops

PAGE = 32


def case(
    name: str,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    copies: int = 1,
    aims: dict[str, float] | None = None,
) -> None:
    """``copies`` caches take turns, so that a small one is not found in the processor's cache."""
    rows, width = len(lengths), -(-max(lengths) // PAGE)
    pages = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0)).int().view(rows, width).to(DEVICE)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = torch.randn(rows, heads, dim, device=DEVICE).to(dtype)
    shape = (rows * width, PAGE, kv_heads, dim)
    caches = [[torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2)] for _ in range(copies)]
    turn = iter(range(1 << 60))

    def gather(cache: Tensor) -> Tensor:
        return cache[pages.long()].view(rows, width * PAGE, kv_heads, dim)[:, : max(lengths)].transpose(1, 2)

    together = [[gather(cache).contiguous() for cache in pair] for pair in caches]
    mask = torch.arange(max(lengths), device=DEVICE)[None, None, None] < seq_lens[:, None, None, None]

    def sdpa(k: Tensor, v: Tensor) -> Tensor:
        unequal = None if min(lengths) == max(lengths) else mask
        return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=unequal, enable_gqa=heads != kv_heads)

    def ours() -> Tensor:
        return ops.decode_attention(q, *caches[next(turn) % copies], pages, seq_lens)

    moved = 2 * sum(lengths) * kv_heads * dim * q.element_size()
    flops = 4 * sum(lengths) * heads * dim
    expected = scaled_dot_product_attention(
        q[:, :, None].float(), *(x.float() for x in together[0]), attn_mask=mask, enable_gqa=heads != kv_heads
    )
    torch.testing.assert_close(
        ops.decode_attention(q, *caches[0], pages, seq_lens).float(), expected[:, :, 0], rtol=2e-2, atol=2e-3
    )
    report(
        "decode_attention",
        name,
        {
            "pyrlhf, paged": Candidate(ours, moved, flops),
            "torch SDPA, gathered beforehand": Candidate(lambda: sdpa(*together[next(turn) % copies]), moved, flops),
            "torch SDPA, gathering": Candidate(
                lambda: sdpa(*(gather(x) for x in caches[next(turn) % copies])), moved, flops
            ),
            READ: memory_read(),
        },
        ours="pyrlhf, paged",
        aims=aims,
        budget=2.0 if ON_GPU else 60.0,
    )


def on_gpu() -> None:
    bf16, aims = torch.bfloat16, {"share_of_copy": 0.85}
    case("B 64, 32 / 8 heads of 128, 4096 tokens, bfloat16", [4096] * 64, 32, 8, 128, bf16, aims=aims)
    case("B 1, 32 / 8 heads of 128, 131072 tokens, bfloat16", [131072], 32, 8, 128, bf16, aims=aims)
    ragged = torch.linspace(512, 8192, 64).int().tolist()
    case("B 64, 32 / 8 heads of 128, 512..8192 tokens, bfloat16", ragged, 32, 8, 128, bf16)
    for heads, kv_heads, dim in ((32, 32, 64), (40, 8, 80), (32, 8, 96), (16, 2, 256)):
        case(
            f"B 64, {heads} / {kv_heads} heads of {dim}, 2048 tokens, bfloat16", [2048] * 64, heads, kv_heads, dim, bf16
        )
    case("B 64, 32 / 8 heads of 128, 2048 tokens, float32", [2048] * 64, 32, 8, 128, torch.float32)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    if ON_GPU:
        on_gpu()
        return
    case("B 16, 32 / 8 heads of 128, 2048 tokens, bfloat16", [2048] * 16, 32, 8, 128, torch.bfloat16)
    case("B 1, 32 / 8 heads of 128, 16384 tokens, bfloat16", [16384], 32, 8, 128, torch.bfloat16)
    ragged = torch.linspace(128, 1024, 16).int().tolist()
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        case(f"B 16, 12 heads of 64, 128..1024 tokens, {name}", ragged, 12, 12, 64, dtype, copies=6)


if __name__ == "__main__":
    main()
