"""The linear layer of a decode step: few rows, a weight that was laid out once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrlhf.ops._checks import check_tensor, float_dtypes
from pyrlhf.ops._library import define

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
_ROWS = 32  # rows a GEMM: always this many, because BLAS picks its order of summation by shape


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[N, K]`` in the layout that `packed_linear` streams; made by `pack_weight`, a copy of its source."""

    panels: Tensor  # [K, N]
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype


def pack_weight(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs a linear layer's weight ``[N, K]`` (float32 or bfloat16; float16 on CUDA), rounded to ``dtype``, for `packed_linear`."""
    check_tensor("pack_weight", "weight", weight, shape=(None, None), dtype=float_dtypes(weight))
    if dtype not in float_dtypes(weight):
        raise TypeError(f"pack_weight: dtype must be one of {float_dtypes(weight)}, found {dtype}")
    panels = weight.detach().to(dtype).t().contiguous()
    if panels.data_ptr() == weight.data_ptr():  # a row or a column: nothing moved
        panels = panels.clone()
    return PackedWeight(panels, *weight.shape)


def packed_linear_ref(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`packed_linear` in plain torch."""
    _check(x, packed, bias, activation)
    y = x.to(packed.dtype).to(torch.float32) @ packed.panels.to(torch.float32)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return _activated(y, activation).to(x.dtype)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``activation(x @ weight.T + bias)`` over a packed weight, for the few rows of a decode step. Not differentiable.

    x: ``[M, K]`` float32 or bfloat16 (float16 on CUDA), rounded to the packed dtype for the product; bias: ``[N]``, x's dtype
    or float32; activation: None, "gelu" (exact), "gelu_new" (tanh), "silu" or "relu".

    Returns ``[M, N]`` in x's dtype; sums are float32. A row's bits do not depend on the other rows, nor on M.
    Raises ValueError or TypeError naming the argument.
    """
    _check(x, packed, bias, activation)
    bias = None if bias is None else bias.detach()
    y: Tensor = _packed_linear(x.detach(), packed.panels, bias, activation)
    return y


def _check(x: object, packed: object, bias: object, activation: object) -> None:
    op = "packed_linear"
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"{op}: packed must be a PackedWeight, found {type(packed).__name__}; make it with pack_weight")
    check_tensor(op, "x", x, shape=(None, packed.in_features), dtype=float_dtypes(x), device=packed.panels.device)
    assert isinstance(x, Tensor)
    if bias is not None:
        check_tensor(op, "bias", bias, shape=(packed.out_features,), dtype=(x.dtype, torch.float32), device=x.device)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None or one of {', '.join(ACTIVATIONS)}, found {activation!r}")


def _activated(y: Tensor, activation: str | None) -> Tensor:
    # From erf, tanh and exp on purpose: torch's own gelu and silu round some elements differently by their place in memory.
    if activation == "gelu":
        return 0.5 * y * (1.0 + torch.erf(y * math.sqrt(0.5)))
    if activation == "gelu_new":
        return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y * y * y)))
    if activation == "silu":
        return y / (1.0 + torch.exp(-y))
    return torch.relu(y) if activation == "relu" else y


def _impl(x: Tensor, panels: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    rows = x.shape[0]
    padded = pad(x.to(panels.dtype), (0, 0, 0, -rows % _ROWS))
    if x.dtype != panels.dtype:  # a bfloat16 GEMM would round its sums to bfloat16
        padded, panels = padded.to(torch.float32), panels.to(torch.float32)
    products = [torch.mm(block, panels) for block in padded.split(_ROWS)] or [panels.new_empty(0, panels.shape[1])]
    y = torch.cat(products)[:rows].to(torch.float32)
    if bias is not None:
        y = y + bias
    return _activated(y, activation).to(x.dtype).contiguous()


def _fake(x: Tensor, panels: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return x.new_empty(x.shape[0], panels.shape[1])


_packed_linear = define("packed_linear(Tensor x, Tensor panels, Tensor? bias, str? activation) -> Tensor", _impl, _fake)
