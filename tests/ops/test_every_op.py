"""What the contract asks of every op alike: all sizes, every output written, and no gradient where none is promised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrlhf import ops

LENGTHS = {"one": [1], "ragged": [5, 0, 1, 7], "1023": [1023], "1000 sequences": [1] * 1000}
PLAIN = ("decode_attention", "gae", "packed_linear", "sample", "sampled_logprob")  # without gradient
DIFFERENTIABLE = (
    *("activation", "attention", "layer_norm", "linear", "linear_logprob"),
    *("ppo_loss", "ranking_loss", "rms_norm", "rotary"),
)


def arguments(op: str, lengths: list[int]) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Float tensors, then what follows them, then keywords."""
    generator = torch.Generator().manual_seed(3)
    tokens, sequences = sum(lengths), len(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ids, positions = torch.arange(tokens), torch.arange(tokens) % 7

    def floats(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator) for shape in shapes]

    def paged() -> tuple[list[Tensor], list[Any], dict[str, Any]]:
        width = -(-max(lengths) // 4)
        cache = (sequences * width, 4, 2, 4)
        table = torch.arange(sequences * width, dtype=torch.int32).view(sequences, width)
        return floats((sequences, 2, 4), cache, cache), [table, torch.tensor(lengths, dtype=torch.int32)], {}

    every: dict[str, Callable[[], tuple[list[Tensor], list[Any], dict[str, Any]]]] = {
        "activation": lambda: (floats((tokens, 8)), ["silu"], {"gated": True}),
        "attention": lambda: (floats((tokens, 2, 4), (tokens, 1, 4), (tokens, 1, 4)), [cu], {}),
        "decode_attention": paged,
        "gae": lambda: (floats((tokens,), (tokens,)), [cu], {}),
        "layer_norm": lambda: (floats((tokens, 8), (8,), (8,)), [], {"eps": 1e-5}),
        "linear": lambda: (floats((tokens, 512), (512, 512), (512,)), [], {}),
        "linear_logprob": lambda: (floats((tokens, 8), (33, 8)), [ids % 33], {}),
        "packed_linear": lambda: (floats((tokens, 8)), [ops.pack_weight(*floats((5, 8)), torch.float32)], {}),
        "ppo_loss": lambda: (floats(*[(tokens,)] * 6), [], {}),
        "ranking_loss": lambda: (floats((tokens,)), [cu, (ids % 4).int()], {}),
        "rms_norm": lambda: (floats((tokens, 8), (8,)), [], {"eps": 1e-5}),
        "rotary": lambda: (floats((tokens, 2, 4), (tokens, 1, 4)), [positions, torch.tensor([1.0, 0.1])], {}),
        "sample": lambda: (floats((tokens, 33)), [ids, positions], {"seed": 5, "top_p": 0.9}),
        "sampled_logprob": lambda: (floats((tokens, 33)), [ids % 33], {"temperature": 0.7}),
    }
    return every[op]()


def run(function: Callable[..., Any], op: str, lengths: list[int]) -> list[Tensor]:
    """Outputs, and for differentiable ops the gradients."""
    given, rest, options = arguments(op, lengths)
    of = (0, 3) if op == "ppo_loss" else range(len(given)) if op in DIFFERENTIABLE else ()
    leaves = [x.requires_grad_(i in of) for i, x in enumerate(given)]
    out = tree_leaves(function(*leaves, *rest, **options))
    if op in DIFFERENTIABLE:
        sum(x.sum() * (i + 1) for i, x in enumerate(out) if x.requires_grad).backward()  # type: ignore[union-attr]
    return [x.detach() for x in out] + [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("op", [*PLAIN, *DIFFERENTIABLE])
def test_every_size_gives_the_references_answer_and_all_of_it(op: str, lengths: list[int], poison: None) -> None:
    found = run(getattr(ops, op), op, lengths)
    for a, b in zip(found, run(getattr(ops, f"{op}_ref"), op, lengths), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_results_without_gradient_do_not_ask_for_one(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    given, rest, options = arguments(op, [5, 7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = tree_leaves(getattr(ops, op)(*(x.requires_grad_() for x in given), *rest, **options))
    assert not any(x.requires_grad for x in out)


@pytest.mark.parametrize("op", [*PLAIN, *DIFFERENTIABLE])
def test_sparse_tensors_are_named(op: str) -> None:
    given, rest, options = arguments(op, [5, 7])
    with pytest.raises(TypeError, match=rf"^{op}: \w+ must be a dense tensor, found layout torch.sparse_coo"):
        getattr(ops, op)(given[0].to_sparse(), *given[1:], *rest, **options)
