"""Checks at the boundary: a wrong call says what is wrong before any kernel sees a pointer.

Structure (shape, dtype, device, layout) is checked by the public functions and costs no data access, so it traces under
``torch.compile``. Values (`check_cu_seqlens`) are checked inside an op's implementation, where tensors are real.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    op: str,
    name: str,
    t: object,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    contiguous: bool = False,
) -> None:
    """Raises unless ``t`` is a tensor of this shape (None = any size), dtype (one of), device and layout.

    Raises TypeError for a wrong type, dtype or sparse layout, ValueError for a wrong shape, device or order in memory.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, found {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, found layout {t.layout}; convert it with .to_dense()")
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if t.dtype not in allowed:
            raise TypeError(
                f"{op}: {name} must be {_names(allowed)}, found {_names((t.dtype,))}; convert it with .to()"
            )
    if shape is not None and not _fits(t.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], found {list(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other arguments, found {t.device}")
    if contiguous and not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, found strides {t.stride()}; call .contiguous()")


def check_cu_seqlens(op: str, name: str, cu: object, total: int | None = None) -> None:
    """Raises unless ``cu`` is int32 ``[S + 1]``, starts at 0, never falls, and (``total`` given) ends at ``total``."""
    check_tensor(op, name, cu, shape=(None,), dtype=torch.int32)
    assert isinstance(cu, Tensor)
    if cu.numel() == 0:
        raise ValueError(f"{op}: {name} must hold S + 1 offsets, the first being 0, found an empty tensor")
    if not values_readable(cu):
        return
    first, last = int(cu[0]), int(cu[-1])
    if first != 0:
        raise ValueError(f"{op}: {name}[0] must be 0, found {first}")
    falls = cu[1:] < cu[:-1]
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"{op}: {name} must not decrease, found {int(cu[at])} then {int(cu[at + 1])} at index {at + 1}"
        )
    if total is not None and last != total:
        raise ValueError(f"{op}: {name} must end at the number of packed rows, {total}, found {last}")


def values_readable(t: Tensor) -> bool:
    """Whether looking at values is allowed: not while tracing, always on the CPU, elsewhere (it waits for the device) on request."""
    if torch.compiler.is_compiling():
        return False
    return t.device.type == "cpu" or os.environ.get("PYRLHF_CHECK") == "1"


def float_dtypes(t: object, *, reference: bool = False) -> tuple[torch.dtype, ...]:
    """The float dtypes that an op takes where ``t`` lives: float16 on CUDA only; a reference takes all of them and float64."""
    if reference:
        return (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    on_cuda = isinstance(t, Tensor) and t.is_cuda
    return (torch.float32, torch.bfloat16, torch.float16) if on_cuda else (torch.float32, torch.bfloat16)


def check_number(op: str, name: str, value: object, *, low: float, high: float, low_open: bool = False) -> None:
    """Raises unless ``value`` is a real number in [low, high] (``low_open``: above low)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, found {type(value).__name__}")
    if not low <= value <= high or (low_open and value == low):
        raise ValueError(f"{op}: {name} must be in {'(' if low_open else '['}{low}, {high}], found {value}")


def _fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if found == wanted:  # the usual case, one comparison of sizes
        return True
    if len(found) != len(wanted):
        return False
    for f, w in zip(found, wanted, strict=True):  # noqa: SIM110 - a third of the time of all(...)
        if w is not None and f != w:
            return False
    return True


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
