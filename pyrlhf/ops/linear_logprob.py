"""Log-probability of given tokens and entropy of the next-token distribution, from hidden states, without the logits.

On the CPU one C++ kernel a direction does it all, products included: torch has no product of bfloat16 matrices with float32
logits there. On CUDA Triton kernels do (kernels/linear_logprob.py). For float64 and PYRLHF_BACKEND=ref torch does it by slabs: the
logits of ROWS rows by a chunk of the vocabulary exist at a time. The vocabulary is the outer loop, so that a chunk's float32 weight
and weight gradient exist once; a running (maximum, sum, weighted sum) a row joins the chunks (online softmax, arXiv:1805.02867). The
backward makes the logits again. Rows go through GEMMs of one shape, whatever N is, because BLAS picks its order of summation by
shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_number, check_tensor, float_dtypes, values_readable
from pyrlhf.ops._core import CORE_DTYPES, FAULTS, address, core, fault_flags, use_core, use_triton
from pyrlhf.ops._library import define, eager_function

ROWS = 128
_CHUNK_BYTES = 32 << 20
_FAULT = next(i for i, what in enumerate(FAULTS) if what.startswith("linear_logprob"))
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
    Products and sums are float32, the weight's gradient too until its last rounding. Beside the inputs, the outputs and the
    gradients (hidden's in float32), it holds at most 64 MiB whatever N and V are, for D <= 32768; on CUDA 256 MiB and, in the
    forward, 2 KiB a row. Of one number of threads, a row's bits do not depend on the other rows. On CUDA a target outside
    0..V-1 gives NaN and a fault that the next wait raises; with PYRLHF_CHECK=1, and on the CPU, ValueError at once.
    Raises ValueError or TypeError naming the argument.
    """
    _check(hidden, weight, targets, bias, temperature)
    op = _linear_logprob if torch.compiler.is_compiling() else _eager
    logprob, entropy, _ = op(hidden, weight, targets, bias, float(temperature))
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


# -- C++ --------------------------------------------------------------------------------------------------------------------


def _scratch(hidden: Tensor, rows: int, vocabulary: int, backward: bool) -> Tensor:
    needed = core().linear_logprob_scratch(CORE_DTYPES.index(hidden.dtype), rows, hidden.shape[1], vocabulary, backward)
    return hidden.new_empty(-(-needed // 4), dtype=torch.float32)


def _forward_core(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = [None if x is None else x.contiguous() for x in (hidden, weight, bias, targets)]
    made = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3)]
    scratch = _scratch(hidden, hidden.shape[0], weight.shape[0], False)
    core().linear_logprob(
        *map(address, given), CORE_DTYPES.index(hidden.dtype), *hidden.shape, weight.shape[0], temperature,
        *map(address, made), address(scratch), torch.get_num_threads(),
    )  # fmt: skip
    return made[0], made[1], made[2]


def _backward_core(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    given = [None if x is None else x.contiguous() for x in (hidden, weight, bias, targets)]
    rows = ((grad_logprob != 0) | (grad_entropy != 0)).nonzero().flatten()  # the others make no work
    count, vocabulary = rows.shape[0], weight.shape[0]
    arrays = [x.contiguous() for x in (grad_logprob, grad_entropy, entropy, lse)]
    by_hidden = (hidden.new_empty if count == hidden.shape[0] else hidden.new_zeros)(hidden.shape if wanted[0] else 0)
    by_weight = weight.new_empty(weight.shape if wanted[1] else 0)
    by_bias = weight.new_empty(vocabulary if wanted[2] else 0)
    sums = None if hidden.dtype == torch.float32 else by_hidden.new_empty(by_hidden.shape, dtype=torch.float32)
    scratch = _scratch(hidden, count, vocabulary, True)
    core().linear_logprob_backward(
        *map(address, given), CORE_DTYPES.index(hidden.dtype), *hidden.shape, vocabulary, temperature,
        address(rows), count, *map(address, arrays), *map(address, (sums, by_hidden, by_weight, by_bias)),
        address(scratch), torch.get_num_threads(),
    )  # fmt: skip
    return by_hidden, by_weight, by_bias


# -- Triton -----------------------------------------------------------------------------------------------------------------


def _forward_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    from pyrlhf.kernels import linear_logprob as kernels

    given = (None if x is None else x.contiguous() for x in (hidden, weight, targets, bias))
    return kernels.forward(*given, temperature, fault_flags(hidden.device), _FAULT)


def _backward_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `_backward_core`."""
    from pyrlhf.kernels import linear_logprob as kernels

    *tensors, temperature, wanted = arguments
    return kernels.backward(*(None if x is None else x.contiguous() for x in tensors), temperature, wanted)


# -- torch ------------------------------------------------------------------------------------------------------------------


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


class _Running(NamedTuple):
    """What is known of each row after some chunks of the vocabulary; z are its logits so far, m their maximum."""

    highest: Tensor  # m
    total: Tensor  # sum of exp(z - m)
    weighted: Tensor  # sum of exp(z - m) * (z - m)
    picked: Tensor  # the target's z

    def add(self, at: slice, logits: Tensor, inside: Tensor, column: Tensor) -> None:
        """Joins one slab of logits ``[ROWS, C]``, which it overwrites."""
        highest, total, weighted, picked = (x[at] for x in self)  # views: written in place
        picked.copy_(torch.where(inside, logits.gather(1, column)[:, 0], picked))
        now = torch.maximum(highest, logits.amax(1))
        step = highest - now
        shrink = step.exp()
        exps = logits.sub_(now[:, None]).exp()
        # the sums so far move to the new maximum: weighted first, it needs the old total
        weighted.add_(step * total).mul_(shrink)
        total.mul_(shrink).add_(exps.sum(1))
        weighted.add_(exps.mul_(logits).sum(1))
        highest.copy_(now)


def _forward_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    ids = _padded(targets, 0, torch.int64)
    state = _Running(*(torch.zeros(ids.shape, dtype=wide, device=hidden.device) for _ in range(4)))
    state.highest.fill_(_LOWEST)
    for start, end in _chunks(weight):
        chunk, offset = weight[start:end].to(wide), None if bias is None else bias[start:end].to(wide)
        for at, block in _blocks(hidden, wide):
            state.add(at, _logits(block, chunk, offset, temperature), *_in_chunk(ids[at], start, end))
    log_total = state.total.log()
    logprob = (state.picked - state.highest) - log_total
    entropy = log_total - state.weighted / state.total
    return logprob[:rows].clone(), entropy[:rows].clone(), (state.highest + log_total)[:rows].clone()


def _grad_logits(logits: Tensor, rows: Sequence[Tensor], inside: Tensor, column: Tensor) -> Tensor:
    """The gradient of one slab of logits, in its place: onehot - p for the log-prob, -p * (log p + entropy) for the entropy."""
    lse, entropy, by_logprob, by_entropy = rows  # [ROWS, 1]
    logp = logits.sub_(lse)
    p = logp.exp()
    grad = logp.add_(entropy).mul_(by_entropy).add_(by_logprob).mul_(p).neg_()
    return grad.scatter_add_(1, column, torch.where(inside[:, None], by_logprob, 0.0))


def _backward_torch(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide, device = lse.dtype, hidden.device
    ids = _padded(targets, 0, torch.int64)
    # rows that only fill the last block: no gradient, and probabilities that stay finite
    fills = ((lse, -_LOWEST), (entropy, 0.0), (grad_logprob, 0.0), (grad_entropy, 0.0))
    columns = [_padded(x, fill, wide)[:, None] for x, fill in fills]
    grad_hidden = torch.zeros((len(ids), hidden.shape[1]), dtype=wide, device=device)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=device)
    for start, end in _chunks(weight):
        chunk, offset = weight[start:end].to(wide), None if bias is None else bias[start:end].to(wide)
        own = torch.zeros(chunk.shape, dtype=wide, device=device)
        for at, block in _blocks(hidden, wide):
            grad = _logits(block, chunk, offset, temperature)
            grad = _grad_logits(grad, [x[at] for x in columns], *_in_chunk(ids[at], start, end))
            if temperature != 1.0:
                grad.div_(temperature)
            grad_hidden[at].addmm_(grad, chunk)
            own.addmm_(grad.t(), block)
            grad_bias[start:end] += grad.sum(0)
            del grad  # before the next slab is made
        grad_weight[start:end] = own
    made = (grad_hidden[: len(hidden)].to(hidden.dtype).contiguous(), grad_weight, grad_bias.to(weight.dtype))
    by_hidden, by_weight, by_bias = (x if w else x.new_empty(0) for x, w in zip(made, wanted, strict=True))
    return by_hidden, by_weight, by_bias


# -- registration -----------------------------------------------------------------------------------------------------------


def _forward_impl(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_targets(targets, weight.shape[0])
    given = (hidden, weight, bias)
    run = _forward_core if use_core(*given) else _forward_triton if use_triton(*given) else _forward_torch
    return run(hidden, weight, targets, bias, temperature)


def _backward_impl(
    grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = (hidden, weight)
    run = _backward_core if use_core(*given) else _backward_triton if use_triton(*given) else _backward_torch
    return run(grad_logprob, grad_entropy, hidden, weight, *rest)


def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide)


def _backward_fake(
    grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, (weight.shape[0],))
    by_hidden, by_weight, by_bias = (
        hidden.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, rest[-1], strict=True)
    )
    return by_hidden, by_weight, by_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, output[1], output[2])


def _backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, entropy, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _linear_logprob_backward(
        grad_logprob, grad_entropy, hidden, weight, targets, bias, entropy, lse, ctx.temperature, wanted
    )
    by_hidden, by_weight, by_bias = (x if w else None for x, w in zip(grads, wanted, strict=True))
    return by_hidden, by_weight, None, by_bias, None


_linear_logprob_backward = define(
    "linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? bias, Tensor entropy, Tensor lse, float temperature, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
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
_eager = eager_function(_forward_impl, _setup_context, _backward)
