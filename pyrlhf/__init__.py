"""pyrlhf trains language models from human feedback: pretrain, SFT, reward model from K ranked answers, PPO and PPO-ptx.

Everything heavy is imported on first use, so that ``import pyrlhf`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "pyrlhf.model",
    "CausalLM": "pyrlhf.model",
    "ScalarModel": "pyrlhf.model",
    "Tokenizer": "pyrlhf.data",
    "Sampling": "pyrlhf.rollout",
    "Generator": "pyrlhf.rollout",
    "Rollouts": "pyrlhf.rollout",
    "EngineConfig": "pyrlhf.engine",
    "HybridEngine": "pyrlhf.engine",
}
_ROOMS = ("data", "engine", "evaluate", "kernels", "model", "ops", "rlhf", "rollout", "stages")

if TYPE_CHECKING:
    from pyrlhf import data, engine, evaluate, model, ops, rlhf, rollout, stages
    from pyrlhf.data import Tokenizer
    from pyrlhf.engine import EngineConfig, HybridEngine
    from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
    from pyrlhf.rollout import Generator, Rollouts, Sampling

__all__ = [*_HOMES, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"pyrlhf.{name}")
    raise AttributeError(f"module 'pyrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
