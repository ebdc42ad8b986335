"""ranking_loss on a GPU, where size, graphs and chance play a part."""

from __future__ import annotations

import pytest
import torch
from checking import captured, equal, offsets
from torch import Tensor

from pyrlhf.ops import ranking_loss, ranking_loss_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def ranked(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    cu = offsets(sizes).cuda()
    total = sum(sizes)
    ranks = torch.randint(0, 50, (total,), device="cuda", dtype=torch.int32)
    return torch.randn(total, device="cuda", requires_grad=True), cu, ranks


def values_and_gradient(scores: Tensor, cu: Tensor, ranks: Tensor) -> list[Tensor]:
    loss, stats = ranking_loss(scores, cu, ranks)
    return [loss.detach(), *stats, *torch.autograd.grad(loss, scores)]


def test_many_and_large_groups_match_float64() -> None:
    for sizes in ([9, 64, 1, 33] * 100, [5000, 2, 300]):
        scores, cu, ranks = ranked(sizes)
        wide = scores.detach().double().requires_grad_()
        loss, stats = ranking_loss_ref(wide, cu, ranks)
        exact = [loss.detach(), *stats, *torch.autograd.grad(loss, wide)]
        for a, b in zip(values_and_gradient(scores, cu, ranks), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


def test_equal_bits_a_thousand_times() -> None:
    inputs = ranked([9, 64, 1, 33, 300] * 100)
    first = values_and_gradient(*inputs)
    for _ in range(1000):
        assert equal(values_and_gradient(*inputs), first)


def test_it_runs_in_a_graph() -> None:
    scores, cu, ranks = (t.detach() for t in ranked([9, 4, 300]))
    graph, (found, stats) = captured(lambda: ranking_loss(scores, cu, ranks))
    scores.normal_()
    graph.replay()
    loss, expected = ranking_loss(scores, cu, ranks)
    assert equal([found, *stats], [loss, *expected])


def test_it_compiles() -> None:
    scores, cu, ranks = ranked([9, 4, 300])
    compiled = torch.compile(lambda s: ranking_loss(s * 2, cu, ranks)[0], fullgraph=True)
    found, expected = compiled(scores), ranking_loss(scores * 2, cu, ranks)[0]
    assert torch.equal(found, expected)
