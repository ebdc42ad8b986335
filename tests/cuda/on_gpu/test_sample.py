"""What only a GPU shows of sample: large vocabularies and batches, CUDA graphs, torch.compile, many repeats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checking import captured
from torch import Tensor

from pyrlhf.ops import sample, sampled_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 50},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"temperature": 0.7, "top_k": 1000, "top_p": 0.95, "min_p": 0.01},
]
KINDS = {"peaky": 6.0, "usual": 3.0, "flat": 0.05, "equal": 0.0}


def rows(count: int, vocab: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, vocab, generator=generator)
    ids = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return logits, ids, torch.randint(0, 2**40, (count,), generator=generator)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "vocab"), [(1, 128_256), (7, 151_937), (300, 50_257), (2, 1 << 22)])
def test_the_tokens_are_those_of_the_cpu(options: dict[str, Any], kind: str, count: int, vocab: int) -> None:
    logits, ids, positions = rows(count, vocab, KINDS[kind])
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype)
        tokens, logprobs = sample(x, ids, positions, seed=5, **options)
        found = sample(x.cuda(), ids.cuda(), positions.cuda(), seed=5, **options)
        assert torch.equal(found[0].cpu(), tokens)
        torch.testing.assert_close(found[1].cpu(), logprobs, rtol=2e-7, atol=1e-7)


def test_a_thousand_runs_give_the_same_bits() -> None:
    logits, ids, positions = (t.cuda() for t in rows(64, 128_256))
    options: dict[str, Any] = {"seed": 3, "top_k": 5000, "top_p": 0.9}
    tokens, logprobs = sample(logits, ids, positions, **options)
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        again = sample(logits, ids, positions, **options)
        same &= (again[0] == tokens).all() & (again[1] == logprobs).all()
    assert bool(same)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_replays_with_new_logits_ids_and_positions(options: dict[str, Any]) -> None:
    first, second = ([t.cuda() for t in rows(5, 128_256, seed=seed)] for seed in (0, 1))
    expected = [sample(*each, seed=1, **options) for each in (first, second)]
    held = [t.clone() for t in first]
    graph, (tokens, logprobs) = captured(lambda: sample(*held, seed=1, **options))
    for each, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
        for place, t in zip(held, each, strict=True):
            place.copy_(t)
        graph.replay()
        assert torch.equal(tokens, wanted[0])
        assert torch.equal(logprobs, wanted[1])


def test_compilation_and_registration() -> None:
    logits, ids, positions = (t.cuda() for t in rows(6, 500))
    torch.library.opcheck(torch.ops.pyrlhf.sample.default, (logits, ids, positions, 3, 0.7, 10, 0.9, 0.01))
    torch.library.opcheck(torch.ops.pyrlhf.sampled_logprob.default, (logits, ids % 500, 0.7))

    def scaled(x: Tensor, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = sample(x * 2, i, p, seed=3, top_k=10)
        return tokens + 1, sampled_logprob(x * 2, tokens)

    compiled = torch.compile(scaled, fullgraph=True)
    for a, b in zip(compiled(logits, ids, positions), scaled(logits, ids, positions), strict=True):
        assert torch.equal(a, b)


def test_log_probs_are_those_of_the_draw_at_full_size() -> None:
    logits, ids, positions = (t.cuda() for t in rows(256, 128_256))
    tokens, logprobs = sample(logits, ids, positions, seed=0)
    assert torch.equal(sampled_logprob(logits, tokens), logprobs)
    exact = logits.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    assert not math.isnan(float(logprobs.sum()))
