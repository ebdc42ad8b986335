"""The CUDA kernel of write_kv: what lands where, bit by bit, and what is skipped."""

from __future__ import annotations

import pytest
import torch
from checking import assert_landed, same_bits
from torch import Tensor

from pyrlhf.ops import write_kv
from pyrlhf.ops._core import CUDA_DTYPES


def inputs(
    device: torch.device, tokens: int, dtype: torch.dtype, heads: int, dim: int, pages: int = 9, page_size: int = 4
) -> list[Tensor]:
    """k, v, caches of NaN and slots in no order."""
    generator = torch.Generator().manual_seed(tokens + dim)
    k, v = (torch.randn(tokens, heads, dim, generator=generator).to(dtype) for _ in range(2))
    caches = [torch.full((pages, page_size, heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    return [x.to(device) for x in (k, v, *caches, slots)]


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 15, 16, 33, 64, 80, 128, 256])
def test_each_row_lands_in_its_slot_and_nowhere_else(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    for tokens, heads in ((0, 2), (1, 1), (1, 7), (7, 3), (23, 2)):
        arguments = inputs(device, tokens, dtype, heads, dim)
        write_kv(*arguments)
        assert_landed(*arguments)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_every_bit_pattern_is_kept(device: torch.device, dtype: torch.dtype) -> None:
    patterns = torch.arange(0, 1 << 16, 7, dtype=torch.int32)[:8192]
    bits = patterns << 16 | patterns if dtype == torch.float32 else patterns.to(torch.int16)
    k = bits.view(dtype).view(64, 2, 64).to(device)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)
    caches = [torch.zeros(4, 16, 2, 64, dtype=dtype, device=device) for _ in range(2)]
    write_kv(k, k.flip(0), *caches, slots)
    assert same_bits(caches[0].view(64, 2, 64)[slots], k)
    assert same_bits(caches[1].view(64, 2, 64)[slots], k.flip(0))


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_any_view_of_k_v_and_slots(device: torch.device, dtype: torch.dtype) -> None:
    for dim in (32, 33):
        k, v, *caches, slots = inputs(device, 6, dtype, 3, dim)
        qkv = torch.full((6, 10, dim), torch.nan, dtype=dtype, device=device)
        qkv[:, 4:7], qkv[:, 7:] = k, v
        wide = torch.full((6, 3, 2 * dim), torch.nan, dtype=dtype, device=device)
        wide[..., 1::2] = v
        shifted = torch.cat((k.new_zeros(1), k.flatten()))[1:].view_as(k)
        views = (
            (qkv[:, 4:7], qkv[:, 7:]),
            (k.transpose(0, 1).contiguous().transpose(0, 1), v.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
            (shifted, wide[..., 1::2]),
        )
        for one, two in views:
            for order in (slots, torch.stack((slots, slots - 99), 1)[:, 0]):
                filled = [torch.full_like(cache, torch.nan) for cache in caches]
                write_kv(one, two, *filled, order)
                assert_landed(k, v, *filled, slots)
        same = [torch.full_like(cache, torch.nan) for cache in caches]
        write_kv(k[:1].expand(6, 3, dim), v[:, :1].expand(6, 3, dim), *same, slots)
        assert_landed(k[:1].repeat(6, 1, 1), v[:, :1].repeat(1, 3, 1), *same, slots)


@pytest.mark.parametrize("bad", [-1, 36, 2**63 - 1, -(2**63)])
def test_a_slot_out_of_range_is_flagged_and_skipped(device: torch.device, raised, bad: int) -> None:
    for dim in (3, 8):
        k, v, *caches, slots = inputs(device, 7, torch.float32, 2, dim)
        broken = slots.clone()
        broken[5] = bad
        write_kv(k, v, *caches, broken)
        assert "write_kv: slots must be" in raised()
        kept = [0, 1, 2, 3, 4, 6]
        assert_landed(k[kept], v[kept], *caches, slots[kept])


def test_wrong_slots_are_found_before_the_kernel_on_request(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    k, v, *caches, slots = inputs(device, 3, torch.float32, 2, 8)
    with pytest.raises(ValueError, match="slots must be in"):
        write_kv(k, v, *caches, slots + 36)
    with pytest.raises(ValueError, match="slots must all differ"):
        write_kv(k, v, *caches, slots * 0)
    assert all(c.isnan().all() for c in caches)


def test_torch_library(device: torch.device) -> None:
    k, v, *caches, slots = inputs(device, 6, torch.bfloat16, 2, 8)
    caches = [c.zero_() for c in caches]
    torch.library.opcheck(torch.ops.pyrlhf.write_kv.default, (k, v, *caches, slots))
