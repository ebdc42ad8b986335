"""RMSNorm (arXiv:1910.07467, equation 4), with the residual addition that comes before it in a transformer."""

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
def rms_norm_ref(x: Tensor, weight: Tensor, *, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm_ref(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm_ref(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch; float64 too."""
    _check(x, weight, eps, residual, reference=True)
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return out if residual is None else (out, summed)


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension; differentiable in x, weight, residual.

    x: ``[..., D]`` float32 or bfloat16 (float16 on CUDA); weight: ``[D]``, x's dtype or float32; eps >= 0.
    residual: x's shape and dtype; then the sum ``x + residual`` (rounded to x's dtype) is normalised, and returned too.

    Returns the normalised x, or ``(normalised, x + residual)``. Computed in float32. Raises ValueError or TypeError.
    """
    _check(x, weight, eps, residual)
    op = _rms_norm if torch.compiler.is_compiling() else _eager
    out, summed, _ = op(x, weight, residual, float(eps))
    return out if residual is None else (out, summed)


def _check(x: object, weight: object, eps: object, residual: object, *, reference: bool = False) -> None:
    op = "rms_norm"
    check_tensor(op, "x", x, dtype=float_dtypes(x, reference=reference))
    assert isinstance(x, Tensor)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., D], found a scalar")
    check_tensor(op, "weight", weight, shape=(x.shape[-1],), dtype=(x.dtype, torch.float32), device=x.device)
    check_number(op, "eps", eps, low=0.0, high=1.0)
    if residual is not None:
        check_tensor(op, "residual", residual, shape=x.shape, dtype=x.dtype, device=x.device)


def _forward_impl(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if (cpu := use_core(x, weight, residual)) or use_cuda_core(x, weight, residual):
        return _forward_core(x, weight, residual, eps, cpu)
    summed = x if residual is None else x + residual
    wide = summed.contiguous().to(torch.promote_types(x.dtype, torch.float32))
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    out = (wide * rstd).mul_(weight).to(x.dtype)
    # an op may not hand back its input: without a residual there is no sum to return
    return out, x.new_empty(0) if residual is None else summed.contiguous(), rstd


def _forward_core(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, cpu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # heads of queries, say, beside keys and values
    rows_together = cpu and x.dim() == 3 and x.stride()[1:] == (x.shape[2], 1)
    x, weight = x if rows_together else x.contiguous(), weight.contiguous()
    group, stride = (x.shape[1], x.stride(0)) if rows_together else (x.numel(), 0)
    residual = None if residual is None else residual.contiguous()
    # an op may not hand back its input: without a residual there is no sum to return
    out, summed = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    arguments = (
        address(x), address(residual), address(weight), address(out), 0 if residual is None else address(summed),
        address(rstd), CUDA_DTYPES.index(x.dtype), CUDA_DTYPES.index(weight.dtype), rstd.numel(), weight.numel(), eps,
    )  # fmt: skip
    if cpu:
        core().rms_norm(*arguments, group, stride, torch.get_num_threads())
    else:
        cuda_core().rms_norm(*arguments, *queue(x))
    return out, summed, rstd


def _backward_impl(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = grad_out, grad_sum, summed, weight
    if (cpu := use_core(*tensors)) or use_cuda_core(*tensors):
        return _backward_core(*tensors, rstd, cpu)
    normalised = summed.contiguous() * rstd
    grad = grad_out.contiguous().to(rstd.dtype)
    grad_weight = (grad * normalised).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    grad = grad * weight
    grad_x = (grad - normalised * (grad * normalised).mean(-1, keepdim=True)).mul_(rstd)
    if grad_sum is not None:
        grad_x.add_(grad_sum)
    return grad_x.to(summed.dtype), grad_weight


def _backward_core(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor, cpu: bool
) -> tuple[Tensor, Tensor]:
    grad_out, summed, weight = grad_out.contiguous(), summed.contiguous(), weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x, grad_weight = torch.empty_like(summed), torch.empty_like(weight)
    tensors = [address(t) for t in (grad_out, grad_sum, summed, weight, rstd, grad_x, grad_weight)]
    dtypes = CUDA_DTYPES.index(summed.dtype), CUDA_DTYPES.index(weight.dtype)
    rows, size = rstd.numel(), weight.numel()
    if cpu:
        core().rms_norm_backward(*tensors, *dtypes, rows, size, torch.get_num_threads())
    else:
        partials = rstd.new_empty((cuda_core().norm_groups(rows, size), size))
        cuda_core().rms_norm_backward(*tensors, address(partials), *dtypes, rows, size, *queue(summed))
    return grad_x, grad_weight


def _forward_fake(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), rstd


def _backward_fake(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, _ = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2])
    ctx.mark_non_differentiable(*output[1 + ctx.has_residual :])
    ctx.set_materialize_grads(False)


def _backward(
    run: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad_out: Tensor | None, grad_sum: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(summed)
    grad_x, grad_weight = run(grad_out, grad_sum if ctx.has_residual else None, summed, weight, rstd)
    return grad_x, grad_weight, grad_x if ctx.has_residual else None, None


_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor summed, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    backward=partial(_backward, _rms_norm_backward),
    setup_context=_setup_context,
)
_eager = eager_function(_forward_impl, _setup_context, partial(_backward, _backward_impl))
