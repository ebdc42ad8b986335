"""ppo_loss on a GPU, where size, graphs and chance play a part."""

from __future__ import annotations

import pytest
import torch
from checking import captured, equal
from torch import Tensor

from pyrlhf.ops import ppo_loss, ppo_loss_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tokens(n: int) -> list[Tensor]:
    x = [torch.randn(n, device="cuda") for _ in range(6)]
    x[1] = x[0] + 0.1 * x[1]
    x[4] = x[3] + 0.1 * x[4]
    for at in (0, 3):
        x[at].requires_grad_()
    return x


def loss(*x: Tensor) -> Tensor:
    out = ppo_loss(*x)
    return out.policy + 0.1 * out.value


def values_and_gradients(x: list[Tensor]) -> list[Tensor]:
    out = ppo_loss(*x)
    gradients = torch.autograd.grad(out.policy + 0.1 * out.value, (x[0], x[3]))
    return [out.policy.detach(), out.value.detach(), *out.stats, *gradients]


def test_many_tokens_match_float64() -> None:
    x = tokens(20_000_003)
    found, exact = ppo_loss(*x), ppo_loss_ref(*(t.detach().double() for t in x))
    pairs = zip((found.policy, found.value, *found.stats), (exact.policy, exact.value, *exact.stats), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-6, atol=1e-7)


def test_equal_bits_a_thousand_times() -> None:
    x = tokens(1_000_001)
    first = values_and_gradients(x)
    for _ in range(1000):
        assert equal(values_and_gradients(x), first)


def test_forward_and_backward_do_not_wait_for_the_device() -> None:
    x = tokens(5000)
    values_and_gradients(x)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values_and_gradients(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_it_runs_in_a_graph() -> None:
    x = [t.detach() for t in tokens(5000)]
    graph, found = captured(lambda: ppo_loss(*x))
    x[2].normal_()
    graph.replay()
    again = ppo_loss(*x)
    assert equal([found.policy, found.value, *found.stats], [again.policy, again.value, *again.stats])


def test_it_compiles() -> None:
    x = tokens(5000)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*x), loss(*x))
    found, expected = (torch.autograd.grad(f(*x), (x[0], x[3])) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
