"""sample on 16 and 32 rows of GPT-2's vocabulary, against torch's softmax, sort and multinomial of generation loops."""

from __future__ import annotations

from typing import Any

import torch
from common import Candidate, report
from torch import Tensor

from pyrlhf import ops

VOCAB = 50_257
CASES: list[tuple[str, int, dict[str, Any]]] = [  # name, rows, options
    ("temperature 0.7", 32, {"temperature": 0.7}),
    ("top-k 50", 32, {"top_k": 50}),
    ("top-p 0.9", 16, {"top_p": 0.9}),
    ("top-p 0.9", 32, {"top_p": 0.9}),
    ("greedy", 32, {"temperature": 0}),
]


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
    for name, rows, options in CASES:
        torch.manual_seed(0)
        logits, ids = 3 * torch.randn(rows, VOCAB), torch.arange(rows)
        report(
            "sample",
            f"{rows} x {VOCAB}, float32, {name}",
            {
                "pyrlhf": Candidate(
                    lambda x=logits, i=ids, o=options: ops.sample(x, i, i, seed=0, **o), 4 * logits.numel()
                ),
                "sample_ref (torch)": Candidate(
                    lambda x=logits, i=ids, o=options: ops.sample_ref(x, i, i, seed=0, **o), 4 * logits.numel()
                ),
                "softmax, sort, multinomial": Candidate(
                    lambda x=logits, o=options: torch_sample(x, **o), 4 * logits.numel()
                ),
            },
            ours="pyrlhf",
            rounds=20,
        )


if __name__ == "__main__":
    main()
