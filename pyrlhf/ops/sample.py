"""Sampling tokens, keyed: a draw depends on (seed, id, position) and its own row of logits, and on nothing else.

The definition is exact, so that the C++ core on any instruction set, the CUDA kernels and the reference below pick the same token. With
z = (logit - max) / temperature in float32, a token weighs floor(e^z 2^40), e^z by the float32 operations of `_weigh`; weights
add up exactly in int64; 62 bits u of Philox4x32-10 point at floor(u * sum / 2^62), and the first token (by id) whose running
sum passes that point is the sample. A token less likely than 2^-40 of the likeliest is never drawn.

Filters apply in the order top_k, top_p, min_p, each on what the one before left. Tokens are ordered by logit, equal logits by
id, so every filter keeps a prefix of that order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrlhf.ops._checks import check_number, check_tensor, values_readable
from pyrlhf.ops._core import (
    CORE_DTYPES,
    CUDA_DTYPES,
    address,
    core,
    cuda_core,
    faults,
    queue,
    use_core,
    use_cuda_core,
)
from pyrlhf.ops._library import define

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MASK = 0xFFFFFFFF
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_MAX_VOCAB = 1 << 22  # above it the sum of weights could pass 62 bits


def philox4x32_ref(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) in plain PyTorch: counter int64 ``[..., 4]`` of 32-bit words -> the same shape."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, its 64 bits are the product's
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def sample_ref(
    logits: Tensor,
    ids: Tensor,
    positions: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`sample` in plain PyTorch, the same tokens. A bad row gives token -1 and log-prob NaN."""
    x, top, z, bad = _tempered(logits, temperature)
    kept = _kept(x, z, top_k, top_p, min_p) if temperature > 0 else torch.ones_like(z, dtype=torch.bool)
    running = (_weigh(z) * kept).cumsum(1)
    mass = running[:, -1:]
    if temperature > 0:
        chosen = (running <= _scaled_draw(ids, positions, seed, mass)).sum(1)
    else:
        chosen = torch.where(x == top, torch.arange(x.shape[1], device=x.device), x.shape[1]).amin(1)
    chosen = chosen.clamp(max=x.shape[1] - 1)
    return chosen.masked_fill(bad, -1), _logprobs(z, chosen, mass, bad)


def sample(
    logits: Tensor,
    ids: Tensor,
    positions: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-prob under the distribution really drawn from (after temperature and filters).

    temperature 0 takes the largest logit (log-prob under the untempered, unfiltered softmax). top_k keeps the k largest logits
    (0: all); top_p keeps the likeliest tokens until their probability first reaches top_p, that token included; min_p keeps
    tokens at least min_p times as likely as the likeliest. Equal logits: the lower id comes first.

    logits: float32, bfloat16, on CUDA float16 (other floats are converted) ``[B, V]``; ids, positions: int64 ``[B]``;
    0 <= seed < 2**63.
    Returns tokens int64 ``[B]`` and logprobs float32 ``[B]``. Raises TypeError or ValueError naming the argument that is wrong, and
    ValueError naming the row whose logits hold NaN, +inf or only -inf (on CUDA only with PYRLHF_CHECK=1; else the token is -1).
    """
    check_tensor("sample", "logits", logits, shape=(None, None), dtype=_FLOATS)
    rows, vocab = logits.shape
    check_tensor("sample", "ids", ids, shape=(rows,), dtype=torch.int64, device=logits.device)
    check_tensor("sample", "positions", positions, shape=(rows,), dtype=torch.int64, device=logits.device)
    if not 1 <= vocab <= _MAX_VOCAB:
        raise ValueError(f"sample: logits must have 1 to {_MAX_VOCAB} columns, found {vocab}")
    _check_options(seed, temperature, top_k, top_p, min_p)
    op = _op if torch.compiler.is_compiling() else _sample  # eager decoding skips the dispatcher
    tokens, logprobs = op(logits.detach(), ids, positions, seed, temperature, top_k, top_p, min_p)
    return tokens, logprobs


def sampled_logprob_ref(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`sampled_logprob` in plain PyTorch. A bad row gives NaN."""
    _, _, z, bad = _tempered(logits, temperature)
    return _logprobs(z, tokens, _weigh(z).sum(1, keepdim=True), bad)


def sampled_logprob(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The log-prob that `sample` without filters gives ``tokens`` at these logits, the same bits.

    logits: float32, bfloat16, on CUDA float16 (other floats are converted) ``[B, V]``; tokens: int64 ``[B]`` in 0..V-1. Returns
    float32 ``[B]``. Not differentiable. Raises as `sample` does.
    """
    check_tensor("sampled_logprob", "logits", logits, shape=(None, None), dtype=_FLOATS)
    rows, vocab = logits.shape
    check_tensor("sampled_logprob", "tokens", tokens, shape=(rows,), dtype=torch.int64, device=logits.device)
    if not 1 <= vocab <= _MAX_VOCAB:
        raise ValueError(f"sampled_logprob: logits must have 1 to {_MAX_VOCAB} columns, found {vocab}")
    _check_temperature("sampled_logprob", temperature)
    logprobs: Tensor = _sampled_logprob_op(logits.detach(), tokens, temperature)
    return logprobs


def _sampled_logprob(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    if tokens.numel() and values_readable(tokens):
        low, high = (int(x) for x in torch.aminmax(tokens))
        if low < 0 or high >= logits.shape[1]:
            found = low if low < 0 else high
            raise ValueError(f"sampled_logprob: tokens must be in [0, {logits.shape[1]}), found {found}")
    logits = _native(logits)
    cpu = use_core(logits)
    if not cpu and not use_cuda_core(logits):
        logprobs = sampled_logprob_ref(logits, tokens, temperature=temperature)
        if values_readable(logprobs) and bool(logprobs.isnan().any()):
            raise _bad_row(int(logprobs.isnan().nonzero()[0]), logits)
        return logprobs
    logits = logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()
    tokens = tokens.contiguous()
    logprobs = tokens.new_empty(tokens.shape, dtype=torch.float32)
    rows = (address(logits), CUDA_DTYPES.index(logits.dtype), address(tokens), *logits.shape, logits.stride(0))
    if not cpu:
        _check_rows(logits)
        scratch = _scratch(logits)
        cuda_core().sampled_logprob(
            *rows, _inverse(temperature), address(scratch), address(logprobs), faults(logits), *queue(logits)
        )
        return logprobs
    bad = core().sampled_logprob(*rows, _inverse(temperature), address(logprobs), torch.get_num_threads())
    if bad >= 0:
        raise _bad_row(bad, logits)
    return logprobs


def _check_options(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    for name, value, limit in (("seed", seed, 2**63), ("top_k", top_k, 2**31)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"sample: {name} must be an int, found {type(value).__name__}")
        if not 0 <= value < limit:
            raise ValueError(f"sample: {name} must be in [0, {limit}), found {value}")
    _check_temperature("sample", temperature)
    check_number("sample", "top_p", top_p, low=0.0, high=1.0, low_open=True)
    check_number("sample", "min_p", min_p, low=0.0, high=1.0)


def _check_temperature(op: str, temperature: float) -> None:
    check_number(op, "temperature", temperature, low=0.0, high=1e30)
    if 0 < temperature < 1e-30:
        raise ValueError(f"{op}: temperature must be 0 (argmax) or at least 1e-30, found {temperature}")


def _sample(
    logits: Tensor,
    ids: Tensor,
    positions: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    logits = _native(logits)
    cpu = use_core(logits)
    if not cpu and not use_cuda_core(logits):
        tokens, logprobs = sample_ref(
            logits, ids, positions, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        if values_readable(tokens) and bool((tokens < 0).any()):
            raise _bad_row(int((tokens < 0).nonzero()[0]), logits)
        return tokens, logprobs
    logits = logits if logits.stride(1) == 1 and logits.stride(0) >= 0 else logits.contiguous()
    ids, positions = ids.contiguous(), positions.contiguous()
    tokens, logprobs = torch.empty_like(ids), ids.new_empty(ids.shape, dtype=torch.float32)
    arguments = (
        address(logits), CUDA_DTYPES.index(logits.dtype), address(ids), address(positions), *logits.shape, logits.stride(0), seed,
        _inverse(temperature), top_k, top_p, _log(min_p),
    )  # fmt: skip
    if not cpu:
        _check_rows(logits)
        scratch = _scratch(logits, top_k, top_p)
        cuda_core().sample(
            *arguments, address(scratch), address(tokens), address(logprobs), faults(logits), *queue(logits)
        )
        return tokens, logprobs
    bad = core().sample(*arguments, address(tokens), address(logprobs), torch.get_num_threads())
    if bad >= 0:
        raise _bad_row(bad, logits)
    return tokens, logprobs


def _native(logits: Tensor) -> Tensor:
    """In a dtype that the kernels where it lives can read."""
    return logits if logits.dtype in CORE_DTYPES or use_cuda_core(logits) else logits.float()


def _scratch(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What the CUDA kernels of this call write to on their way."""
    size = cuda_core().sample_scratch(*logits.shape, top_k, top_p, *queue(logits))
    return torch.empty(size, dtype=torch.uint8, device=logits.device)


def _check_rows(logits: Tensor) -> None:
    if logits.shape[0] and values_readable(logits):
        _, _, _, bad = _tempered(logits, 1.0)
        if bool(bad.any()):
            raise _bad_row(int(bad.nonzero()[0]), logits)


def _bad_row(row: int, logits: Tensor) -> ValueError:
    x = logits[row]
    held = "NaN" if x.isnan().any() else "+inf" if (x == math.inf).any() else "only -inf"
    return ValueError(f"sample: logits must be finite or -inf with one finite entry a row, row {row} holds {held}")


def _inverse(temperature: float) -> float:
    return 0.0 if temperature == 0 else 1.0 / temperature


def _log(probability: float) -> float:
    return -math.inf if probability == 0 else math.log(probability)


def _tempered(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits in float32, the largest of each row, z, which rows hold NaN, +inf or only -inf)"""
    x = logits.float()
    top = x.amax(1, keepdim=True)
    bad = ~top.isfinite()[:, 0] | x.isnan().any(1)
    return x, top, (x - top) * (_inverse(temperature) or 1.0), bad


def _logprobs(z: Tensor, tokens: Tensor, mass: Tensor, bad: Tensor) -> Tensor:
    logprobs = z.gather(1, tokens[:, None]).double() - (mass.double() * 2.0**-40).log()
    return logprobs[:, 0].float().masked_fill(bad, math.nan)


def _weigh(z: Tensor) -> Tensor:
    """floor(e^z 2^40) as int64 for z <= 0: the float32 operations of csrc/cpu/sample.cpp, one by one."""
    z = z.clamp(min=-32.0)
    n = (z * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = (z - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(z, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    p = (p * r * r + r) + 1.0
    scaled = p * ((n.int() + (127 + 20)) << 23).view(torch.float32)
    high = scaled.int()
    rest = (scaled - high.float()) * 1048576.0
    return (high.long() << 20) + rest.long()


def _kept(x: Tensor, z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool [B, V]: the tokens that the filters leave."""
    order = x.sort(dim=1, descending=True, stable=True).indices
    kept = torch.ones_like(order, dtype=torch.bool)
    if top_k > 0:
        kept[:, top_k:] = False
    if top_p < 1:
        weights = _weigh(z.gather(1, order)) * kept
        wanted = (top_p * weights.sum(1, keepdim=True).double()).floor().clamp(min=1).long()
        kept &= weights.cumsum(1) - weights < wanted
    return torch.zeros_like(kept).scatter(1, order, kept) & (z >= _log(min_p))


def _scaled_draw(ids: Tensor, positions: Tensor, seed: int, mass: Tensor) -> Tensor:
    """floor(u * mass / 2^62) [B, 1] for the 62 random bits u of each row, in 31-bit limbs so that int64 holds every product."""
    counter = torch.stack([ids & _MASK, (ids >> 32) & _MASK, positions & _MASK, (positions >> 32) & _MASK], -1)
    drawn = philox4x32_ref(counter, (seed & _MASK, (seed >> 32) & _MASK))
    u_high, u_low = drawn[:, 0:1] >> 1, drawn[:, 1:2] >> 1
    limb = (1 << 31) - 1
    m_high, m_low = mass >> 31, mass & limb
    middle, other = u_high * m_low, u_low * m_high
    carry = (u_low * m_low >> 31) + (middle & limb) + (other & limb)
    return u_high * m_high + (middle >> 31) + (other >> 31) + (carry >> 31)


def _fake(logits: Tensor, ids: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape, dtype=torch.float32)


_op = define(
    "sample(Tensor logits, Tensor ids, Tensor positions, int seed, float temperature, int top_k, float top_p, float min_p) "
    "-> (Tensor, Tensor)",
    _sample,
    _fake,
)
_sampled_logprob_op = define(
    "sampled_logprob(Tensor logits, Tensor tokens, float temperature) -> Tensor",
    _sampled_logprob,
    lambda logits, tokens, temperature: tokens.new_empty(tokens.shape, dtype=torch.float32),
)
