"""Attention over packed ragged sequences, forward and backward.

The forward keeps q, k, v, the output and one log-sum-exp a row and head; the backward makes the probabilities again from
them (FlashAttention, arXiv:2205.14135, algorithms 1 and 4). A sequence's result depends on nothing but that sequence (and
its prefix). On the CPU csrc/cpu/attention.cpp does it block by block, on CUDA Triton kernels do (kernels/attention.py); for
float64 and PYRLHF_BACKEND=ref torch, one sequence's scores at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_cu_seqlens, check_number, check_tensor, float_dtypes, values_readable
from pyrlhf.ops._core import CORE_DTYPES, FAULTS, address, core, fault_flags, use_core, use_triton
from pyrlhf.ops._library import define, eager_function

MAX_HEAD_DIM = 256
_EVERYTHING = 2**62  # a window that hides nothing
_FAULT = next(i for i, what in enumerate(FAULTS) if what.startswith("attention: cu_seqlens"))  # prefix is the next


class _Span(NamedTuple):
    """One sequence: its rows [start, end) and the rows [prefix_start, prefix_end) that it sees besides."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def prefix_length(self) -> int:
        return self.prefix_end - self.prefix_start


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` in plain torch: softmax(scale * q @ k.T) @ v of each sequence. float64 too."""
    _check(q, k, v, cu_seqlens, causal, window, prefix, scale, reference=True)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    rows = []
    for span in _spans(cu_seqlens, prefix, q.shape[0]):
        queries = q[span.start : span.end].to(wide).transpose(0, 1)  # [Hq, L, D]
        keys, values = (
            torch.cat([x[span.prefix_start : span.prefix_end], x[span.start : span.end]])
            .to(wide)
            .repeat_interleave(group, dim=1)
            .transpose(0, 1)  # [Hq, P + L, D]
            for x in (k, v)
        )
        hidden = _hidden_keys(span, causal, window, q.device)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        probabilities = scores.softmax(-1).masked_fill(hidden, 0.0)  # a row that sees nothing: softmax gives NaN there
        rows.append((probabilities @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(rows) if rows else q * 0.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed sequences; differentiable in q, k, v.

    q: ``[T, Hq, D]`` float32 or bfloat16 (float16 on CUDA), D <= 256; k, v: ``[T, Hkv, D]``, Hq a multiple of Hkv (grouped
    queries: query head h reads key head h // (Hq / Hkv)). cu_seqlens: int32 ``[S + 1]``.
    causal: a token sees its own sequence up to itself; False: all of its sequence.
    window: with ``causal``, only the last ``window`` of those, itself included.
    prefix: int32 ``[S, 2]``; every token of sequence s also sees the packed rows ``[prefix[s, 0], prefix[s, 1])``, which
    must not be its own. Not with ``window``.
    scale: multiplies the scores; default ``D ** -0.5``.

    Returns ``[T, Hq, D]`` in q's dtype, accumulated in float32. A token with nothing to see gives 0, and no gradient.
    Never holds more scores than a block of them, in plain torch those of one sequence. Deterministic; a sequence's bits do
    not depend on its neighbours. Raises ValueError or TypeError naming the argument. On CUDA wrong values are found on the
    device: with wrong cu_seqlens everything is NaN, a wrong prefix counts as empty, and either is a fault that the next wait
    raises; with PYRLHF_CHECK=1, and on the CPU, ValueError at once.
    """
    _check(q, k, v, cu_seqlens, causal, window, prefix, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    op = _attention if torch.compiler.is_compiling() else _eager
    out: Tensor = op(q, k, v, cu_seqlens, prefix, causal, window, scale)[0]
    return out


def _check(
    q: object,
    k: object,
    v: object,
    cu_seqlens: object,
    causal: object,
    window: object,
    prefix: object,
    scale: object,
    *,
    reference: bool = False,
) -> None:
    op = "attention"
    check_tensor(op, "q", q, shape=(None, None, None), dtype=float_dtypes(q, reference=reference))
    assert isinstance(q, Tensor)
    tokens, heads, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        check_tensor(op, name, x, shape=(tokens, None, dim), dtype=q.dtype, device=q.device)
    assert isinstance(k, Tensor)
    check_tensor(op, "v", v, shape=k.shape)
    if k.shape[1] == 0 or heads == 0 or heads % k.shape[1]:
        raise ValueError(f"{op}: q's heads must be a multiple of k's, found {heads} and {k.shape[1]}")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q's head size must be in 1..{MAX_HEAD_DIM}, found {dim}")
    check_tensor(op, "cu_seqlens", cu_seqlens, shape=(None,), dtype=torch.int32, device=q.device)
    assert isinstance(cu_seqlens, Tensor)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"{op}: window must be an int or None, found {type(window).__name__}")
        if window < 0:
            raise ValueError(f"{op}: window must be 0 or more tokens, found {window}")
        if not causal:
            raise ValueError(f"{op}: window needs causal=True, found causal=False; pass window=None")
        if prefix is not None:
            raise ValueError(f"{op}: prefix cannot be combined with window, found window={window}; pass one of them")
    if prefix is not None:
        check_tensor(op, "prefix", prefix, shape=(cu_seqlens.shape[0] - 1, 2), dtype=torch.int32, device=q.device)
    if scale is not None:
        check_number(op, "scale", scale, low=-1e30, high=1e30)


def _check_ranges(cu_seqlens: Tensor, prefix: Tensor | None, tokens: int) -> None:
    """Raises ValueError for offsets or prefixes that make no sense."""
    check_cu_seqlens("attention", "cu_seqlens", cu_seqlens, tokens)
    if prefix is None or not values_readable(prefix):
        return
    (first, last), (start, end) = prefix.unbind(1), (cu_seqlens[:-1], cu_seqlens[1:])
    wrong = (first < 0) | (first > last) | (last > tokens) | (torch.maximum(first, start) < torch.minimum(last, end))
    if bool(wrong.any()):
        s = int(wrong.nonzero()[0])
        _check_prefix(s, _Span(int(start[s]), int(end[s]), int(first[s]), int(last[s])), tokens)


def _spans(cu_seqlens: Tensor, prefix: Tensor | None, tokens: int) -> list[_Span]:
    """The sequences that have tokens. Raises ValueError for offsets or prefixes that make no sense."""
    _check_ranges(cu_seqlens, prefix, tokens)
    cu = cu_seqlens.tolist()
    ranges = [[0, 0]] * (len(cu) - 1) if prefix is None else prefix.tolist()
    spans = [_Span(cu[s], cu[s + 1], *ranges[s]) for s in range(len(cu) - 1)]
    return [span for span in spans if span.end > span.start]


def _check_prefix(s: int, span: _Span, tokens: int) -> None:
    start, end = span.prefix_start, span.prefix_end
    if not 0 <= start <= end <= tokens:
        raise ValueError(
            f"attention: prefix[{s}] must be a range [start, end) with 0 <= start <= end <= {tokens}, found [{start}, {end})"
        )
    if max(start, span.start) < min(end, span.end):
        raise ValueError(
            f"attention: prefix[{s}] must not overlap its own sequence, rows [{span.start}, {span.end}), found [{start}, {end})"
        )


def _hidden_keys(span: _Span, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool ``[L, P + L]``: True where a query must not see a key; the prefix comes first and is always seen."""
    length = span.end - span.start
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(-span.prefix_length, length, device=device)
    hidden = (key > query) if causal else torch.zeros(length, len(key), dtype=torch.bool, device=device)
    return hidden if window is None else hidden | (key <= query - window)


# -- implementation ---------------------------------------------------------------------------------------------------------


def _forward_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_ranges(cu_seqlens, prefix, q.shape[0])
    if window == 0:
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(q.shape), lse
    run = _forward_core if use_core(q) else _forward_triton if use_triton(q) else _forward_by_sequence
    return run(q, k, v, cu_seqlens, prefix, causal, window, scale)


def _backward_impl(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if window == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    run = _backward_core if use_core(q) else _backward_triton if use_triton(q) else _backward_by_sequence
    return run(grad_out, q, k, v, out, lse, cu_seqlens, prefix, causal, window, scale)


# -- C++: the arguments of the implementations ------------------------------------------------------------------------------


def _forward_core(q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((heads, tokens), dtype=torch.float32)
    inputs, *rest = _core_arguments(q, k, v, *masks)
    _finished(core().attention(*map(address, (*inputs, out, lse)), *rest))
    return out, lse


def _backward_core(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    (q, k, v, *offsets), *rest = _core_arguments(q, k, v, *masks)
    tensors = (grad_out.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), *offsets, grad_q, grad_k, grad_v)
    _finished(core().attention_backward(*map(address, tensors), *rest))
    return grad_q, grad_k, grad_v


def _core_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Any, ...]:
    """The tensors that the core reads, kept alive by the caller, then its numbers: AttentionShape in csrc/cpu/kernels.h."""
    q, k, v = _whole_rows(q, k, v)
    offsets = _whole_offsets(cu_seqlens, prefix)
    (tokens, heads, dim), sequences = q.shape, cu_seqlens.shape[0] - 1
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    sizes = [tokens, sequences, heads, k.shape[1], dim, *strides, _EVERYTHING if window is None else window]
    return (q, k, v, *offsets), sizes, scale, causal, CORE_DTYPES.index(q.dtype), torch.get_num_threads()


def _whole_rows(*tensors: Tensor) -> list[Tensor]:
    """With channels that lie together; what lies between rows and heads does not matter."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def _whole_offsets(cu_seqlens: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return cu_seqlens.contiguous(), None if prefix is None else prefix.contiguous()


def _finished(done: bool) -> None:
    if not done:
        raise MemoryError(
            "attention: the kernel's scratch memory could not be allocated; free some memory, or use fewer threads"
        )


# -- Triton: the arguments of the implementations ---------------------------------------------------------------------------


def _forward_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: Tensor | None, *masks: Any
) -> tuple[Tensor, Tensor]:
    from pyrlhf.kernels import attention as kernels

    given = *_whole_rows(q, k, v), *_whole_offsets(cu_seqlens, prefix)
    return kernels.forward(*given, *masks, fault_flags(q.device), _FAULT)


def _backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    *masks: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from pyrlhf.kernels import attention as kernels

    given = *_whole_rows(grad_out, q, k, v), out.contiguous(), lse.contiguous(), *_whole_offsets(cu_seqlens, prefix)
    return kernels.backward(*given, *masks, fault_flags(q.device), _FAULT)


# -- torch: heads are laid out [Hkv, group, L, D], so that a key head meets all its queries ----------------------------------


def _forward_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    spans = _spans(cu_seqlens, prefix, tokens)
    qh, kh, vh = _by_head(q, k), _by_head(k, k), _by_head(v, k)
    out_h, lse_h = _by_head(out, k), lse.view(k.shape[1], heads // k.shape[1], tokens)
    masks = _Masks(spans, causal, window, q.dtype, q.device)
    for span in spans:
        keys, values = _visible(kh, span), _visible(vh, span)
        length = span.end - span.start
        queries = qh.narrow(2, span.start, length)
        own, own_lse = _matmul_forward(queries, keys, values, masks.of(span), masks.is_causal(span), scale)
        out_h.narrow(2, span.start, length).copy_(own)
        lse_h.narrow(2, span.start, length).copy_(own_lse)
    return out, lse


def _backward_by_sequence(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v = (x.contiguous() for x in (grad_out, q, k, v))
    (tokens, heads, _), kv_heads = q.shape, k.shape[1]
    # a prefix collects a gradient from each of its answers: that sum is kept in float32
    wide = k.dtype if prefix is None else torch.promote_types(k.dtype, torch.float32)
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(k.shape, dtype=wide, device=q.device) for _ in range(2))
    spans = _spans(cu_seqlens, prefix, tokens)
    gh, qh, oh = _by_head(grad_out, k), _by_head(q, k), _by_head(out, k)
    kh, vh, lse_h = _by_head(k, k), _by_head(v, k), lse.view(kv_heads, heads // kv_heads, tokens)
    grad_qh, grad_kh, grad_vh = _by_head(grad_q, k), _by_head(grad_k, k), _by_head(grad_v, k)
    masks = _Masks(spans, causal, window, q.dtype, q.device)
    for span in spans:
        length = span.end - span.start
        grad, queries, result, own_lse = (x.narrow(2, span.start, length) for x in (gh, qh, oh, lse_h))
        own_q, own_k, own_v = _matmul_backward(
            grad,
            queries,
            _visible(kh, span),
            _visible(vh, span),
            result,
            own_lse,
            masks.of(span),
            masks.is_causal(span),
            scale,
        )
        grad_qh.narrow(2, span.start, length).copy_(own_q)
        for total, own in ((grad_kh, own_k), (grad_vh, own_v)):
            total.narrow(2, span.start, length).add_(own.narrow(2, span.prefix_length, length))
            if span.prefix_length:
                total.narrow(2, span.prefix_start, span.prefix_length).add_(own.narrow(2, 0, span.prefix_length))
    return grad_q, grad_k.to(k.dtype), grad_v.to(k.dtype)


class _Masks:
    """Additive masks of all sequences, cut from one: what a token may see does not depend on where its sequence lies."""

    def __init__(
        self, spans: list[_Span], causal: bool, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._causal, self._window = causal, window
        masked = [s for s in spans if window is not None or (causal and s.prefix_length)]
        self._length = max((s.end - s.start for s in masked), default=0)
        self._prefix = max((s.prefix_length for s in masked), default=0)
        if masked:
            widest = _Span(0, self._length, 0, self._prefix)
            hidden = _hidden_keys(widest, causal, window, device)
            self._mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    def of(self, span: _Span) -> Tensor | None:
        """``[L, P + L]``, or None where nothing is masked or `is_causal` says it all."""
        if self._window is None and not (self._causal and span.prefix_length):
            return None
        length = span.end - span.start
        return self._mask[:length, self._prefix - span.prefix_length : self._prefix + length]

    def is_causal(self, span: _Span) -> bool:
        """Whether the plain triangle is the mask."""
        return self._causal and self._window is None and not span.prefix_length


def _by_head(x: Tensor, k: Tensor) -> Tensor:
    """``[T, H, D]`` -> a view ``[Hkv, H / Hkv, T, D]`` of it."""
    return x.view(x.shape[0], k.shape[1], x.shape[1] // k.shape[1], x.shape[2]).permute(1, 2, 0, 3)


def _visible(x: Tensor, span: _Span) -> Tensor:
    """The keys (values) of a sequence, its prefix first: ``[Hkv, 1, P + L, D]``."""
    own = x.narrow(2, span.start, span.end - span.start)
    if not span.prefix_length:
        return own
    return torch.cat([x.narrow(2, span.prefix_start, span.prefix_length), own], dim=2)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        length = q.shape[2]
        above = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    return scores


def _matmul_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(wide), k.to(wide), mask, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v.to(wide), lse


def _matmul_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))
    p = (_scores(q, k, mask, causal, scale) - lse[..., None]).exp()
    grad_scores = p * (grad @ v.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) * scale
    grad_v = (p.transpose(2, 3) @ grad).sum(1, keepdim=True)
    return grad_scores @ k, (grad_scores.transpose(2, 3) @ q).sum(1, keepdim=True), grad_v


# -- registration -----------------------------------------------------------------------------------------------------------


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, prefix, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, prefix)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    return *_attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale), *(None,) * 5


_attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "Tensor? prefix, bool causal, int? window, float scale) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? prefix, bool causal, int? window, float scale) "
    "-> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_eager = eager_function(_forward_impl, _setup_context, _backward)
