"""The MLP's element-wise functions: GELU (arXiv:1606.08415) in its three forms, ReLU, SiLU, and their gated units (arXiv:2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrlhf.ops._checks import check_tensor, float_dtypes
from pyrlhf.ops._core import CUDA_DTYPES, address, core, cuda_core, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define, eager_function

KINDS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu")  # in the order of csrc/core/activation.h


def activation_ref(x: Tensor, kind: str, *, gated: bool = False) -> Tensor:
    """`activation` in plain torch; float64 too."""
    _check(x, kind, gated, reference=True)
    return _in_torch(x, kind, gated)


def activation(x: Tensor, kind: str, *, gated: bool = False) -> Tensor:
    """``act(x)``, or with ``gated`` ``act(gate) * up`` for the halves gate, up of the last dimension; differentiable.

    kind: "gelu" = x Phi(x) with the normal distribution function Phi; "gelu_new" = GELU in the tanh form of GPT-2;
    "quick_gelu" = x sigmoid(1.702 x); "relu"; "silu" = x sigmoid(x), which gated is SwiGLU.
    x: ``[..., I]``, gated ``[..., 2 I]``, float32 or bfloat16 (float16 on CUDA).

    Returns ``[..., I]`` in x's dtype, computed in float32. Raises ValueError or TypeError naming the argument.
    """
    _check(x, kind, gated)
    op = _activation if torch.compiler.is_compiling() else _eager
    out: Tensor = op(x, kind, gated)
    return out


def _check(x: object, kind: object, gated: object, *, reference: bool = False) -> None:
    op = "activation"
    check_tensor(op, "x", x, dtype=float_dtypes(x, reference=reference))
    assert isinstance(x, Tensor)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, found {kind!r}")
    if not isinstance(gated, bool):
        raise TypeError(f"{op}: gated must be True or False, found {type(gated).__name__}")
    if gated and (x.dim() == 0 or x.shape[-1] % 2):
        raise ValueError(f"{op}: x must have shape [..., 2 I] where gated, found {list(x.shape)}")


def _in_torch(x: Tensor, kind: str, gated: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not gated:
        return _value(wide, kind).to(x.dtype)
    gate, up = wide.chunk(2, dim=-1)
    return (_value(gate, kind) * up).to(x.dtype)


def _value(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_new":
        return F.gelu(x, approximate="tanh")
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.relu(x) if kind == "relu" else F.silu(x)


def _slope(x: Tensor, kind: str) -> Tensor:
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    if kind == "gelu_new":
        scale = math.sqrt(2 / math.pi)
        tanh = torch.tanh(scale * (x + 0.044715 * x**3))
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * x * x)
    if kind == "relu":
        return (x > 0).to(x.dtype)
    factor = 1.702 if kind == "quick_gelu" else 1.0
    sigmoid = torch.sigmoid(factor * x)
    return sigmoid + factor * x * sigmoid * (1 - sigmoid)


def _forward_impl(x: Tensor, kind: str, gated: bool) -> Tensor:
    if (cpu := use_core(x)) or use_cuda_core(x):
        out = x.new_empty(_out_shape(x, gated))
        _run_core(None, x, out, kind, gated, cpu)
        return out
    return _in_torch(x, kind, gated).contiguous()


def _backward_impl(grad_out: Tensor, x: Tensor, kind: str, gated: bool) -> Tensor:
    if (cpu := use_core(grad_out, x)) or use_cuda_core(grad_out, x):
        grad_x = x.new_empty(x.shape)
        _run_core(grad_out, x, grad_x, kind, gated, cpu)
        return grad_x
    wide = torch.promote_types(x.dtype, torch.float32)
    grad = grad_out.to(wide)
    if not gated:
        return (grad * _slope(x.to(wide), kind)).to(x.dtype).contiguous()
    gate, up = x.to(wide).chunk(2, dim=-1)
    return torch.cat((grad * up * _slope(gate, kind), grad * _value(gate, kind)), dim=-1).to(x.dtype)


def _run_core(grad_out: Tensor | None, x: Tensor, out: Tensor, kind: str, gated: bool, cpu: bool) -> None:
    """Fills out with the value, or with the gradient of x if there is a grad_out."""
    x, grad_out = x.contiguous(), None if grad_out is None else grad_out.contiguous()
    size = x.shape[-1] // 2 if gated else x.numel()
    rows = x.numel() // max(1, 2 * size) if gated else 1
    tensors = address(grad_out), address(x), address(out)
    options = CUDA_DTYPES.index(x.dtype), KINDS.index(kind), gated, rows, size
    if cpu:
        core().activation(*tensors, *options, torch.get_num_threads())
    else:
        cuda_core().activation(*tensors, *options, *queue(x))


def _out_shape(x: Tensor, gated: bool) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2) if gated else tuple(x.shape)


def _forward_fake(x: Tensor, kind: str, gated: bool) -> Tensor:
    return x.new_empty(_out_shape(x, gated))


def _backward_fake(grad_out: Tensor, x: Tensor, kind: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(x)


def _backward(run: Callable[..., Tensor], ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return run(grad_out, x, ctx.kind, ctx.gated), None, None


_activation_backward = define(
    "activation_backward(Tensor grad_out, Tensor x, str kind, bool gated) -> Tensor", _backward_impl, _backward_fake
)
_activation = define(
    "activation(Tensor x, str kind, bool gated) -> Tensor",
    _forward_impl,
    _forward_fake,
    backward=partial(_backward, _activation_backward),
    setup_context=_setup_context,
)
_eager = eager_function(_forward_impl, _setup_context, partial(_backward, _backward_impl))
