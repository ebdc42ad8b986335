"""The way from Python to the C++ core: one module, two questions (may this call use it on the CPU, on CUDA?)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CORE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (*CORE_DTYPES, torch.float16)

# What the CUDA kernels can find wrong, in the order of csrc/core/faults.h.
FAULTS = (
    "gae: cu_seqlens must rise from 0 to the number of tokens",
    "ranking_loss: cu_groups must rise from 0 to the number of answers",
    "write_kv: slots must be in 0..pages * page_size - 1",
    "decode_attention: seq_lens must be in 0..max_pages * page_size",
    "decode_attention: page_table must hold pages of the cache wherever seq_lens reaches",
    "sample: logits must be finite or -inf with one finite entry a row",
    "linear_logprob: targets must be token ids in 0..V-1",
    "sampled_logprob: tokens must be in 0..vocab - 1",
    "attention: cu_seqlens must rise from 0 to the number of tokens",
    "attention: prefix must be ranges within the tokens, outside its own sequence",
)


class CoreCall(NamedTuple):
    """A call of the core, for ``_C.tape`` to make again."""

    name: str
    arguments: tuple[Any, ...]


_tape: list[Any] | None = None


def core() -> Any:
    """The C++ core: `module`, or while a `recording` is made the same with every call written down."""
    return module() if _tape is None else _Recorded(module(), _tape)


@contextlib.contextmanager
def recording(tape: list[Any]) -> Iterator[None]:
    """Append each call of the core to ``tape``, a `CoreCall`. Making it again does the same to the same memory."""
    global _tape
    outer, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = outer


class _Recorded:
    def __init__(self, core: Any, tape: list[Any]) -> None:
        self._core, self._tape = core, tape

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)

        def call(*arguments: Any) -> Any:
            self._tape.append(CoreCall(name, arguments))
            return function(*arguments)

        return call


def run_tapes(tapes: Sequence[Any], times: int = 1) -> int:
    """Make the calls that these ``_C.tape`` keep, in order, and all that again, up to so many times or until a call halts it.

    Returns how often they were made. Raises MemoryError, or ValueError for logits that `sample` cannot draw from.
    """
    rounds: int
    rounds, failed = module().run_tapes(tapes, times)
    if failed == -1:
        return rounds
    if failed == -2:
        raise MemoryError("a kernel's scratch memory could not be allocated; free some memory")
    raise ValueError(
        f"sample: logits must be finite or -inf with one finite entry a row, row {failed} holds something else"
    )


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
    """Whether these tensors go to the CUDA kernels: all on CUDA, every float one float32, bfloat16 or float16, and not switched off.

    Raises RuntimeError where they would, but this installation was built without the CUDA half.
    """
    return _for_cuda_kernels(tensors) and cuda_core() is not None


@functools.cache
def cuda_core() -> Any:
    """The CUDA half, ``pyrlhf._C.cuda``. Raises RuntimeError if this installation has none."""
    built = module()
    if not built.cuda_built:
        raise RuntimeError(
            "a tensor is on CUDA, but pyrlhf was built without its CUDA half: install the CUDA toolkit (nvcc 12.4 or newer) "
            "and reinstall with PYRLHF_CUDA=on, move the tensors to the CPU, or set PYRLHF_BACKEND=ref to run on plain PyTorch"
        )
    return built.cuda


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the Triton kernels (pyrlhf.kernels): as `use_cuda_core`; RuntimeError where triton is not installed."""
    return _for_cuda_kernels(tensors) and _has_triton()


def _for_cuda_kernels(tensors: tuple[Tensor | None, ...]) -> bool:
    if _reference_wanted():
        return False
    for t in tensors:
        if t is not None and not (t.is_cuda and (t.dtype in CUDA_DTYPES or not t.is_floating_point())):
            return False
    return True


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "a tensor is on CUDA, but triton is not installed: `pip install triton` (PyTorch's CUDA builds for Linux bring it), "
            "move the tensors to the CPU, or set PYRLHF_BACKEND=ref to run on plain PyTorch"
        )
    return True


def queue(t: Tensor) -> tuple[int, int]:
    """Where a CUDA kernel for ``t`` runs: its device's index, and the handle of the current stream there."""
    index = t.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def faults(t: Tensor) -> int:
    """The address of the fault flags of the device that ``t`` is on."""
    return fault_flags(t.device).data_ptr()


@functools.cache
def fault_flags(device: torch.device) -> Tensor:
    """int32 ``[len(FAULTS)]`` on ``device``, raised by the kernels that skipped something. Made at the first kernel's launch."""
    return torch.zeros(len(FAULTS), dtype=torch.int32, device=device)


def raise_faults(device: torch.device) -> None:
    """Waits for the current stream of ``device`` and raises ValueError if a kernel has met values that it had to skip; lowers the flags.

    For places that wait anyway; ``device`` has its index, as a tensor's has. ``PYRLHF_CHECK=1`` finds the same before the kernel
    runs, and says where.
    """
    flags = fault_flags(device)
    found = [what for what, raised in zip(FAULTS, flags.tolist(), strict=True) if raised]
    if found:
        if flags.is_cuda:
            torch.cuda.synchronize(device)  # what has been launched meanwhile may raise them too
        flags.zero_()
        raise ValueError(
            f"on {device} a kernel found wrong values and skipped them; PYRLHF_CHECK=1 says where. {'; '.join(found)}"
        )


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
