"""Log-prob of the targets and entropy of softmax((hidden @ weight.T + bias) / temperature), and the gradients, without the logits.

Forward: the vocabulary is cut into splits. A program takes a block of rows through one split, a tile of logits at a time, and
keeps four numbers a row: the maximum, the sum of exponentials, the weighted sum, the target's logit. A second kernel joins the
splits (online softmax, arXiv:1805.02867).

Backward, a slab of the vocabulary by a block of rows at a time: the logits are made again, by the same sums in the same order
as forward (so p is exp of the very logits that lse was made of, in float32), and leave the registers as the gradient of the
logits, in the dtype of the weights, where the products with weight and with hidden read it. The product with weight is a
kernel here, because a library picks its order of sums by the number of rows; the product with hidden is the library's.

Invariants:
- Splits and slabs depend on V and D only, tiles on the dtype and the device: a row's bits (logprob, entropy, its gradient) do
  not depend on the other rows. No atomics: every sum has one owner and one order.
- Beside outputs and gradients (hidden's in float32): _SLAB_BYTES for a slab, as much again for the weight's float32 sums where
  there are more rows than a slab has, and 2 KiB a row in the forward.
- A target outside 0..V-1 is equal to no column, so nothing is read or written for it: its log-prob is NaN, a fault is raised.
- Rows without upstream gradient have a gradient of exactly 0, and blocks of nothing else cost no products with weight. They
  are zeros in the product with hidden, so a NaN in such a row of hidden still spoils the weight's gradient.
- Operands come by TMA or by pointers, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_MAX_SPLITS = 128  # so many programs a block of rows: a full GPU even for few rows
_SLAB_BYTES = 128 << 20
_SLAB_COLUMNS = (1024, 8192)  # at least, at most

_LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: differences of two of it are not NaN
_FLOOR = tl.constexpr(-1e4)  # e^x is 0 from far above: it stands for -inf where a product with 0 must be 0


class Tiles(NamedTuple):
    """A tile of a product: rows x columns, summed ``depth`` at a time; and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Of a launch."""
        tile = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "GROUP": _GROUP}
        return {**tile, "num_warps": self.warps, "num_stages": self.stages}


# Two warpgroups of 64 x 256 fill the tensor cores of sm_90 with the fewest bytes a product that registers allow (128
# accumulators a thread): 48 KiB a stage, so one program a multiprocessor, and 4 stages of loads under way. The gradient's
# kernels also pass their tile through shared memory on its way out. With mma.sync (sm_80) a stage half as deep feeds the same
# tile, and 72 KiB fit every GPU since. float32 is summed by plain FMAs (no TF32), whose operands come through registers.
_TILES = {
    ("large", 2): Tiles(128, 256, 64, 8, 4),
    ("small", 2): Tiles(128, 256, 32, 8, 3),
    ("large", 4): Tiles(128, 128, 32, 8, 2),
    ("small", 4): Tiles(128, 128, 32, 8, 2),
}
_GROUP = 16  # blocks of rows whose programs share what they read of the weights while it is in L2
_MERGED = 16  # rows of one program that joins splits


def tiles_of(t: Tensor) -> Tiles:
    """large: 227 KiB of shared memory a program; small: every other GPU has 99 KiB at least."""
    return _TILES["large" if _large(t) else "small", t.element_size()]


def _large(t: Tensor) -> bool:
    """sm_90, sm_100, sm_103: they have TMA too."""
    return t.is_cuda and torch.cuda.get_device_capability(t.device)[0] in (9, 10)


# -- kernels ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(pid, rows_of_blocks, across, GROUP: tl.constexpr):
    """Which (block of rows, block across) a program takes: GROUP blocks of rows go along together."""
    in_group = GROUP * across
    first = pid // in_group * GROUP
    size = min(rows_of_blocks - first, GROUP)
    within = pid % in_group
    return first + within % size, within // size


@triton.jit
def _targets(targets, rows, n, vocabulary):
    """int32, half the registers of int64; -1, which is no column, for those outside 0..V-1."""
    target = tl.load(targets + rows, rows < n, -1)
    return tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)


@triton.jit
def _logits(
    hidden, weight, bias, row, col, n, vocabulary, dim, end, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of scale x logits, -inf beyond the vocabulary. Rows and columns beyond the ends read the last one, or zeros.

    end: dim, or 0 where nobody looks at the tile. TMA: hidden and weight are descriptors.
    """
    cols = col + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TMA:
        for start in range(0, end, DEPTH):
            x, y = hidden.load([row, start]), weight.load([col, start])
            sums = tl.dot(x, y.T, sums, input_precision="ieee")
    else:
        k = tl.arange(0, DEPTH)
        rows = row + tl.arange(0, ROWS)
        hidden += tl.cast(row, tl.int64) * dim
        weight += tl.cast(col, tl.int64) * dim
        a = (tl.minimum(rows, n - 1) - row)[:, None] * dim + k[None, :]
        b = (tl.minimum(cols, vocabulary - 1) - col)[None, :] * dim + k[:, None]
        for start in range(0, end, DEPTH):
            if EVEN:
                x, y = tl.load(hidden + start + a), tl.load(weight + start + b)
            else:
                inside = k < dim - start
                x = tl.load(hidden + start + a, inside[None, :], 0.0)
                y = tl.load(weight + start + b, inside[:, None], 0.0)
            sums = tl.dot(x, y, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + cols, cols < vocabulary, 0.0).to(tl.float32)[None, :]
    return tl.where(cols[None, :] < vocabulary, sums * scale, float("-inf"))


@triton.jit
def forward_kernel(
    hidden, weight, bias, targets, partials, n, vocabulary, dim, splits, width, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partials [4, splits, n]: maximum, sum of e^(z - maximum), sum of e^(z - maximum) (z - maximum), the target's z."""
    block, split = _place(tl.program_id(0), tl.cdiv(n, ROWS), splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    target = _targets(targets, rows, n, vocabulary)
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for start in range(split * width, min((split + 1) * width, vocabulary), COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        z = _logits(
            hidden, weight, bias, block * ROWS, start, n, vocabulary, dim, dim, scale, ROWS, COLUMNS, DEPTH, EVEN, TMA
        )  # fmt: skip
        picked += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        now = tl.maximum(highest, tl.max(z, 1))
        step = highest - now
        shrink = tl.exp(step)
        below = tl.maximum(z - now[:, None], _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp(below)
        # the sums so far move to the new maximum: weighted first, it needs the old total
        weighted = (weighted + step * total) * shrink + tl.sum(power * below, 1)
        total = total * shrink + tl.sum(power, 1)
        highest = now
    at = partials + tl.cast(split, tl.int64) * n + rows
    plane = tl.cast(splits, tl.int64) * n
    tl.store(at, highest, rows < n)
    tl.store(at + plane, total, rows < n)
    tl.store(at + 2 * plane, weighted, rows < n)
    tl.store(at + 3 * plane, picked, rows < n)


@triton.jit
def merge_kernel(
    partials, targets, logprob, entropy, lse, faults, n, vocabulary, splits,
    FAULT: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < splits) & (rows < n)[None, :]
    at = partials + tl.cast(split, tl.int64) * n + rows[None, :]
    plane = tl.cast(splits, tl.int64) * n
    highest = tl.load(at, inside, _LOWEST)
    top = tl.max(highest, 0)
    step = highest - top[None, :]
    shrink = tl.exp(step)
    part = tl.load(at + plane, inside, 0.0)
    total = tl.where(rows < n, tl.sum(part * shrink, 0), 1.0)
    weighted = tl.sum((tl.load(at + 2 * plane, inside, 0.0) + step * part) * shrink, 0)
    picked = tl.sum(tl.load(at + 3 * plane, inside, 0.0), 0)  # one split has it, the others 0
    log_total = tl.log(total)
    target = tl.load(targets + rows, rows < n, 0)
    valid = (target >= 0) & (target < vocabulary)
    tl.store(logprob + rows, tl.where(valid, (picked - top) - log_total, float("nan")), rows < n)
    tl.store(entropy + rows, log_total - weighted / total, rows < n)
    tl.store(lse + rows, top + log_total, rows < n)
    tl.store(faults + FAULT, 1, tl.min(valid.to(tl.int32), 0) == 0)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile: written one after the other, their addresses need half the registers."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _active(by_logprob, by_entropy):
    return (by_logprob != 0.0) | (by_entropy != 0.0)


@triton.jit
def grad_logits_kernel(
    hidden, weight, bias, targets, lse, entropy, grad_logprob, grad_entropy, grad, n, vocabulary, dim, first, width,
    scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad [whole tiles of rows, width] = g (onehot - p) - h p (log p + H), over the temperature, 0 beyond n and the vocabulary.

    Its columns are first.. of the vocabulary.
    """
    block, across = _place(tl.program_id(0), tl.cdiv(n, ROWS), width // COLUMNS, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    g = tl.load(grad_logprob + rows, rows < n, 0.0) * scale
    h = tl.load(grad_entropy + rows, rows < n, 0.0) * scale
    active = _active(g, h)
    end = dim * tl.max(active.to(tl.int32), 0)
    z = _logits(
        hidden, weight, bias, block * ROWS, first + across * COLUMNS, n, vocabulary, dim, end, scale, ROWS, COLUMNS, DEPTH, EVEN, TMA
    )  # fmt: skip
    normal = tl.load(lse + rows, rows < n, 0.0)
    same = g + h * tl.load(entropy + rows, rows < n, 0.0)
    target = _targets(targets, rows, n, vocabulary) - first
    halves = _halves(z, ROWS, COLUMNS)
    grad += tl.cast(block * ROWS, tl.int64) * width
    for half in tl.static_range(2):
        cols = across * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        logp = tl.maximum(halves[half] - normal[:, None], _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        found = -tl.exp(logp) * (same[:, None] + h[:, None] * logp)
        found = tl.where(cols[None, :] == target[:, None], found + g[:, None], found)
        found = tl.where(active[:, None], found, 0.0)
        at = (rows - block * ROWS)[:, None] * width + cols[None, :]
        tl.store(grad + at, found.to(grad.dtype.element_ty))


@triton.jit
def grad_hidden_kernel(
    grad, weight, grad_logprob, grad_entropy, sums, out, n, dim, count, width,
    FIRST: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sums [n, dim] (+)= grad [whole tiles of rows, width] @ weight [count <= width, dim], of the last slab to out. grad is 0 beyond count."""
    block, across = _place(tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(dim, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    cols = across * COLUMNS + tl.arange(0, COLUMNS)
    active = _active(tl.load(grad_logprob + rows, rows < n, 0.0), tl.load(grad_entropy + rows, rows < n, 0.0))
    end = count * tl.max(active.to(tl.int32), 0)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TMA:
        for start in range(0, end, DEPTH):
            x, y = grad.load([block * ROWS, start]), weight.load([start, across * COLUMNS])
            found = tl.dot(x, y, found, input_precision="ieee")
    else:
        k = tl.arange(0, DEPTH)
        a = grad + rows.to(tl.int64)[:, None] * width + k[None, :]
        b = weight + k.to(tl.int64)[:, None] * dim + cols[None, :]
        for start in range(0, end, DEPTH):
            y = tl.load(b, (k < count - start)[:, None] & (cols < dim)[None, :], 0.0)
            found = tl.dot(tl.load(a), y, found, input_precision="ieee")
            a += DEPTH
            b += DEPTH * tl.cast(dim, tl.int64)
    halves = _halves(found, ROWS, COLUMNS)
    for half in tl.static_range(2):
        cols = across * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        at = rows.to(tl.int64)[:, None] * dim + cols[None, :]
        inside = (rows < n)[:, None] & (cols < dim)[None, :]
        x = halves[half]
        if not FIRST:
            x += tl.load(sums + at, inside, 0.0)
        if LAST:
            tl.store(out + at, x.to(out.dtype.element_ty), inside)
        else:
            tl.store(sums + at, x, inside)


# -- launchers --------------------------------------------------------------------------------------------------------------


def _split_width(vocabulary: int, columns: int) -> int:
    """The columns of one split: whole tiles, and at most _MAX_SPLITS of them."""
    return columns * triton.cdiv(triton.cdiv(vocabulary, columns), _MAX_SPLITS)


def _slab_width(vocabulary: int, dim: int, columns: int) -> int:
    """The columns of one slab: whole tiles; the float32 gradient of their weights fits in _SLAB_BYTES (D <= 32768)."""
    least, most = _SLAB_COLUMNS
    width = min(max(_SLAB_BYTES // (4 * dim), least), most) // columns * columns
    return min(width, columns * triton.cdiv(vocabulary, columns))


def _operands(a: Tensor, a_block: tuple[int, int], b: Tensor, b_block: tuple[int, int]) -> tuple[bool, Any, Any]:
    """Whether TMA loads the operands of a product, and these: as descriptors of such blocks, or as they are.

    TMA (sm_90) needs rows of whole 16 bytes. It takes addresses out of the registers and the loads out of the instruction
    stream; what lies beyond a matrix is 0. float32, whose products are plain FMAs, would gain nothing.
    """
    fits = all(t.element_size() == 2 and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in (a, b))
    if not (fits and _large(a)):
        return False, a, b
    return True, TensorDescriptor.from_tensor(a, list(a_block)), TensorDescriptor.from_tensor(b, list(b_block))


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, faults: Tensor, fault: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy and lse ``[N]`` float32; a target outside raises ``faults[fault]``."""
    (n, dim), vocabulary, tiles = hidden.shape, weight.shape[0], tiles_of(hidden)
    logprob, entropy, lse = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
    if n == 0:
        return logprob, entropy, lse
    width = _split_width(vocabulary, tiles.columns)
    splits = triton.cdiv(vocabulary, width)
    partials = hidden.new_empty((4, splits, n), dtype=torch.float32)
    tma, x, y = _operands(hidden, (tiles.rows, tiles.depth), weight, (tiles.columns, tiles.depth))
    with torch.cuda.device_of(hidden):
        forward_kernel[(triton.cdiv(n, tiles.rows) * splits,)](
            x, y, bias, targets, partials, n, vocabulary, dim, splits, width, 1 / temperature,
            EVEN=dim % tiles.depth == 0, TMA=tma, **tiles.options(),
        )  # fmt: skip
        merge_kernel[(triton.cdiv(n, _MERGED),)](
            partials, targets, logprob, entropy, lse, faults, n, vocabulary, splits,
            FAULT=fault, ROWS=_MERGED, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return logprob, entropy, lse


def backward(
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
    """The gradients by hidden, weight and bias, each empty where it is not wanted."""
    (n, dim), vocabulary, tiles = hidden.shape, weight.shape[0], tiles_of(hidden)
    by_hidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
    by_weight = weight.new_empty(weight.shape if wanted[1] else 0)
    by_bias = weight.new_empty(vocabulary if wanted[2] else 0)
    if n == 0:
        return by_hidden, by_weight.zero_(), by_bias.zero_()
    width = _slab_width(vocabulary, dim, tiles.columns)
    most = max(_SLAB_BYTES // (width * hidden.element_size()) // tiles.rows, 1)
    height = tiles.rows * min(most, triton.cdiv(n, tiles.rows))
    grad = hidden.new_empty((height, width))
    sums = hidden.new_empty(by_hidden.shape if width < vocabulary else 0, dtype=torch.float32)
    several = height < n
    with torch.cuda.device_of(hidden):
        for first in range(0, vocabulary, width):
            part = slice(first, min(first + width, vocabulary))
            weight_sums = weight.new_zeros(weight[part].shape, dtype=torch.float32) if several and wanted[1] else None
            bias_sums = weight.new_zeros(part.stop - first, dtype=torch.float32)
            for start in range(0, n, height):
                at = slice(start, min(start + height, n))
                upstream = grad_logprob[at], grad_entropy[at]
                _grad_logits(
                    grad, hidden[at], weight, bias, targets[at], lse[at], entropy[at], upstream, first, temperature, tiles
                )  # fmt: skip
                if wanted[0]:
                    _grad_hidden(grad, weight[part], upstream, sums[at], by_hidden[at], first, vocabulary, tiles)
                used = grad[: at.stop - start, : part.stop - first]
                if weight_sums is not None:
                    _add_product(weight_sums, used.t(), hidden[at])
                elif wanted[1]:
                    torch.mm(used.t(), hidden, out=by_weight[part])
                if wanted[2]:
                    bias_sums += used.sum(0, dtype=torch.float32)
            if weight_sums is not None:
                by_weight[part] = weight_sums
            if wanted[2]:
                by_bias[part] = bias_sums
    return by_hidden, by_weight, by_bias


def _grad_logits(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    upstream: tuple[Tensor, Tensor],
    first: int,
    temperature: float,
    tiles: Tiles,
) -> None:
    (n, dim), width = hidden.shape, grad.shape[1]
    tma, x, y = _operands(hidden, (tiles.rows, tiles.depth), weight, (tiles.columns, tiles.depth))
    grad_logits_kernel[(triton.cdiv(n, tiles.rows) * (width // tiles.columns),)](
        x, y, bias, targets, lse, entropy, *upstream, grad, n, weight.shape[0], dim, first, width,
        1 / temperature,
        EVEN=dim % tiles.depth == 0, TMA=tma, **tiles.options(),
    )  # fmt: skip


def _grad_hidden(
    grad: Tensor,
    weight: Tensor,
    upstream: tuple[Tensor, Tensor],
    sums: Tensor,
    out: Tensor,
    first: int,
    vocabulary: int,
    tiles: Tiles,
) -> None:
    (n, dim), count, width = out.shape, weight.shape[0], grad.shape[1]
    tma, x, y = _operands(grad, (tiles.rows, tiles.depth), weight, (tiles.depth, tiles.columns))
    grad_hidden_kernel[(triton.cdiv(n, tiles.rows) * triton.cdiv(dim, tiles.columns),)](
        x, y, *upstream, sums, out, n, dim, count, width,
        FIRST=first == 0, LAST=first + count == vocabulary, TMA=tma, **tiles.options(),
    )  # fmt: skip


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b`` by the library, in float32 throughout."""
    if not a.is_cuda or a.dtype == torch.float32:
        sums.addmm_(a.float(), b.float())
    elif torch.__version__ >= "2.10":
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:  # there addmm wants the sums in the dtype of a
        sums += torch.mm(a, b, out_dtype=torch.float32)
