"""rms_norm, layer_norm and activation where only a GPU will do: large sizes, many runs, graphs, streams and inductor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checking import captured, equal
from torch import Tensor

from pyrlhf.ops import activation, layer_norm, rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def norms_and_activation(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    first, summed = rms_norm(x, weight, eps=1e-5, residual=residual)
    second, again = layer_norm(first, weight, bias, eps=1e-5, residual=summed)
    return activation(torch.cat((second, again), dim=-1), "silu", gated=True), activation(second, "gelu")


def inputs(rows: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(3)
    shapes = [(rows, dim), (rows, dim), (dim,), (dim,)]
    return [torch.randn(s, generator=generator, device="cuda").to(dtype).requires_grad_() for s in shapes]


def values_and_grads(function: Callable[..., tuple[Tensor, ...]], given: list[Tensor]) -> list[Tensor]:
    outs = function(*given)
    generator = torch.Generator(device="cuda").manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, device="cuda").to(o.dtype) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, given, cotangents)]


@pytest.mark.parametrize(("rows", "dim"), [(70, 1023), (3000, 4096)])
def test_same_bits_in_1000_runs(rows: int, dim: int) -> None:
    given = inputs(rows, dim)
    first = values_and_grads(norms_and_activation, given)
    assert all(equal(values_and_grads(norms_and_activation, given), first) for _ in range(1000))


@pytest.mark.parametrize(("rows", "dim"), [(1_000_003, 128), (70_001, 4096), (20_011, 1023), (300, 40_000)])
def test_large_sizes_agree_with_the_reference(rows: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(rows, dim, torch.float32)
    found = values_and_grads(norms_and_activation, given)
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    for a, b in zip(found, values_and_grads(norms_and_activation, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_more_elements_than_32_bits_count() -> None:
    x = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda").fill_(-1.0)
    x[-5:] = 2.0
    out = activation(x, "relu")
    assert out[-5:].eq(2).all()
    assert not out[:-5].any()
    gated = activation(x.view(-1, 2**20), "relu", gated=True)
    assert not gated[:-1].any()
    assert gated[-1, -5:].eq(0).all()  # relu(-1) * 2
    normalised = rms_norm(x.view(-1, 2**10), torch.ones(2**10, device="cuda"), eps=0.0)
    assert normalised[:-1].eq(-1).all()
    assert (normalised[-1, -1] / normalised[-1, 0]).item() == pytest.approx(-2, rel=2**-7)


def test_in_a_graph() -> None:
    given = [t.detach() for t in inputs(100, 1024)]
    graph, outs = captured(lambda: norms_and_activation(*given))
    for new, old in zip(inputs(100, 1024, torch.float32), given, strict=True):
        old.copy_(new * 1.7)
    graph.replay()
    assert equal(outs, norms_and_activation(*given))


def test_gradients_in_a_graph() -> None:
    given = inputs(100, 1024)
    cotangents = [torch.ones(100, 1024, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    expected = torch.autograd.grad(norms_and_activation(*given), given, cotangents)
    graph, found = captured(lambda: torch.autograd.grad(norms_and_activation(*given), given, cotangents))
    graph.replay()
    assert equal(found, expected)


def test_compiled_by_inductor() -> None:
    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return norms_and_activation(given[0] * 2, *given[1:])

    given = inputs(65, 1023, torch.float32)
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(values_and_grads(compiled, given), values_and_grads(run, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "activation"])
def test_opcheck(op: str) -> None:
    x, residual, weight, bias = inputs(4, 24, torch.float32)
    arguments = {
        "rms_norm": (x, weight, residual, 1e-5),
        "layer_norm": (x, weight, bias, residual, 1e-5),
        "activation": (x, "gelu_new", True),
    }[op]
    torch.library.opcheck(getattr(torch.ops.pyrlhf, op).default, arguments)
