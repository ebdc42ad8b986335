"""A policy's matrices in the layout that decoding streams, beside the weights that are trained.

On the CPU every linear layer and the language-model head get a packed copy (`pyrlhf.ops.packed_linear`) in the model's dtype.
Whenever generation begins, what has changed is written anew: one pass over the weights, all threads, in the same memory. A row's
bits then depend on no other row, which is what makes a sample independent of its batch. Elsewhere the weights themselves are used.
LoRA adapters (peft) are folded in on the way and the weights are put back as they were, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyrlhf import ops
from pyrlhf.model.heads import LMHead
from pyrlhf.model.transformer import Linear
from pyrlhf.ops._core import CORE_DTYPES

if TYPE_CHECKING:
    from pyrlhf.model import CausalLM

#: Makes sharded parameters whole inside a `with` (ZeRO 3).
Gather = Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager[Any]]


def whole_already(parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """The `Gather` of weights that are not sharded."""
    return contextlib.nullcontext()


class DecodeWeights:
    """The packed copies, and when they are in use.

    Args:
        policy: the model whose layers generate.
        kept: the copies stay in use after `in_use`, for training by the kernels that sample.

    Attributes:
        seconds: what the last `in_use` took to write them.
        bytes: their size.
    """

    def __init__(self, policy: CausalLM, *, kept: bool = False) -> None:
        self._policy, self._kept = policy, kept
        self._packed: dict[nn.Module, ops.PackedWeight] = {}
        self.seconds, self.bytes = 0.0, 0

    @contextlib.contextmanager
    def in_use(self, gather: Gather = whole_already) -> Iterator[None]:
        """The policy generates from its present weights inside. They must not be written to there.

        Args:
            gather: makes sharded weights whole. Each matrix is gathered once, packed and let go of; everything else, and all that
                is not packed, stays whole until the end. All ranks must enter and leave.

        Raises:
            ValueError: a weight holds NaN or infinity.
        """
        layers = self._layers()
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            stack.callback(self._detach)
            if not _packs(self._policy.trunk.embed.tokens.weight):
                stack.enter_context(gather(list(self._policy.parameters())))  # adapters are folded into what generates
                gather = whole_already
            for layer, adapter in layers:
                stack.enter_context(_folded(layer, adapter, gather, self._pack))
            packed = {layer.weight for layer, _ in layers if layer in self._packed}
            embedded = self._policy.trunk.embed.tokens.weight
            rest = [p for p in self._policy.parameters() if p not in packed or p is embedded]
            stack.enter_context(gather(rest))
            _check_finite([p for p in rest if p not in packed], self._policy)
            self.seconds = time.perf_counter() - begun
            self.bytes = sum(w.panels.numel() * w.panels.element_size() for w in self._packed.values())
            yield

    def folded_bytes(self) -> int:
        """Bytes of the second copies that weights with an adapter have inside `in_use`, where nothing is packed."""
        folded = [layer.weight for layer, adapter in self._layers() if adapter is not None and not _packs(layer.weight)]
        return sum(getattr(w, "ds_numel", w.numel()) * w.element_size() for w in folded)

    def places(self) -> tuple[int, ...]:
        """Where everything lies that a step reads, inside `in_use`."""
        read = [*self._policy.parameters(), *self._policy.buffers(), *(w.panels for w in self._packed.values())]
        return tuple(t.data_ptr() for t in read)

    def attach(self) -> None:
        """Write the copies anew and leave them in use."""
        for layer, _ in self._layers():
            self._pack(layer)

    def _layers(self) -> list[tuple[Any, Any]]:
        """(layer, the peft layer around it or None) of everything that multiplies by a matrix."""
        around = {m.base_layer: m for m in self._policy.modules() if isinstance(getattr(m, "base_layer", None), Linear)}
        found: Iterator[nn.Module] = (m for m in self._policy.modules() if isinstance(m, Linear | LMHead))
        return [(layer, around.get(layer)) for layer in found]

    def _pack(self, layer: Any) -> None:
        weight: Tensor = layer.weight
        if not _packs(weight):
            return
        if layer not in self._packed:
            self._packed[layer] = ops.pack_weight(weight, weight.dtype)
        else:
            self._packed[layer].update(weight)
        if not self._packed[layer].finite:
            raise _not_finite(weight, self._policy)
        layer.packed = self._packed[layer]

    def _detach(self) -> None:
        for layer in () if self._kept else self._packed:
            layer.packed = None  # type: ignore[assignment]


def _packs(weight: Tensor) -> bool:
    """Whether matrices such as this one are packed."""
    return weight.device.type == "cpu" and weight.dtype in CORE_DTYPES


def _check_finite(weights: Sequence[Tensor], policy: nn.Module) -> None:
    """ValueError names the first that is not. A device is waited for once."""
    # a sum takes half the time of isfinite().all(): it runs at memory's speed
    finite = [w.detach().sum(dtype=torch.float32 if w.dtype == torch.float16 else None).isfinite() for w in weights]
    if finite and not bool(torch.stack(finite).all()):
        raise _not_finite(weights[torch.stack(finite).tolist().index(False)], policy)


def _not_finite(weight: Tensor, policy: nn.Module) -> ValueError:
    name = next((name for name, p in policy.named_parameters() if p is weight), "a weight")
    return ValueError(f"policy: expected finite weights, found NaN or infinity in {name}; go back to a checkpoint")


@contextlib.contextmanager
def _folded(layer: Any, adapter: Any, gather: Gather, pack: Callable[[Any], None]) -> Iterator[None]:
    """Pack a layer's weight, with the LoRA adapter's product added where there is one; inside, the adapter does nothing else."""
    if adapter is None or adapter.disable_adapters or adapter.merged:
        with gather([layer.weight]):
            pack(layer)
        yield
        return
    weight = layer.weight
    with gather(list(adapter.parameters())):
        kept = weight.data
        weight.data = kept.clone()
        try:
            adapter.merge()
            pack(layer)
        except BaseException:
            weight.data = kept
            adapter.merged_adapters.clear()
            raise
        if layer.packed is not None:
            weight.data = kept
    try:
        yield
    finally:
        if layer.packed is None:
            weight.data = kept
        adapter.merged_adapters.clear()  # nothing is subtracted: the weight that was never changed is back
