"""Ragged batches and small configs that the model tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyrlhf.model import ModelConfig


class Packed(NamedTuple):
    """The arguments of a model's forward."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def sequences(self) -> list[Tensor]:
        return list(self.tokens.split(self.cu_seqlens.diff().tolist()))


def pack(sequences: Sequence[Tensor]) -> Packed:
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    return Packed(torch.cat(list(sequences)), positions, ends)


@pytest.fixture(scope="session")
def ragged() -> Callable[..., Packed]:
    """``ragged(vocab, lengths, seed)``: random token ids of sequences of these lengths, packed."""

    def make(vocab: int, lengths: Sequence[int], seed: int = 0) -> Packed:
        generator = torch.Generator().manual_seed(seed)
        return pack([torch.randint(vocab, (length,), generator=generator) for length in lengths])

    return make


@pytest.fixture(scope="session")
def packed() -> Callable[[Sequence[Tensor]], Packed]:
    return pack


TINY = {"vocab_size": 61, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "max_positions": 64}
LLAMA = {"norm": "rms", "positions": "rotary", "activation": "silu", "gated": True, "num_kv_heads": 2}
NO_BIAS = {"attention_bias": False, "output_bias": False, "mlp_bias": False}
CONFIGS = {
    "gpt2": {},
    "gpt1": {"norm_position": "post"},
    "llama": {**LLAMA, **NO_BIAS, "tied_embeddings": False},
    "qwen3": {**LLAMA, **NO_BIAS, "qk_norm": True, "head_dim": 8},
    "banded": {"windows": (None, 3, 5)},
    "bert": {
        "norm_position": "post",
        "causal": False,
        "token_types": 2,
        "embedding_norm": True,
        "mlm_head": True,
        "activation": "gelu",
    },
}


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest) -> ModelConfig:
    """One small model of each kind."""
    return ModelConfig(**{**TINY, **CONFIGS[request.param]})


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """``tiny_config(kind, **overrides)``."""

    def make(kind: str = "gpt2", **overrides: object) -> ModelConfig:
        return ModelConfig(**{**TINY, **CONFIGS[kind], **overrides})

    return make


@pytest.fixture(scope="session")
def spread() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Gives every parameter (norms and biases too) values of its own, so that a swapped or dropped one shows."""

    def randomise(model: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 0.3)
                parameter.add_(noise)
        return model.eval()

    return randomise
