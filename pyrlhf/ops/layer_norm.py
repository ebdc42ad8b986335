"""LayerNorm (arXiv:1607.06450), with the residual addition that comes before it in a transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_number, check_tensor, float_dtypes
from pyrlhf.ops._core import CUDA_DTYPES, address, core, cuda_core, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define, eager_function


@overload
def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: None = None) -> Tensor: ...
@overload
def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` in plain torch; float64 too."""
    _check(x, weight, bias, eps, residual, reference=True)
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    out = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)
    return out if residual is None else (out, summed)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: None = None) -> Tensor: ...
@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension; differentiable.

    x: ``[..., D]`` float32 or bfloat16 (float16 on CUDA); weight, bias: ``[D]``, both x's dtype or both float32; eps >= 0.
    residual: x's shape and dtype; then the sum ``x + residual`` (rounded to x's dtype) is normalised, and returned too.

    Returns the normalised x, or ``(normalised, x + residual)``. Computed in float32. Raises ValueError or TypeError.
    """
    _check(x, weight, bias, eps, residual)
    op = _layer_norm if torch.compiler.is_compiling() else _eager
    out, summed, _, _ = op(x, weight, bias, residual, float(eps))
    return out if residual is None else (out, summed)


def _check(x: object, weight: object, bias: object, eps: object, residual: object, *, reference: bool = False) -> None:
    op = "layer_norm"
    check_tensor(op, "x", x, dtype=float_dtypes(x, reference=reference))
    assert isinstance(x, Tensor)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have shape [..., D] with D >= 1, found {list(x.shape)}")
    check_tensor(op, "weight", weight, shape=(x.shape[-1],), dtype=(x.dtype, torch.float32), device=x.device)
    assert isinstance(weight, Tensor)
    check_tensor(op, "bias", bias, shape=(x.shape[-1],), dtype=weight.dtype, device=x.device)
    check_number(op, "eps", eps, low=0.0, high=1.0)
    if residual is not None:
        check_tensor(op, "residual", residual, shape=x.shape, dtype=x.dtype, device=x.device)


def _forward_impl(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if (cpu := use_core(x, weight, residual)) or use_cuda_core(x, weight, residual):
        return _forward_core(x, weight, bias, residual, eps, cpu)
    summed = (x if residual is None else x + residual).contiguous()
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    out, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    # an op may not hand back its input: without a residual there is no sum to return
    return out.to(x.dtype), x.new_empty(0) if residual is None else summed, mean, rstd


def _forward_core(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, cpu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    # an op may not hand back its input: without a residual there is no sum to return
    out, summed = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    arguments = (
        address(x), address(residual), address(weight), address(bias), address(out),
        0 if residual is None else address(summed), address(mean), address(rstd), CUDA_DTYPES.index(x.dtype),
        CUDA_DTYPES.index(weight.dtype), rstd.numel(), weight.numel(), eps,
    )  # fmt: skip
    if cpu:
        core().layer_norm(*arguments, torch.get_num_threads())
    else:
        cuda_core().layer_norm(*arguments, *queue(x))
    return out, summed, mean, rstd


def _backward_impl(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = grad_out, grad_sum, summed, weight
    if (cpu := use_core(*tensors)) or use_cuda_core(*tensors):
        return _backward_core(*tensors, mean, rstd, cpu)
    wide = rstd.dtype
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_out.contiguous().to(wide),
        summed.contiguous().to(wide),
        weight.shape,
        mean,
        rstd,
        weight.to(wide),
        weight.to(wide),  # only its shape is used: the bias
        [True, True, True],
    )
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    return grad_x.to(summed.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _backward_core(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, cpu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, summed, weight = grad_out.contiguous(), summed.contiguous(), weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x, grad_weight, grad_bias = torch.empty_like(summed), torch.empty_like(weight), torch.empty_like(weight)
    given, made = (grad_out, grad_sum, summed, weight, mean, rstd), (grad_x, grad_weight, grad_bias)
    tensors = [address(t) for t in (*given, *made)]
    dtypes = CUDA_DTYPES.index(summed.dtype), CUDA_DTYPES.index(weight.dtype)
    rows, size = rstd.numel(), weight.numel()
    if cpu:
        core().layer_norm_backward(*tensors, *dtypes, rows, size, torch.get_num_threads())
    else:
        partials = rstd.new_empty((cuda_core().norm_groups(rows, size), 2, size))
        cuda_core().layer_norm_backward(*tensors, address(partials), *dtypes, rows, size, *queue(summed))
    return grad_x, grad_weight, grad_bias


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


def _backward_fake(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, _ = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2], output[3])
    ctx.mark_non_differentiable(*output[1 + ctx.has_residual :])
    ctx.set_materialize_grads(False)


def _backward(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ctx: Any,
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    *_: None,
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    grads = run(grad_out, grad_sum if ctx.has_residual else None, *saved)
    return *grads, grads[0] if ctx.has_residual else None, None


_layer_norm_backward = define(
    "layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor summed, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
_layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    backward=partial(_backward, _layer_norm_backward),
    setup_context=_setup_context,
)
_eager = eager_function(_forward_impl, _setup_context, partial(_backward, _backward_impl))
