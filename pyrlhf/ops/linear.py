"""A linear layer at the CPU's full speed: torch's own float32 one runs on MKL, which leaves a third of it on some processors.

Large layers go to oneDNN, which torch carries and uses for bfloat16 only: forward, gradient of x and gradient of the weight
are all the same product ``a @ b.T``. oneDNN takes b either way, but loses a third of its speed on an a that does not run along
the summed dimension. So for the weight's gradient the output's is turned over first (csrc/cpu/transpose.cpp), and the bias
gradient falls out of that pass.

Products are plain float32 multiply-adds, no operand is rounded. oneDNN adds 512 or 1024 products in a row before it starts
the next partial sum, MKL 192, a plain dot product all of them: its error lies between those two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrlhf.ops._checks import check_tensor, float_dtypes
from pyrlhf.ops._core import CORE_DTYPES, address, core, use_core
from pyrlhf.ops._library import define, eager_function
from pyrlhf.ops.packed_linear import PackedWeight, packed_linear

LARGE = 1 << 16  # elements of a weight from which the 15 us that a call of oneDNN costs are earned back


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in plain torch."""
    _check(x, weight, bias)
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: PackedWeight | None = None) -> Tensor:
    """``x @ weight.T + bias`` over the last dimension; differentiable, once, in x, weight and bias.

    x: ``[..., K]``, any float dtype; weight: ``[N, K]`` and bias: ``[N]`` of the same dtype. Returns ``[..., N]``.
    It is ``F.linear`` for small weights, on CUDA, for other dtypes than float32 and bfloat16 and under autocast. A weight
    meets one library whatever the number of rows. With ``packed``, made of weight by `pack_weight`, the values are
    `packed_linear`'s, bit for bit, and the gradients as without. Raises ValueError or TypeError naming the argument.
    """
    if packed is not None:
        return _by_panels(x, weight, bias, packed)
    if isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)  # it casts, also what does not fit together
    _check(x, weight, bias)
    if weight.numel() < LARGE or x.numel() == 0 or not use_core(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor = _choose(rows, weight, bias)(rows, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _by_panels(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
    _check(x, weight, bias)
    if (packed.out_features, packed.in_features) != tuple(weight.shape):
        found = [packed.out_features, packed.in_features]
        raise ValueError(f"linear: packed must be made of a weight {list(weight.shape)}, found one of {found}")
    rows = x.reshape(-1, x.shape[-1])
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    y: Tensor = _Panels.apply(rows, weight, bias, packed) if wanted else packed_linear(rows, packed, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


class _Panels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return packed_linear(x, packed, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if not use_core(grad, x, weight):
            found = (grad @ weight, None if x is None else grad.t() @ x, grad.sum(0))
        else:
            found = _gradients(grad, x, weight, wanted)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), None


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    if torch.compiler.is_compiling():
        return _op
    if not _onednn_serves(x.dtype):
        return F.linear
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return _eager if wanted and torch.is_grad_enabled() else _linear


def _check(x: object, weight: object, bias: object) -> None:
    check_tensor("linear", "x", x, dtype=float_dtypes(x, reference=True))
    assert isinstance(x, Tensor)
    if x.dim() == 0:
        raise ValueError("linear: x must have shape [..., K], found a scalar")
    check_tensor("linear", "weight", weight, shape=(None, x.shape[-1]), dtype=x.dtype, device=x.device)
    assert isinstance(weight, Tensor)
    if bias is not None:
        check_tensor("linear", "bias", bias, shape=(weight.shape[0],), dtype=x.dtype, device=x.device)


# -- implementation ---------------------------------------------------------------------------------------------------------


def _onednn_serves(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, it is switched on, and it knows this dtype on this CPU."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return _has_product() and (dtype is torch.float32 or _has_bfloat16())


@cache
def _has_product() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias``, a ``[M, K]``, b ``[N, K]``, by the op that torch.compile's CPU code calls for linear layers."""
    if not _onednn_serves(a.dtype):
        return F.linear(a, b, bias)
    if a.shape[0] == 1:  # goes as two: a lone row would be summed in another order
        return _product(a.expand(2, -1), b, bias)[:1]
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")
    return y


def _turned(t: Tensor, sums: Tensor | None = None) -> Tensor:
    """``t`` ``[R, C]`` laid out as ``[C, R]``; ``sums``, float32 ``[C]``, receives the sums of its columns."""
    if t.stride(1) != 1:
        t = t.contiguous()
    out = t.new_empty(t.shape[1], t.shape[0])
    core().transpose(
        t.data_ptr(),
        CORE_DTYPES.index(t.dtype),
        *t.shape,
        t.stride(0),
        out.data_ptr(),
        address(sums),
        torch.get_num_threads(),
    )
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias)


def _gradients(grad: Tensor, x: Tensor | None, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight (for which x is needed) and bias; an empty tensor for each that is not wanted."""
    grad_x, grad_weight, grad_bias = (grad.new_empty(0) for _ in range(3))
    if wanted[0]:
        grad_x = _product(grad, weight.t())
    if wanted[1] or wanted[2]:
        sums = grad.new_empty(weight.shape[0], dtype=torch.float32) if wanted[2] else None
        columns = _turned(grad, sums)
        grad_weight = grad_weight if x is None else _product(columns, x.t())
        grad_bias = grad_bias if sums is None else sums.to(grad.dtype)
    return grad_x, grad_weight, grad_bias


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _gradients_fake(
    grad: Tensor, x: Tensor | None, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad.new_empty(grad.shape[0], weight.shape[1]) if wanted[0] else grad.new_empty(0)
    grad_weight = grad.new_empty(weight.shape if wanted[1] else 0)
    return grad_x, grad_weight, grad.new_empty(weight.shape[0] if wanted[2] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward_by(gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        return tuple(g if want else None for g, want in zip(gradients(grad, *ctx.saved_tensors, wanted), wanted))

    return backward


_op_gradients = define(
    "linear_backward(Tensor grad, Tensor? x, Tensor weight, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
    key="CPU",
)
_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    _fake,
    backward=_backward_by(_op_gradients),
    setup_context=_setup_context,
    key="CPU",
)
_eager = eager_function(_linear, _setup_context, _backward_by(_gradients))
