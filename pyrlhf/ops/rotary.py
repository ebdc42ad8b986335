"""Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34) in the half-split convention of Hugging Face's Llama."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_tensor, float_dtypes
from pyrlhf.ops._core import CORE_DTYPES, CUDA_DTYPES, address, core, cuda_core, queue, use_core, use_cuda_core
from pyrlhf.ops._library import define, eager_function


def rotary_ref(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` in plain torch; float64 too."""
    _check(q, k, positions, inv_freq, reference=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = positions.to(wide)[:, None, None] * inv_freq.to(wide)  # [T, 1, D_rot / 2]
    half = inv_freq.shape[0]

    def turned(x: Tensor) -> Tensor:
        first, second, rest = x.to(wide).split((half, half, x.shape[-1] - 2 * half), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)

    return turned(q), turned(k)


def rotary(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Turns channels (i, i + D_rot / 2) of every head by the angle ``positions[t] * inv_freq[i]``; differentiable in q and k.

    q: ``[T, Hq, D]``, k: ``[T, Hkv, D]`` float32 or bfloat16 (float16 on CUDA); positions: int64 ``[T]``;
    inv_freq: float32 ``[D_rot / 2]`` radians a token, D_rot <= D: channels from D_rot on are passed through.

    Returns the turned q and k, computed in float32. Raises ValueError or TypeError naming the argument.
    """
    _check(q, k, positions, inv_freq)
    op = _rotary if torch.compiler.is_compiling() else _eager
    turned: tuple[Tensor, Tensor] = op(q, k, positions, inv_freq, False)
    return turned


def turn(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` without its checks and without a gradient, for a decode loop that has made the positions itself."""
    return _impl(q, k, positions, inv_freq, False)


def _check(q: object, k: object, positions: object, inv_freq: object, *, reference: bool = False) -> None:
    op = "rotary"
    check_tensor(op, "q", q, shape=(None, None, None), dtype=float_dtypes(q, reference=reference))
    assert isinstance(q, Tensor)
    check_tensor(op, "k", k, shape=(q.shape[0], None, q.shape[2]), dtype=q.dtype, device=q.device)
    check_tensor(op, "positions", positions, shape=(q.shape[0],), dtype=torch.int64, device=q.device)
    check_tensor(op, "inv_freq", inv_freq, shape=(None,), dtype=torch.float32, device=q.device)
    assert isinstance(inv_freq, Tensor)
    if 2 * inv_freq.shape[0] > q.shape[2]:
        raise ValueError(
            f"{op}: inv_freq must hold at most D / 2 = {q.shape[2] // 2} frequencies, found {inv_freq.shape[0]}"
        )


def _impl(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if use_core(q, k):
        return _turn_in_core(q, k, positions, inv_freq, inverse)
    if use_cuda_core(q, k):
        return _turn_on_cuda(q, k, positions, inv_freq, inverse)
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = positions.to(wide)[:, None, None] * inv_freq.to(wide)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin.neg_()
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn_in_core(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    # views of one matrix are read where they lie
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    tokens, heads, size = q.shape
    core().rotary(
        address(q), heads, *q.stride()[:2], address(k), k.shape[1], *k.stride()[:2], address(positions),
        address(inv_freq), tokens, size, inv_freq.shape[0], inverse, CORE_DTYPES.index(q.dtype), *map(address, out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out[0], out[1]


def _turn_on_cuda(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens, heads, size = q.shape
    cuda_core().rotary(
        address(q), address(out[0]), heads, *q.stride()[:2], address(k), address(out[1]), k.shape[1], *k.stride()[:2],
        address(positions), address(inv_freq), tokens, size, inv_freq.shape[0], inverse, CUDA_DTYPES.index(q.dtype),
        *queue(q),
    )  # fmt: skip
    return out[0], out[1]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _fake(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, inv_freq, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _backward(run: Callable[..., tuple[Tensor, Tensor]], ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    # a rotation's transpose is the rotation back
    return *run(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _backward_by_op(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    return _backward(_rotary, ctx, grad_q, grad_k)


_rotary = define(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, bool inverse) -> (Tensor, Tensor)",
    _impl,
    _fake,
    backward=_backward_by_op,
    setup_context=_setup_context,
)
_eager = eager_function(_impl, _setup_context, partial(_backward, _impl))
