"""The linear layer of a decode step: few rows, a weight that was laid out once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrlhf.ops._checks import check_tensor, float_dtypes
from pyrlhf.ops._core import CORE_DTYPES, address, core, use_core
from pyrlhf.ops._library import define
from pyrlhf.ops._memory import streamed
from pyrlhf.ops.activation import KINDS

_CODES: dict[str | None, int] = {None: -1, **{kind: i for i, kind in enumerate(KINDS)}}  # csrc/core/activation.h
_COLUMNS = 64  # outputs a panel; csrc/cpu/kernels.h: panel_columns
_ROWS = 32  # rows a GEMM of torch: always this many, because BLAS picks its order of summation by shape


@dataclass(eq=False)
class PackedWeight:
    """A weight ``[N, K]`` in the layout that `packed_linear` streams; made by `pack_weight`, a copy of its source.

    Attributes:
        panels: on the CPU float32 ``[N/64, K, 64]`` or bfloat16 ``[N/64, K/2, 64, 2]`` (two neighbours in k side by side),
            sizes rounded up and filled with zeros; elsewhere ``[K, N]``.
        finite: whether every value in them is; packing looks at all of them anyway.
        fingerprints: int64 ``[N/64]`` of the rows that each panel was made of, 0 for none as yet. Only the C++ core goes by them.
    """

    panels: Tensor
    out_features: int
    in_features: int
    finite: bool
    fingerprints: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    def update(self, weight: Tensor) -> None:
        """Takes over the values of ``weight``, of the shape and device it was made for, in the same memory: for every optimizer step.
        Panels of rows that have not changed (by a fingerprint of 62 bits) are left as they are, which takes half the time.

        Raises ValueError or TypeError naming the argument, and then nothing is written.
        """
        shape = (self.out_features, self.in_features)
        check_tensor("update", "weight", weight, shape=shape, dtype=float_dtypes(weight), device=self.panels.device)
        self.finite = _pack(weight.detach(), self.panels, self.fingerprints)


def pack_weight(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs a linear layer's weight ``[N, K]`` (float32 or bfloat16; float16 on CUDA), rounded to ``dtype``, for `packed_linear`."""
    check_tensor("pack_weight", "weight", weight, shape=(None, None), dtype=float_dtypes(weight))
    if dtype not in float_dtypes(weight):
        raise TypeError(f"pack_weight: dtype must be one of {float_dtypes(weight)}, found {dtype}")
    weight = weight.detach()
    panels = streamed(_panels_shape(weight, dtype), dtype, weight.device)
    out_features, in_features = weight.shape
    fingerprints = torch.zeros(-(-out_features // _COLUMNS), dtype=torch.int64)
    return PackedWeight(panels, out_features, in_features, _pack(weight, panels, fingerprints), fingerprints)


def packed_linear_ref(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`packed_linear` in plain torch."""
    _check(x, packed, bias, activation, dtype)
    weight = _unpacked(packed.panels, packed.in_features, packed.out_features)
    y = x.to(packed.dtype).to(torch.float32) @ weight.to(torch.float32)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return _activated(y, activation, dtype or x.dtype)


def packed_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias)`` over a packed weight, for the few rows of a decode step. Not differentiable.

    x: ``[M, K]`` float32 or bfloat16 (float16 on CUDA), rounded to the packed dtype for the product; bias: ``[N]``, x's dtype
    or float32; activation: None or a kind of `activation`, which is given the rounded sums, as if it followed; dtype of the result:
    float32 or x's (default).

    Returns ``[M, N]``; sums are float32. A row's bits do not depend on the other rows, nor on M.
    Raises ValueError or TypeError naming the argument.
    """
    _check(x, packed, bias, activation, dtype)
    bias = None if bias is None else bias.detach()
    op = _op if torch.compiler.is_compiling() else _packed_linear  # eager decoding skips the dispatcher
    y: Tensor = op(x.detach(), packed.panels, bias, activation, packed.out_features, dtype)
    return y


def _check(x: object, packed: object, bias: object, activation: object, dtype: object) -> None:
    op = "packed_linear"
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"{op}: packed must be a PackedWeight, found {type(packed).__name__}; make it with pack_weight")
    check_tensor(op, "x", x, shape=(None, packed.in_features), dtype=float_dtypes(x), device=packed.panels.device)
    assert isinstance(x, Tensor)
    if bias is not None:
        check_tensor(op, "bias", bias, shape=(packed.out_features,), dtype=(x.dtype, torch.float32), device=x.device)
    if activation is not None and activation not in KINDS:
        raise ValueError(f"{op}: activation must be None or one of {', '.join(KINDS)}, found {activation!r}")
    if dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"{op}: dtype must be None, x's ({x.dtype}) or torch.float32, found {dtype!r}")


def _panels_shape(weight: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    n, k = weight.shape
    if weight.device.type != "cpu":
        return (k, n)
    panels = -(-n // _COLUMNS)
    return (panels, k, _COLUMNS) if dtype == torch.float32 else (panels, -(-k // 2), _COLUMNS, 2)


def _pack(weight: Tensor, panels: Tensor, fingerprints: Tensor) -> bool:
    """Fills the panels; whether all they hold is finite."""
    n, k = weight.shape
    if use_core(weight, panels):
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        finite: bool = core().pack_weight(
            address(weight), CORE_DTYPES.index(weight.dtype), weight.stride(0), n, k,
            address(panels), CORE_DTYPES.index(panels.dtype), address(fingerprints), torch.get_num_threads(),
        )  # fmt: skip
        return finite
    fingerprints.zero_()
    if panels.dim() == 2:
        panels.copy_(weight.t())
    else:
        pair = panels.dim() - 2
        filled = pad(weight, (0, -k % pair, 0, -n % _COLUMNS))
        panels.copy_(filled.view(-1, _COLUMNS, *panels.shape[1:2], pair).transpose(1, 2).reshape(panels.shape))
    return bool(panels.isfinite().all())


def _unpacked(panels: Tensor, in_features: int, out_features: int) -> Tensor:
    """``[K, N]``"""
    if panels.dim() == 2:
        return panels
    units = panels.view(*panels.shape[:3], -1)  # [N/64, K or K/2, 64, 1 or 2]
    return units.permute(1, 3, 0, 2).reshape(-1, units.shape[0] * _COLUMNS)[:in_features, :out_features]


def _activated(y: Tensor, activation: str | None, dtype: torch.dtype) -> Tensor:
    """Rounded to dtype, activated, rounded again."""
    return _value(y.to(dtype).to(torch.float32), activation).to(dtype)


def _value(y: Tensor, activation: str | None) -> Tensor:
    # From erf, tanh and exp on purpose: torch's own gelu and silu round some elements differently by their place in memory.
    if activation == "gelu":
        return 0.5 * y * (1.0 + torch.erf(y * math.sqrt(0.5)))
    if activation == "gelu_new":
        return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y * y * y)))
    if activation in ("silu", "quick_gelu"):
        return y / (1.0 + torch.exp(y * (-1.0 if activation == "silu" else -1.702)))
    return torch.relu(y) if activation == "relu" else y


def _packed_linear(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_features: int,
    dtype: torch.dtype | None,
) -> Tensor:
    if not use_core(x, panels, bias):
        return _blocks_of_rows(x, _unpacked(panels, x.shape[1], out_features), bias, activation, dtype or x.dtype)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], out_features, dtype=dtype)
    core().packed_linear(
        address(x), CORE_DTYPES.index(x.dtype), address(panels), CORE_DTYPES.index(panels.dtype),
        address(bias), 0 if bias is None else CORE_DTYPES.index(bias.dtype), _CODES[activation],
        *x.shape, out_features, address(y), CORE_DTYPES.index(y.dtype), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _blocks_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype
) -> Tensor:
    """By torch, for a weight ``[K, N]``."""
    rows = x.shape[0]
    padded = pad(x.to(weight.dtype), (0, 0, 0, -rows % _ROWS))
    if dtype != weight.dtype:  # a bfloat16 GEMM would round its sums to bfloat16
        padded, weight = padded.to(torch.float32), weight.to(torch.float32)
    products = [torch.mm(block, weight) for block in padded.split(_ROWS)] or [weight.new_empty(0, weight.shape[1])]
    y = torch.cat(products)[:rows].to(torch.float32)
    if bias is not None:
        y = y + bias
    return _activated(y, activation, dtype).contiguous()


def _fake(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_features: int,
    dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=dtype)


_op = define(
    "packed_linear(Tensor x, Tensor panels, Tensor? bias, str? activation, int out_features, ScalarType? dtype) -> Tensor",
    _packed_linear,
    _fake,
)
