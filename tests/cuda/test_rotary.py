"""The CUDA kernel of rotary, alone and on the way into the paged cache."""

from __future__ import annotations

import pytest
import torch
from checking import as_good_as, same_bits
from torch import Tensor

from pyrlhf.model import ModelConfig
from pyrlhf.ops import rotary, rotary_ref, write_kv
from pyrlhf.ops._core import CUDA_DTYPES
from pyrlhf.ops.write_kv import turn_and_store
from pyrlhf.rollout import PagedCache, PagedDecode

SIZES = [(1, 0), (2, 1), (13, 6), (16, 8), (64, 32), (80, 40), (128, 32), (24, 8), (300, 150)]  # D, frequencies


def inputs(tokens: int, size: int, half: int, dtype: torch.dtype, heads: tuple[int, int] = (5, 2)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + size)
    q, k = (torch.randn(tokens, h, size, generator=generator).to(dtype) for h in heads)
    positions = torch.randint(0, 131072, (tokens,), generator=generator)
    return [q, k, positions, 1.0 / 10000 ** (torch.arange(half) / max(half, 1))]


def turned(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """In x's dtype, by angles in float32."""
    angles = (positions.float()[:, None] * inv_freq).to(x.dtype)[:, None]
    half = len(inv_freq)
    first, second, rest = x.split((half, half, x.shape[2] - 2 * half), dim=2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=2)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(("size", "half"), SIZES)
def test_values_and_gradients(device: torch.device, poison: None, size: int, half: int, dtype: torch.dtype) -> None:
    for tokens, heads in ((17, (5, 2)), (1, (1, 1)), (3, (40, 8))):
        q, k, positions, inv_freq = inputs(tokens, size, half, dtype, heads)
        cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype) for x in (q, k)]
        found = []
        for way in ("ours", "peer", "truth"):
            leaves = [x.double() if way == "truth" else x.clone() for x in (q, k)]
            given = [x.to(device) if way == "ours" else x for x in leaves]
            given = [x.detach().requires_grad_() for x in given]
            if way == "ours":
                outs = rotary(*given, positions.to(device), inv_freq.to(device))
            elif way == "peer":
                outs = rotary_ref(*given, positions, inv_freq)
            else:
                outs = tuple(turned(x, positions, inv_freq) for x in given)
            sent = [c.to(o) for c, o in zip(cotangents, outs, strict=True)]
            grads = torch.autograd.grad(outs, given, sent)
            assert all(o.dtype == x.dtype for o, x in zip(outs, given, strict=True))
            found.append([x.detach().cpu() for x in (*outs, *grads)])
        as_good_as(*found)


@pytest.mark.parametrize("largest", [8_192, 131_072, 2**24, 2**31, 2**45, 2**62])
def test_angles_are_as_good_as_torchs_at_any_position(device: torch.device, largest: int) -> None:
    """cos and sin of float32 angles are the turned unit vectors."""
    positions = torch.randint(-largest, largest, (200,), generator=torch.Generator().manual_seed(1))
    inv_freq = 1.0 / 10000 ** (torch.arange(40) / 40)
    unit = torch.zeros(200, 1, 80)
    unit[..., :40] = 1
    found = rotary(unit.to(device), unit.to(device), positions.to(device), inv_freq.to(device))[0].cpu()[:, 0]
    angles = positions.float()[:, None] * inv_freq
    exact, plain = (torch.cat((a.cos(), a.sin()), -1) for a in (angles.double(), angles))
    as_good_as([found], [plain], [exact], tiny=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_agrees(device: torch.device, dtype: torch.dtype) -> None:
    q, k, positions, inv_freq = inputs(19, 64, 32, dtype)
    found = rotary(*(x.to(device) for x in (q, k, positions, inv_freq)))
    for a, b in zip(found, rotary_ref(q, k, positions, inv_freq), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_bits_depend_neither_on_other_rows_nor_on_the_layout(device: torch.device, dtype: torch.dtype) -> None:
    q, k, positions, inv_freq = (x.to(device) for x in inputs(50, 32, 8, dtype))
    every = rotary(q, k, positions, inv_freq)
    for rows in (slice(0, 1), slice(13, 50)):
        some = rotary(q[rows], k[rows], positions[rows], inv_freq)
        assert all(torch.equal(a, b[rows]) for a, b in zip(some, every, strict=True))
    fused = torch.cat((q, k, torch.full_like(k, torch.nan)), 1)
    odd = torch.cat((q, q.new_full((50, 5, 1), torch.nan)), 2)[..., :32]
    wide = torch.full((50, 5, 64), torch.nan, dtype=dtype, device=device)
    wide[..., 1::2] = q
    for view in (fused[:, :5], odd, wide[..., 1::2], q.transpose(0, 1).contiguous().transpose(0, 1)):
        again = rotary(view, fused[:, 5:7], positions, inv_freq)
        assert all(torch.equal(a, b) for a, b in zip(again, every, strict=True))


def test_nothing_to_turn(device: torch.device) -> None:
    for tokens, heads in ((0, (5, 2)), (3, (0, 0)), (3, (0, 2))):
        q, k, positions, inv_freq = (x.to(device) for x in inputs(tokens, 16, 8, torch.float32, heads))
        assert [x.shape for x in rotary(q, k, positions, inv_freq)] == [q.shape, k.shape]


def stored(device: torch.device, size: int, half: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """q, k, v as views of one matrix, positions and frequencies; slots; caches of NaN."""
    q, k, positions, inv_freq = inputs(11, size, half, dtype)
    q, k, v = torch.cat((q, k, k.flip(0)), 1).to(device).split((5, 2, 2), dim=1)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(2))[:11].to(device)
    caches = [torch.full((5, 4, 2, size), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    return [q, k, v, positions.to(device), inv_freq.to(device)], slots, caches


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(("size", "half"), SIZES)
def test_turning_into_the_cache_is_rotary_then_write_kv(
    device: torch.device, poison: None, size: int, half: int, dtype: torch.dtype
) -> None:
    (q, k, v, positions, inv_freq), slots, caches = stored(device, size, half, dtype)
    v[0, 0, 0], v[1, 1, 0] = -0.0, torch.nan
    expected_caches = [x.clone() for x in caches]
    expected, turned_k = rotary(q, k, positions, inv_freq)
    write_kv(turned_k, v, *expected_caches, slots)
    out = turn_and_store(q, k, v, positions, inv_freq, *caches, slots)
    assert same_bits(out, expected)
    assert all(same_bits(a, b) for a, b in zip(caches, expected_caches, strict=True))


@pytest.mark.parametrize("bad", [-1, 20, 2**63 - 1, -(2**63)])
def test_a_slot_out_of_range_is_flagged_and_skipped(device: torch.device, raised, bad: int) -> None:
    (q, k, v, positions, inv_freq), slots, caches = stored(device, 16, 8, torch.bfloat16)
    skipped = int(slots[4])
    slots[4] = bad
    out = turn_and_store(q, k, v, positions, inv_freq, *caches, slots)
    assert torch.equal(out, rotary(q, k, positions, inv_freq)[0])
    assert "write_kv: slots must be" in raised()
    assert all(c.view(20, 2, 16)[skipped].isnan().all() for c in caches)
    assert all(c.isfinite().sum() == 10 * 2 * 16 for c in caches)


@pytest.mark.parametrize("window", [None, 3])
def test_a_decode_step_turns_on_the_way_into_the_cache(device: torch.device, window: int | None) -> None:
    config = ModelConfig(vocab_size=8, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2)
    table = torch.tensor([[5, 2], [7, 0]], dtype=torch.int32, device=device)
    inv_freq = (1.0 / 100 ** (torch.arange(8) / 8)).to(device)
    one, other = (PagedCache(config, 8, 4, torch.float32, device) for _ in range(2))
    for position in range(6):
        at = torch.tensor([position, position], device=device)
        q, k, v = (
            torch.randn(2, heads, 16, generator=torch.Generator().manual_seed(position)).to(device)
            for heads in (4, 2, 2)
        )
        found = PagedDecode(one, table, at).turned(0, q, k, v, inv_freq, window=window, scale=None)
        q, k = rotary(q, k, at, inv_freq)
        expected = PagedDecode(other, table, at)(0, q, k, v, causal=True, window=window, scale=None)
        assert torch.equal(found, expected)


def test_torch_library(device: torch.device) -> None:
    q, k, positions, inv_freq = (x.to(device) for x in inputs(7, 16, 8, torch.float16))
    torch.library.opcheck(torch.ops.pyrlhf.rotary.default, (q.requires_grad_(), k, positions, inv_freq, False))
    compiled = torch.compile(lambda x: rotary(x * 2, k, positions, inv_freq)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), rotary(q * 2, k, positions, inv_freq)[0])
