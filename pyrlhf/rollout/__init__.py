"""Generation: prompts -> Rollouts, by the same modules and weights that are trained, through a paged KV cache."""

from __future__ import annotations

from pyrlhf.rollout.cache import PagedCache, PagedDecode, PagedPrefill
from pyrlhf.rollout.generator import Generator
from pyrlhf.rollout.rollouts import Finished, Rollouts, Sampling, Timings
from pyrlhf.rollout.weights import DecodeWeights

__all__ = [
    "DecodeWeights",
    "Finished",
    "Generator",
    "PagedCache",
    "PagedDecode",
    "PagedPrefill",
    "Rollouts",
    "Sampling",
    "Timings",
]
