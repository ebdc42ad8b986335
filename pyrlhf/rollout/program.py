"""A decode step recorded once and run again without the Python between its kernels.

In a small model most of a step is Python: finding modules, checking arguments, allocating results. All of that comes out the same
every time as long as the batch has the same number of rows and the tensors stay where they are. So a step is recorded while it
runs: each call of the core with its addresses, each call of torch that computes something with the tensor it gave. Running the
program makes the same calls in the same order, on the same memory, with the same bits; those of the core that follow one another
without Python between them. It is to the CPU what a CUDA graph is to a GPU, and on a GPU it is one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrlhf.ops._core import CoreCall, module, recording, run_tapes

Call = tuple[Callable[..., object], tuple[Any, ...]]
Outputs = tuple[Tensor, ...]

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Program:
    """A function of tensors that stay where they are, recorded.

    Args:
        step: computes tensors from others that its caller keeps and writes new values into. It may branch on anything but
            those values.

    Attributes:
        output: what `step` returned; `run` writes new values into it.
        bytes: of all that is written on the way.
    """

    def __init__(self, step: Callable[[], Outputs]) -> None:
        calls: list[Call | CoreCall] = []
        self._alive: list[Tensor] = []  # everything whose address is in a call
        recorder = _Recorder(calls, self._alive)
        with recording(calls), recorder:
            self.output = step()
        self._calls, self.bytes = _on_tapes(calls), recorder.bytes

    def run(self) -> Outputs:
        for function, arguments in self._calls:
            function(*arguments)
        return self.output

    def repeat(self, then: Sequence[CoreCall], times: int) -> int:
        """Run, each time with the calls `then` after it, up to so many times or until one of those halts it. How often that was: never
        if there is more in it than calls of the core, which alone need no Python."""
        if len(self._calls) != 1 or self._calls[0][0] is not run_tapes:
            return 0
        return run_tapes([*self._calls[0][1][0], module().tape(then)], times)


def _on_tapes(calls: list[Call | CoreCall]) -> list[Call]:
    """The same calls, those of the core that follow one another made by one."""
    joined: list[Call] = []
    for of_the_core, group in itertools.groupby(calls, key=lambda call: isinstance(call, CoreCall)):
        if of_the_core:
            joined.append((run_tapes, ([module().tape(list(group))],)))
        else:
            joined += cast("list[Call]", list(group))
    return joined


@functools.cache
def _aside(device: int) -> torch.cuda.Stream:
    """Where steps are tried and captured: one stream for all, as cuBLAS keeps a workspace (32 MiB on sm_90) for each it has met."""
    return torch.cuda.Stream(device)


class Graph:
    """The same on CUDA: the kernels of `step` as a CUDA graph. Whatever it computes from must live on the device.

    Args:
        step: as above.
        pool: where the graph's tensors live. Graphs that run one after the other, on one stream, may share it: only their outputs
            then take memory of their own.
    """

    bytes = 0  # beside the pool's

    def __init__(self, step: Callable[[], Outputs], pool: Any) -> None:
        aside = _aside(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # libraries allocate and choose their kernels at the first call
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Threads of NCCL or of a data loader may call CUDA meanwhile: that is no fault of this capture.
        with torch.cuda.graph(self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            self.output = step()

    def run(self) -> Outputs:
        self._graph.replay()
        return self.output

    def repeat(self, then: Sequence[CoreCall], times: int) -> int:
        """Never: what is drawn is looked at in between."""
        return 0


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call | CoreCall], alive: list[Tensor]) -> None:
        super().__init__()
        self._calls, self._alive = calls, alive
        self.bytes = 0

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
        elif made and not _is_view(made, _tensors((args, kwargs))):
            self.bytes += sum(t.nbytes for t in made)
            if function._opname not in _ALLOCATES:
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
    """A decode step of a fixed number of rows; fewer can be asked for.

    Args:
        step: tensors -> tensors, all of them with a row for each sequence. Calling it again with the same changes nothing.
        rows: how many.
        inputs: of a step, to be recorded with.
        filling: what each input holds in the rows that nobody asks for.
        pool: see `Graph`.

    Attributes:
        bytes: of what a `Program` writes; a graph's are its pool's.
    """

    def __init__(
        self,
        step: Callable[..., Outputs],
        rows: int,
        inputs: Sequence[Tensor],
        filling: Sequence[int],
        pool: Any = None,
    ) -> None:
        self._filling = filling
        pairs = zip(inputs, filling, strict=True)
        # what is recorded reads these
        self._inputs = tuple(x.new_full((rows, *x.shape[1:]), value) for x, value in pairs)
        self._asked = tuple(own[:0] for own in self._inputs)
        self.taken(*inputs)

        def whole() -> Outputs:
            return step(*self._inputs)

        self._program: Program | Graph
        if inputs[0].is_cuda:
            with torch.cuda.device(inputs[0].device):
                self._program = Graph(whole, pool)
        else:
            self._program = Program(whole)
        self.bytes = self._program.bytes

    def taken(self, *inputs: Tensor) -> Outputs:
        """Take over the inputs of the next step. What comes back is the memory that the program reads, to be gone on with in their place:
        they need not be copied again."""
        before, rows = len(self._asked[0]), len(inputs[0])
        if rows != before:
            self._asked = tuple(own[:rows] for own in self._inputs)
            for own, value in zip(self._inputs, self._filling, strict=True):
                own[rows:before].fill_(value)
        for asked, new in zip(self._asked, inputs, strict=True):
            if asked is not new:
                asked.copy_(new)
        return self._asked

    def __call__(self) -> Outputs:
        """What the step gives for them. The next call, of this or of another program of the pool, writes into the same memory."""
        return self._of_those_asked(self._program.run())

    def repeat(self, then: Sequence[CoreCall], times: int) -> int:
        """The step again, up to so many times, each time with the calls `then` after it, which get its inputs ready for the next: until
        one of them halts it. How often that was; where Python is needed for a step, never."""
        return self._program.repeat(then, times)

    def _of_those_asked(self, outputs: Outputs) -> Outputs:
        rows = len(self._asked[0])
        return tuple(out[:rows] for out in outputs)


__all__ = ["DecodeProgram", "Graph", "Program"]
