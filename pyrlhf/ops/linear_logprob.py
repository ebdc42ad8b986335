"""Log-probability of given tokens and entropy of the next-token distribution, from hidden states, without the logits.

The logits of ROWS rows by a chunk of the vocabulary exist at a time. The vocabulary is the outer loop, so that a chunk's
float32 weight and weight gradient exist once; a running (maximum, sum, weighted sum) a row joins the chunks (online
softmax, arXiv:1805.02867). The backward makes the logits again. Rows go through GEMMs of one shape, whatever N is, because
BLAS picks its order of summation by shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_number, check_tensor, float_dtypes, values_readable
from pyrlhf.ops._library import define

ROWS = 128
_CHUNK_BYTES = 32 << 20
_LOWEST = -1e30  # below every logit, and finite: differences of two of it are not NaN


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` in plain torch, holding all logits; float64 too."""
    _check(hidden, weight, targets, bias, temperature, reference=True)
    _check_targets(targets, weight.shape[0])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets under, and entropy of, softmax((hidden @ weight.T + bias) / temperature).

    hidden: ``[N, D]`` float32 or bfloat16 (float16 on CUDA); weight: ``[V, D]`` and bias: ``[V]`` of the same dtype;
    targets: int64 ``[N]`` in 0..V-1; temperature > 0.

    Returns ``(logprob [N], entropy [N])`` float32, in nats; differentiable in hidden, weight and bias through both.
    Products and sums are float32, the weight's gradient too until its last rounding. Beside inputs, outputs and their
    gradients (float32 for hidden's), holds at most 64 MiB, whatever N and V (for D <= 32768). A row's bits do not depend on the other rows.
    Raises ValueError or TypeError naming the argument.
    """
    _check(hidden, weight, targets, bias, temperature)
    logprob, entropy, _ = _linear_logprob(hidden, weight, targets, bias, float(temperature))
    return logprob, entropy


def _check(
    hidden: object, weight: object, targets: object, bias: object, temperature: object, *, reference: bool = False
) -> None:
    op = "linear_logprob"
    check_tensor(op, "hidden", hidden, shape=(None, None), dtype=float_dtypes(hidden, reference=reference))
    assert isinstance(hidden, Tensor)
    check_tensor(op, "weight", weight, shape=(None, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    assert isinstance(weight, Tensor)
    if weight.shape[0] == 0 or hidden.shape[1] == 0:
        raise ValueError(f"{op}: weight must have shape [V, D] with V, D >= 1, found {list(weight.shape)}")
    check_tensor(op, "targets", targets, shape=(hidden.shape[0],), dtype=torch.int64, device=hidden.device)
    if bias is not None:
        check_tensor(op, "bias", bias, shape=(weight.shape[0],), dtype=hidden.dtype, device=hidden.device)
    check_number(op, "temperature", temperature, low=0.0, high=1e30, low_open=True)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0 or not values_readable(targets):
        return
    low, high = (int(x) for x in torch.aminmax(targets))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_logprob: targets must be token ids in 0..{vocabulary - 1} (weight has {vocabulary} rows), "
            f"found {low if low < 0 else high}"
        )


# -- implementation ---------------------------------------------------------------------------------------------------------


def _chunks(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of the vocabulary whose float32 weight, weight gradient and two slabs of logits fit in _CHUNK_BYTES."""
    vocabulary, dim = weight.shape
    size = max(64, _CHUNK_BYTES // (4 * (2 * dim + 2 * ROWS)) // 64 * 64)
    for start in range(0, vocabulary, size):
        yield start, min(start + size, vocabulary)


def _blocks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of exactly ROWS rows of ``x`` in ``dtype``, the last one filled up with zeros."""
    for start in range(0, x.shape[0], ROWS):
        block = x[start : start + ROWS].to(dtype)
        if len(block) < ROWS:
            block = torch.cat((block, block.new_zeros(ROWS - len(block), x.shape[1])))
        elif block.data_ptr() % 64:
            block = block.clone()
        yield slice(start, start + ROWS), block


def _padded(x: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    """``[N]`` -> ``[N']``, N' the next multiple of ROWS."""
    return torch.nn.functional.pad(x.to(dtype), (0, -len(x) % ROWS), value=fill)


def _logits(block: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.mm(block, weight.t())
    if bias is not None:
        logits += bias
    return logits if temperature == 1.0 else logits.div_(temperature)


def _in_chunk(targets: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in [start, end), and where; the others point at column 0."""
    inside = (targets >= start) & (targets < end)
    return inside, torch.where(inside, targets - start, 0)[:, None]


def _forward_impl(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_targets(targets, weight.shape[0])
    rows, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    ids = _padded(targets, 0, torch.int64)
    highest = torch.full(ids.shape, _LOWEST, dtype=wide, device=hidden.device)
    total, weighted, picked = (torch.zeros(ids.shape, dtype=wide, device=hidden.device) for _ in range(3))
    for start, end in _chunks(weight):
        chunk, offset = weight[start:end].to(wide), None if bias is None else bias[start:end].to(wide)
        for at, block in _blocks(hidden, wide):
            logits = _logits(block, chunk, offset, temperature)
            inside, column = _in_chunk(ids[at], start, end)
            picked[at] = torch.where(inside, logits.gather(1, column)[:, 0], picked[at])
            before = highest[at]
            now = torch.maximum(before, logits.amax(1))
            shrink = (before - now).exp_()
            logits -= now[:, None]
            exps = logits.exp()
            # weighted = sum of exp(z - m) * (z - m): moved to the new maximum, then the chunk's own part
            weighted[at] = shrink * (weighted[at] + (before - now) * total[at]) + exps.mul(logits).sum(1)
            total[at] = shrink * total[at] + exps.sum(1)
            highest[at] = now
    log_total = total.log()
    logprob = (picked - highest) - log_total
    entropy = log_total - weighted / total
    return logprob[:rows].clone(), entropy[:rows].clone(), (highest + log_total)[:rows].clone()


def _backward_impl(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, device = lse.dtype, hidden.device
    ids = _padded(targets, 0, torch.int64)
    # rows that only fill the last block: weight 0, and probabilities that stay finite
    by_logprob, by_entropy, h = (_padded(x, 0.0, wide)[:, None] for x in (grad_logprob, grad_entropy, entropy))
    norm = _padded(lse, -_LOWEST, wide)[:, None]
    grad_hidden = torch.zeros((len(ids), hidden.shape[1]), dtype=wide, device=device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=device)
    for start, end in _chunks(weight):
        chunk, offset = weight[start:end].to(wide), None if bias is None else bias[start:end].to(wide)
        own = torch.zeros(chunk.shape, dtype=wide, device=device)
        for at, block in _blocks(hidden, wide):
            logp = _logits(block, chunk, offset, temperature).sub_(norm[at])
            p = logp.exp()
            # d logprob / dz = onehot - p;  d entropy / dz = -p * (log p + entropy)
            grad = logp.add_(h[at]).mul_(by_entropy[at]).add_(by_logprob[at]).mul_(p).neg_()
            inside, column = _in_chunk(ids[at], start, end)
            grad.scatter_add_(1, column, torch.where(inside[:, None], by_logprob[at], 0.0))
            if temperature != 1.0:
                grad.div_(temperature)
            grad_hidden[at].addmm_(grad, chunk)
            own.addmm_(grad.t(), block)
            grad_bias[start:end] += grad.sum(0)
        grad_weight[start:end] = own
    return grad_hidden[: len(hidden)].to(hidden.dtype).contiguous(), grad_weight, grad_bias.to(weight.dtype)


def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide)


def _backward_fake(
    grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, output[1], output[2])


def _backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, entropy, lse = ctx.saved_tensors
    grads = _linear_logprob_backward(
        grad_logprob, grad_entropy, hidden, weight, targets, bias, entropy, lse, ctx.temperature
    )
    return grads[0], grads[1], None, grads[2] if bias is not None else None, None


_linear_logprob_backward = define(
    "linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? bias, Tensor entropy, Tensor lse, float temperature) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
_linear_logprob = define(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
