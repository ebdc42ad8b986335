"""attention, forward and backward, against torch's scaled_dot_product_attention as padded models call it.

Ragged: B 8, 12 heads of 64, lengths uniform in 128..512, in torch padded to 512 with the boolean mask of padding and
causality; dense: B 2, T 2048, is_causal; both in float32 and bfloat16. Prefix: 8 answers of 64 tokens that share a prompt of 512,
against 8 whole sequences through our own kernel. FLOPs: 14 a visible pair of tokens, channel and head (two products forward,
five backward).

Targets on 2 cores: ragged 4 times torch in both dtypes, dense float32 1.6 times, prefix 3 times the separate sequences.

On a GPU, bfloat16, forward and backward apart (4 and 10 FLOPs a visible pair, channel and head): 16384 tokens, causal, against
each of torch's flash and cuDNN kernels, which are what there is to reach: 0.9 times the faster one forward, 0.8 times backward,
and 460 (D 128) and 380 (D 64) TFLOP/s forward. Ragged, the mean half of the longest: 4 times SDPA with a mask of padding.
Prefix, a prompt of 4096 and 8 answers of 256: 4 times the separate sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import DEVICE, GEMM, ON_GPU, Candidate, best_gemm, report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf import ops

HEADS, DIM = (16, 128) if ON_GPU else (12, 64)
BUDGET = 2.0 if ON_GPU else 60.0


def step(attend: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        attend().backward(grad)

    return run


def packed(lengths: list[int], dtype: torch.dtype, prefix: Tensor | None = None) -> Callable[[], None]:
    """Our step over sequences of these lengths."""
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, HEADS, DIM, device=DEVICE).to(dtype).requires_grad_() for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    grad = torch.randn(tokens, HEADS, DIM, device=DEVICE).to(dtype)
    return step(lambda: ops.attention(q, k, v, cu_seqlens, prefix=prefix), [q, k, v], grad)


def padded(lengths: list[int], width: int, dtype: torch.dtype, masked: bool) -> Callable[[], None]:
    """torch's step over [B, H, width, D]; with ``masked`` a boolean mask of padding and causality, else is_causal."""
    shape = (len(lengths), HEADS, width, DIM)
    q, k, v = (torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    place = torch.arange(width, device=DEVICE)
    mask = None
    if masked:
        causal = place[:, None] >= place[None, :]
        mask = causal & (place < torch.tensor(lengths, device=DEVICE)[:, None])[:, None, None, :]
    return step(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked), [q, k, v], grad)


def flops(pairs: int) -> int:
    return 14 * DIM * HEADS * pairs


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def against_torch(
    name: str,
    lengths: list[int],
    width: int,
    dtype: torch.dtype,
    masked: bool,
    aims: dict[str, float] | None = None,
) -> None:
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
        aims=aims,
        budget=BUDGET,
    )


def shared_prompt(
    prompt: int, answers: int, answer: int, dtype: torch.dtype, aims: dict[str, float] | None = None
) -> None:
    prefix = torch.tensor([[0, 0]] + [[0, prompt]] * answers, dtype=torch.int32, device=DEVICE)
    whole = prompt + answer
    report(
        "attention",
        f"{answers} answers of {answer} tokens to a prompt of {prompt}, {str(dtype).removeprefix('torch.')}, "
        "forward and backward",
        {
            "pyrlhf, prompt shared": Candidate(
                packed([prompt] + [answer] * answers, dtype, prefix),
                flops=flops(triangle(prompt) + answers * (triangle(answer) + prompt * answer)),
            ),
            "pyrlhf, whole sequences": Candidate(
                packed([whole] * answers, dtype), flops=flops(answers * triangle(whole))
            ),
        },
        ours="pyrlhf, prompt shared",
        aims=aims,
        budget=BUDGET,
    )


def torchs(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


def long_sequence(heads: int, dim: int, tflop_s: float, tokens: int = 16_384) -> None:
    """One causal sequence, bfloat16, each direction alone."""
    leaves = [torch.randn(tokens, heads, dim, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)]
    grad = torch.randn_like(leaves[0])
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    ways: dict[str, Callable[..., Tensor]] = {
        "pyrlhf": lambda q, k, v: ops.attention(q, k, v, cu_seqlens),
        "torch SDPA, flash": partial(torchs, SDPBackend.FLASH_ATTENTION),
        "torch SDPA, cuDNN": partial(torchs, SDPBackend.CUDNN_ATTENTION),
    }
    outs, absent = {}, {}
    for name, way in ways.items():
        try:
            outs[name] = way(*leaves)
            torch.autograd.grad(outs[name], leaves, grad, retain_graph=True)
        except RuntimeError as error:  # torch was built without it, or it does not take this
            absent[name] = str(error).splitlines()[0]
    for name in absent:
        outs.pop(name, None)
    for out in outs.values():
        torch.testing.assert_close(out, outs["pyrlhf"], rtol=2e-2, atol=2e-2)

    def forward(way: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return way(*leaves)

    pairs = triangle(tokens) * dim * heads
    directions: tuple[tuple[str, int, dict[str, Callable[[], object]], float], ...] = (
        ("forward", 4, {name: partial(forward, ways[name]) for name in outs}, 0.9),
        (
            "backward",
            10,
            {name: partial(torch.autograd.grad, out, leaves, grad, retain_graph=True) for name, out in outs.items()},
            0.8,
        ),
    )
    for direction, flops_a_pair, runs, times in directions:
        aims = {name: times for name in ways if name != "pyrlhf"}
        report(
            "attention",
            f"T {tokens}, {heads} heads of {dim}, dense causal, bfloat16, {direction}",
            {name: Candidate(run, flops=flops_a_pair * pairs) for name, run in runs.items()}
            | {GEMM: best_gemm(torch.bfloat16)},
            ours="pyrlhf",
            absent=absent,
            aims=aims | ({"gflop_s": 1000 * tflop_s} if direction == "forward" else {}),
            budget=BUDGET,
        )


def on_gpu() -> None:
    long_sequence(16, 128, 460.0)
    long_sequence(32, 64, 380.0)
    lengths = torch.linspace(128, 1920, 15).int().tolist() + [2048]
    name = f"B 16, {HEADS} heads of {DIM}, lengths 128..2048, the mean half of it"
    against_torch(name, lengths, 2048, torch.bfloat16, masked=True, aims={"torch SDPA, boolean mask": 4.0})
    shared_prompt(4096, 8, 256, torch.bfloat16, aims={"pyrlhf, whole sequences": 4.0})


def main() -> None:
    torch.manual_seed(0)
    if ON_GPU:
        on_gpu()
        return
    lengths = torch.randint(128, 513, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    for dtype in (torch.float32, torch.bfloat16):
        against_torch("B 8, 12 heads of 64, lengths uniform in 128..512", lengths, 512, dtype, masked=True)
        against_torch("B 2, 12 heads of 64, T 2048, dense causal", [2048] * 2, 2048, dtype, masked=False)
    shared_prompt(512, 8, 64, torch.float32)


if __name__ == "__main__":
    main()
