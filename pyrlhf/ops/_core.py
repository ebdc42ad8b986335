"""The way from Python to the C++ core: one module, two questions (may this call use it on the CPU, on CUDA?)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CORE_DTYPES = (torch.float32, torch.bfloat16)


_tape: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None


def core() -> Any:
    """The C++ core: `module`, or while a `recording` is made the same with every call written down."""
    return module() if _tape is None else _Recorded(module(), _tape)


@contextlib.contextmanager
def recording(tape: list[tuple[Callable[..., object], tuple[Any, ...]]]) -> Iterator[None]:
    """Append (function, arguments) of each call of the core to ``tape``. Calling them again does the same to the same memory."""
    global _tape
    outer, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = outer


class _Recorded:
    def __init__(self, core: Any, tape: list[tuple[Callable[..., object], tuple[Any, ...]]]) -> None:
        self._core, self._tape = core, tape

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self._tape.append((function, arguments) if result is None else (_must, (function, arguments)))
            return result

        return call


def _must(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    if function(*arguments) is False:
        raise MemoryError("a kernel's scratch memory could not be allocated; free some memory")


@functools.cache
def module() -> Any:
    """The extension module ``pyrlhf._C``, on the instruction set that ``PYRLHF_ISA`` names (default: the best this CPU has).

    torch is imported before it on purpose: both then share torch's libgomp, one pool of threads.
    Raises ImportError if the extension is not built, ValueError if ``PYRLHF_ISA`` names an unknown or missing instruction set.
    """
    try:
        from pyrlhf import _C
    except ImportError as error:
        raise ImportError(
            "pyrlhf's C++ core (pyrlhf._C) cannot be loaded: build it with `pip install .` (or `pip install -e .`) in the "
            f"source folder, or set PYRLHF_BACKEND=ref to run on plain PyTorch. The loader said: {error}"
        ) from error
    forced = os.environ.get("PYRLHF_ISA")
    if forced:
        _C.set_isa(forced)
    return _C


def use_core(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the C++ core on the CPU: all there, every float one float32 or bfloat16, and not switched off."""
    if _reference_wanted():
        return False
    for t in tensors:  # noqa: SIM110 - half the time of all(...), and decode calls this for every op of every layer
        if t is not None and not (t.is_cpu and _supported(t)):
            return False
    return True


def use_cuda_core(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the core's CUDA half: all on CUDA, float32 or bfloat16, and that half is built."""
    if _reference_wanted() or not all(t is None or (t.is_cuda and _supported(t)) for t in tensors):
        return False
    return bool(core().cuda_built)


def cuda_stream(t: Tensor) -> int:
    """The handle of the current CUDA stream on the device of ``t``."""
    return int(torch.cuda.current_stream(t.device).cuda_stream)


def address(t: Tensor | None) -> int:
    """The data pointer of ``t``, 0 for None."""
    return 0 if t is None else t.data_ptr()


def _supported(t: Tensor) -> bool:
    return t.dtype in CORE_DTYPES or not t.is_floating_point()


def _reference_wanted() -> bool:
    backend = os.environ.get("PYRLHF_BACKEND", "auto")
    if backend not in ("auto", "ref"):
        raise ValueError(f"PYRLHF_BACKEND must be 'auto' or 'ref', found {backend!r}")
    return backend == "ref"
