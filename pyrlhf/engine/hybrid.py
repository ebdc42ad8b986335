"""Training and generation with one set of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyrlhf.engine.zero import EngineConfig, OptimizerConfig, World, ZeroEngine, init_world
from pyrlhf.rollout import DecodeWeights, Finished, Generator, Rollouts, Sampling, Timings

if TYPE_CHECKING:
    from pyrlhf.model import CausalLM


class HybridEngine(ZeroEngine):
    """A `ZeroEngine` that also generates, on the weights as they are at that moment.

    ZeRO 0-2 generate from the live weights, ZeRO 3 gathers each of them once a phase, on the CPU straight into the layout that
    decoding reads, on CUDA whole for the phase, and lets go of it afterwards; nothing is communicated while tokens are drawn, so
    ranks may draw different numbers of them. With `config.exact` training runs on the sampler's own kernels, so that it sees the
    very log-probs that were sampled.

    Args:
        policy: the model, perhaps with LoRA adapters (peft) on its linear layers.
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
        if config.exact and config.device_type != "cpu":
            raise ValueError(
                "exact: expected device 'cpu', found 'cuda'; sampling and training share kernels there only"
            )
        if config.exact and any(hasattr(module, "base_layer") for module in policy.modules()):
            raise ValueError("exact: expected a policy without adapters, found LoRA's; training would not fold them in")
        super().__init__(policy, world or init_world(config), config, optimizer, total_steps)
        self._weights = DecodeWeights(policy, kept=config.exact)
        policy.tokenwise = config.exact
        self._generator = Generator(policy, max_batch=max_batch, gather=self._whole, weights=self._weights)
        self.timings = Timings()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if self.config.exact:
            self._weights.attach()
        return super().__call__(*args, **kwargs)

    forward = __call__

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        sample_ids: Sequence[int] | Tensor | None = None,
        *,
        on_finish: Callable[[Finished], None] | None = None,
        progress: bool = False,
    ) -> Rollouts:
        """`Generator.generate` on this rank's prompts. All ranks must call it, each with any number of prompts.

        A request that is wrong on one rank raises ValueError on all of them.
        """
        with self._states_offloaded(), self.unhooked():
            self._agree(lambda: self._generator.check(prompts, sampling, n, sample_ids))
            rollouts = self._generator.generate(
                prompts, sampling, n, sample_ids, on_finish=on_finish, progress=progress
            )
        self.timings = rollouts.timings
        return rollouts

    def report(self) -> dict[str, float]:
        """Numbers of this rank's last `generate`."""
        t = self.timings
        return {
            "seconds/refresh": t.refresh_seconds,
            "seconds/prefill": t.prefill_seconds,
            "seconds/decode": t.decode_seconds,
            "rollout/refresh_bytes": t.refresh_bytes,
            "rollout/cache_bytes": t.cache_bytes,
            "rollout/peak_pages": t.peak_pages,
            "rollout/preemptions": t.preemptions,
        }

    def _agree(self, check: Callable[[], object]) -> None:
        """Raise on all ranks what any of them finds wrong, so that nobody waits for one that left."""
        words = ""
        try:
            check()
        except ValueError as error:
            words = str(error)
            if self.world.size == 1:
                raise
        for rank, said in enumerate(self.world.gather(words)):
            if said:
                raise ValueError(said if rank == self.world.rank else f"rank {rank}: {said}")

    @contextlib.contextmanager
    def _states_offloaded(self) -> Iterator[None]:
        """Masters and moments are in host memory inside (`config.offload_during_rollout`, CUDA)."""
        if not (self.config.offload_during_rollout and self.trains and self.world.device.type == "cuda"):
            yield
            return
        self.offload_states()
        try:
            yield
        finally:
            self.reload_states()
