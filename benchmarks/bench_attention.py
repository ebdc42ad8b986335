"""attention, forward and backward, against torch's scaled_dot_product_attention as padded models call it.

Ragged: B 8, 12 heads of 64, lengths uniform in 128..512, in torch padded to 512 with the boolean mask of padding and
causality; dense: B 2, T 2048, is_causal; both in float32 and bfloat16. FLOP/s count the pairs that are visible. Prefix: 8 answers of 64 tokens that share a prompt of
512, against 8 whole sequences through our own kernel. FLOPs: 14 a visible pair of tokens, channel and head (two products
forward, five backward).

Targets on 2 cores: ragged 4 times torch in both dtypes, dense float32 1.6 times, prefix 3 times the separate sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import GEMM, Candidate, best_gemm, report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf import ops

HEADS, DIM = 12, 64


def step(attend: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        attend().backward(grad)

    return run


def packed(lengths: list[int], dtype: torch.dtype, prefix: Tensor | None = None) -> Callable[[], None]:
    """Our step over sequences of these lengths."""
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, HEADS, DIM).to(dtype).requires_grad_() for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    grad = torch.randn(tokens, HEADS, DIM).to(dtype)
    return step(lambda: ops.attention(q, k, v, cu_seqlens, prefix=prefix), [q, k, v], grad)


def padded(lengths: list[int], width: int, dtype: torch.dtype, masked: bool) -> Callable[[], None]:
    """torch's step over [B, H, width, D]; with ``masked`` a boolean mask of padding and causality, else is_causal."""
    q, k, v = (torch.randn(len(lengths), HEADS, width, DIM).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    place = torch.arange(width)
    mask = None
    if masked:
        causal = place[:, None] >= place[None, :]
        mask = causal & (place < torch.tensor(lengths)[:, None])[:, None, None, :]
    return step(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked), [q, k, v], grad)


def flops(pairs: int) -> int:
    return 14 * DIM * HEADS * pairs


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def against_torch(name: str, lengths: list[int], width: int, dtype: torch.dtype, masked: bool) -> None:
    useful = flops(sum(map(triangle, lengths)))
    torchs = "torch SDPA, boolean mask" if masked else "torch SDPA, is_causal"
    report(
        "attention",
        f"{name}, {str(dtype).removeprefix('torch.')}, forward and backward",
        {
            "pyrlhf": Candidate(packed(lengths, dtype), flops=useful),
            torchs: Candidate(padded(lengths, width, dtype, masked), flops=useful),
            GEMM: best_gemm(dtype),
        },
        ours="pyrlhf",
    )


def shared_prompt(prompt: int = 512, answers: int = 8, answer: int = 64) -> None:
    prefix = torch.tensor([[0, 0]] + [[0, prompt]] * answers, dtype=torch.int32)
    whole = prompt + answer
    report(
        "attention",
        f"{answers} answers of {answer} tokens to a prompt of {prompt}, float32, forward and backward",
        {
            "pyrlhf, prompt shared": Candidate(
                packed([prompt] + [answer] * answers, torch.float32, prefix),
                flops=flops(triangle(prompt) + answers * (triangle(answer) + prompt * answer)),
            ),
            "pyrlhf, whole sequences": Candidate(
                packed([whole] * answers, torch.float32), flops=flops(answers * triangle(whole))
            ),
        },
        ours="pyrlhf, prompt shared",
    )


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(128, 513, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    for dtype in (torch.float32, torch.bfloat16):
        against_torch("B 8, 12 heads of 64, lengths uniform in 128..512", lengths, 512, dtype, masked=True)
        against_torch("B 2, 12 heads of 64, T 2048, dense causal", [2048] * 2, 2048, dtype, masked=False)
    shared_prompt()


if __name__ == "__main__":
    main()
