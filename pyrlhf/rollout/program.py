"""A decode step recorded once and run again without the Python between its kernels.

In a small model most of a step is Python: finding modules, checking arguments, allocating results. All of that comes out the same
every time as long as the batch has the same number of rows and the tensors stay where they are. So a step is recorded while it
runs: each call of the core with its addresses, each call of torch that computes something with the tensor it gave. Running the
program makes the same calls in the same order, on the same memory, with the same bits. It is to the CPU what a CUDA graph is to a GPU,
and on a GPU it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrlhf.ops._core import recording

Call = tuple[Callable[..., object], tuple[Any, ...]]

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Program:
    """A function of tensors that stay where they are, recorded.

    Args:
        step: computes a tensor from others that its caller keeps and writes new values into. It may branch on anything but
            those values.

    Attributes:
        output: what `step` returned; `run` writes new values into it.
    """

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._calls: list[Call] = []
        self._alive: list[Tensor] = []  # everything whose address is in a call
        with recording(self._calls), _Recorder(self._calls, self._alive):
            self.output = step()

    def run(self) -> Tensor:
        for function, arguments in self._calls:
            function(*arguments)
        return self.output


class Graph:
    """The same on CUDA: the kernels of `step` as a CUDA graph. Whatever it computes from must live on the device."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # libraries allocate and choose their kernels at the first call
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = step()

    def run(self) -> Tensor:
        self._graph.replay()
        return self.output


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call], alive: list[Tensor]) -> None:
        super().__init__()
        self._calls, self._alive = calls, alive

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = len(self._calls)
        result = function(*args, **kwargs)
        del self._calls[before:]  # an op of ours is repeated as a whole: its own tensors are gone by then
        made = _tensors(result)
        self._alive += made
        if function._schema.is_mutable:
            self._calls.append((_repeat, (function, args, kwargs)))
        elif made and not _is_view(made, _tensors((args, kwargs))) and function._opname not in _ALLOCATES:
            self._calls.append((_recompute, (function, args, kwargs, made)))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _is_view(made: list[Tensor], given: list[Tensor]) -> bool:
    places = {t.untyped_storage().data_ptr() for t in given}
    return all(t.untyped_storage().data_ptr() in places for t in made)


def _repeat(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function(*args, **kwargs)


def _recompute(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> None:
    result = function(*args, **kwargs)
    for old, new in zip(made, (result,) if isinstance(result, Tensor) else _tensors(result), strict=True):
        old.copy_(new)


class DecodeProgram:
    """A decode step of a fixed number of rows. Fewer can be asked for: the last one then stands for those that are missing.

    Args:
        step: (tokens, positions, table) -> logits; calling it again with the same changes nothing.
        rows: how many.
        tokens, positions, table: of a step, to be recorded with.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: int,
        tokens: Tensor,
        positions: Tensor,
        table: Tensor,
    ) -> None:
        self._rows = torch.arange(rows, device=tokens.device)
        self._inputs = [self._filled(x) for x in (tokens, positions, table)]
        kind = Graph if tokens.is_cuda else Program
        self._program = kind(lambda: step(*self._inputs))

    def logits(self, *inputs: Tensor) -> Tensor:
        """Of a step with these tokens, positions and table. The next call writes into the same memory."""
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new if len(new) == len(own) else self._filled(new))
        return self._program.run()[: len(inputs[0])]

    def _filled(self, x: Tensor) -> Tensor:
        missing = len(self._rows) - len(x)
        return x.clone() if not missing else x[self._rows.clamp(max=len(x) - 1)]


__all__ = ["DecodeProgram", "Graph", "Program"]
