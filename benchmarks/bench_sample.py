"""sample against torch's softmax, sort and multinomial of generation loops: on the CPU 16 and 32 rows of GPT-2's vocabulary,
on CUDA a decoding step of 1 and 64 rows and a training step's 256, of GPT-2's and of Llama 3's."""

from __future__ import annotations

from typing import Any

import torch
from common import DEVICE, Candidate, report
from torch import Tensor

from pyrlhf import ops

GPT2, LLAMA3 = 50_257, 128_256
ON_CPU: list[tuple[str, int, int, torch.dtype, dict[str, Any]]] = [  # name, rows, vocabulary, dtype, options
    ("temperature 0.7", 32, GPT2, torch.float32, {"temperature": 0.7}),
    ("top-k 50", 32, GPT2, torch.float32, {"top_k": 50}),
    ("top-p 0.9", 16, GPT2, torch.float32, {"top_p": 0.9}),
    ("top-p 0.9", 32, GPT2, torch.float32, {"top_p": 0.9}),
    ("greedy", 32, GPT2, torch.float32, {"temperature": 0}),
]
ON_CUDA: list[tuple[str, int, int, torch.dtype, dict[str, Any]]] = [
    ("top-p 0.9", 256, LLAMA3, torch.float32, {"top_p": 0.9}),
    ("top-p 0.9", 256, LLAMA3, torch.bfloat16, {"top_p": 0.9}),
    ("temperature 0.7", 256, LLAMA3, torch.float32, {"temperature": 0.7}),
    ("top-p 0.9", 256, GPT2, torch.float32, {"top_p": 0.9}),
    *((name, rows, vocab, torch.float32, options)
      for vocab in (LLAMA3, GPT2) for rows in (1, 64)
      for name, options in (("temperature 0.7", {"temperature": 0.7}), ("top-k 50", {"top_k": 50}))),
]  # fmt: skip


def torch_sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Filters as masks of -inf, then softmax and multinomial, then the log-prob of what was drawn."""
    if temperature == 0:
        tokens = logits.argmax(1)
        return tokens, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(1, descending=True)
        probabilities = ordered.softmax(1)
        drop = probabilities.cumsum(1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    logprobs = logits.log_softmax(1)
    tokens = torch.multinomial(logprobs.exp(), 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def main() -> None:
    for name, rows, vocab, dtype, options in ON_CUDA if DEVICE.type == "cuda" else ON_CPU:
        torch.manual_seed(0)
        logits = (3 * torch.randn(rows, vocab, device=DEVICE)).to(dtype)
        ids = torch.arange(rows, device=DEVICE)
        size = logits.numel() * logits.element_size()
        report(
            "sample",
            f"{rows} x {vocab}, {str(dtype).removeprefix('torch.')}, {name}",
            {
                "pyrlhf": Candidate(lambda x=logits, i=ids, o=options: ops.sample(x, i, i, seed=0, **o), size),
                "sample_ref (torch)": Candidate(
                    lambda x=logits, i=ids, o=options: ops.sample_ref(x, i, i, seed=0, **o), size
                ),
                "softmax, sort, multinomial": Candidate(lambda x=logits, o=options: torch_sample(x, **o), size),
            },
            ours="pyrlhf",
            aims={"softmax, sort, multinomial": 10.0} if (rows, vocab, name) == (256, LLAMA3, "top-p 0.9") else None,
            rounds=20,
        )


if __name__ == "__main__":
    main()
