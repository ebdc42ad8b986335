"""Training and generation with one set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyrlhf.engine.zero import EngineConfig, OptimizerConfig, World, ZeroEngine, init_world
from pyrlhf.rollout import Generator, Rollouts, Sampling

if TYPE_CHECKING:
    from pyrlhf.model import CausalLM


class HybridEngine(ZeroEngine):
    """A `ZeroEngine` that also generates, on the weights as they are at that moment. No second copy, nothing to synchronise.

    Args:
        policy: the model.
        config: device, dtype, ZeRO stage.
        optimizer: None for a model that only generates and scores.
        total_steps: number of updates of the run, for schedules that end.
        world: what `init_world` returned; None calls it.
        max_batch: sequences decoded together (`Generator`).
    """

    def __init__(
        self,
        policy: CausalLM,
        config: EngineConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        total_steps: int | None = None,
        *,
        world: World | None = None,
        max_batch: int = 256,
    ) -> None:
        config = config or EngineConfig()
        super().__init__(policy, world or init_world(config), config, optimizer, total_steps)
        self.max_batch = max_batch

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
    ) -> Rollouts:
        """`Generator.generate` on this rank's prompts. Under ZeRO 3 all ranks must call it, each with any number of prompts."""
        with self.gathered() as policy:
            module: Any = policy
            return Generator(module, max_batch=self.max_batch).generate(prompts, sampling, n, sample_ids)
