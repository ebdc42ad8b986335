"""write_kv: what lands where, bit by bit, and that a wrong call writes nothing."""

from __future__ import annotations

import pytest
import torch
from checking import assert_landed, running_on, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import write_kv, write_kv_ref
from pyrlhf.ops._core import CORE_DTYPES, core


def inputs(
    tokens: int,
    pages: int = 5,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    dim: int = 3,
) -> tuple[Tensor, ...]:
    """k, v, caches of NaN and slots in no order."""
    generator = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(tokens, heads, dim, generator=generator).to(dtype) for _ in range(2))
    caches = (torch.full((pages, page_size, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    return k, v, *caches, torch.randperm(pages * page_size, generator=generator)[:tokens]


@pytest.mark.parametrize("function", [write_kv, write_kv_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), pages=st.integers(5, 9), page_size=st.sampled_from([4, 5, 16]))
def test_each_row_lands_in_its_slot_and_nowhere_else(function, dtype, tokens, pages, page_size):
    arguments = inputs(tokens, pages, page_size, dtype)
    assert function(*arguments) is None
    assert_landed(*arguments)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 15, 16, 17, 31, 33, 64, 127, 128, 256])
def test_every_row_size(isa, dim, dtype):
    for tokens, heads in ((0, 2), (1, 1), (1, 7), (7, 3), (20, 2)):
        arguments = inputs(tokens, 5, 4, dtype, heads, dim)
        write_kv(*arguments)
        assert_landed(*arguments)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(0, 60),
    free=st.integers(0, 30),
    page_size=st.sampled_from([1, 3, 16, 64]),
    heads=st.integers(1, 5),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(CORE_DTYPES),
    fused=st.booleans(),
    isa=st.sampled_from(core().isas_available()),
)
def test_any_shape_on_any_instruction_set(tokens, free, page_size, heads, dim, dtype, fused, isa):
    k, v, *rest = inputs(tokens, -(-(tokens + free) // page_size), page_size, dtype, heads, dim)
    rows = torch.cat((k, v), 1).split(heads, dim=1) if fused else (k, v)
    with running_on(isa):
        write_kv(*rows, *rest)
    assert_landed(k, v, *rest)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_every_bit_pattern_is_kept(isa, dtype):
    """All of bfloat16's, among them NaNs of every payload, -0 and subnormal numbers; as many of float32's."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    shorts = patterns.to(torch.int16)
    k = (shorts if dtype == torch.bfloat16 else patterns << 16 | patterns).view(dtype).view(512, 2, 64)
    v = k.flip(0)
    slots = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    k_cache, v_cache = (torch.zeros(32, 16, 2, 64, dtype=dtype) for _ in range(2))
    write_kv(k, v, k_cache, v_cache, slots)
    assert same_bits(k_cache.view(512, 2, 64)[slots], k)
    assert same_bits(v_cache.view(512, 2, 64)[slots], v)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_many_rows_on_any_number_of_threads(isa, dtype, same_bits_for_any_threads):
    k, v, *caches, slots = inputs(1023, 130, 8, dtype, 2, 67)
    assert k.numel() * k.element_size() >= 1 << 17, "below, one thread does it all"

    def run() -> list[Tensor]:
        filled = [torch.zeros_like(cache) for cache in caches]
        write_kv(k, v, *filled, slots)
        return filled

    same_bits_for_any_threads(run, repeats=5)
    write_kv(k, v, *caches, slots)
    assert_landed(k, v, *caches, slots)


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_any_view_of_k_v_and_slots(isa, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    k, v, *caches, slots = inputs(6, heads=3, dim=33)
    qkv = torch.full((6, 10, 33), torch.nan)
    qkv[:, 4:7], qkv[:, 7:] = k, v
    wide = torch.full((6, 3, 66), torch.nan)
    wide[..., 1::2] = v
    views = (
        torch.stack((k, v), 1).unbind(1),
        (qkv[:, 4:7], qkv[:, 7:]),
        (k.transpose(0, 1).contiguous().transpose(0, 1), v),
        (k, v.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
        (k, wide[..., 1::2]),
    )
    for one, two in views:
        for order in (slots, torch.stack((slots, slots - 99), 1)[:, 0]):
            filled = [torch.full_like(cache, torch.nan) for cache in caches]
            write_kv(one, two, *filled, order)
            assert_landed(k, v, *filled, slots)
    one_row = torch.full_like(caches[0], torch.nan), torch.full_like(caches[1], torch.nan)
    write_kv(k[:1].expand(6, 3, 33), v[:, :1].expand(6, 3, 33), *one_row, slots)
    assert_landed(k[:1].repeat(6, 1, 1), v[:, :1].repeat(1, 3, 1), *one_row, slots)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_the_core_and_plain_torch_agree(isa, dtype, monkeypatch):
    for tokens, heads, dim in ((1, 1, 1), (20, 3, 33), (17, 2, 128)):
        k, v, *caches, slots = inputs(tokens, 5, 4, dtype, heads, dim)
        found = {}
        for backend in ("auto", "ref"):
            monkeypatch.setenv("PYRLHF_BACKEND", backend)
            found[backend] = [cache.clone() for cache in caches]
            write_kv(k, v, *found[backend], slots)
        assert all(same_bits(a, b) for a, b in zip(found["auto"], found["ref"], strict=True))


def test_rows_written_before_stay():
    k, v, k_cache, v_cache, slots = inputs(20)
    for token in torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist():
        row = slice(token, token + 1)
        write_kv(k[row], v[row], k_cache, v_cache, slots[row])
    assert_landed(k, v, k_cache, v_cache, slots)
    write_kv(v[:3], k[:3], k_cache, v_cache, slots[:3])  # and may be replaced
    assert_landed(torch.cat((v[:3], k[3:])), torch.cat((k[:3], v[3:])), k_cache, v_cache, slots)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_torch_library(dtype):
    k, v, k_cache, v_cache, slots = inputs(6, dtype=dtype)
    k_cache, v_cache = k_cache.zero_(), v_cache.zero_()
    torch.library.opcheck(torch.ops.pyrlhf.write_kv.default, (k, v, k_cache, v_cache, slots))

    def f(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Tensor:
        write_kv(k * 2, v, k_cache, v_cache, slots)
        return k_cache.float().sum()

    total = torch.compile(f, fullgraph=True, backend="aot_eager")(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(-1, 2, 3)[slots], k * 2)
    torch.testing.assert_close(total, (k * 2).float().sum())


@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("function", [write_kv, write_kv_ref])
def test_wrong_calls_name_the_argument_and_write_nothing(function, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    k, v, k_cache, v_cache, _ = inputs(3)
    slots = torch.tensor([0, 7, 19])
    for error, message, change in (
        (TypeError, "k must be a torch.Tensor, found int", {"k": 1}),
        (TypeError, "k must be float32 or bfloat16.*found int32", {"k": k.int()}),
        (ValueError, r"k must have shape \[any, any, any\], found \[2, 3\]", {"k": k[0]}),
        (ValueError, r"v must have shape \[3, 2, 3\], found \[2, 2, 3\]", {"v": v[:2]}),
        (TypeError, "v must be float32, found bfloat16", {"v": v.bfloat16()}),
        (ValueError, "v must be on cpu", {"v": v.to("meta")}),
        (TypeError, "k_cache must be float32, found bfloat16", {"k_cache": k_cache.bfloat16()}),
        (ValueError, "k_cache must have shape", {"k_cache": k_cache[:, :, :1]}),
        (ValueError, "k_cache must be contiguous", {"k_cache": k_cache.transpose(0, 1).contiguous().transpose(0, 1)}),
        (ValueError, "v_cache must have shape", {"v_cache": v_cache[:4]}),
        (ValueError, "v_cache must be contiguous", {"v_cache": v_cache.transpose(0, 1).contiguous().transpose(0, 1)}),
        (TypeError, "slots must be int64, found int32", {"slots": slots.int()}),
        (TypeError, "slots must be a torch.Tensor, found list", {"slots": slots.tolist()}),
        (ValueError, r"slots must have shape \[3\], found \[2\]", {"slots": slots[:2]}),
        (ValueError, r"slots must be in 0\.\.19.*found 20", {"slots": torch.tensor([0, 7, 20])}),
        (ValueError, r"slots must be in 0\.\.19.*found -1", {"slots": torch.tensor([0, 7, -1])}),
        (
            ValueError,
            r"slots must be in 0\.\.19.*found 9223372036854775807",
            {"slots": torch.tensor([0, 7, 2**63 - 1])},
        ),
        (
            ValueError,
            r"slots must be in 0\.\.19.*found -9223372036854775808",
            {"slots": torch.tensor([-(2**63), 7, 1])},
        ),
        (ValueError, "slots must all differ, found 7", {"slots": torch.tensor([7, 0, 7])}),
        (ValueError, "slots must be in", {"k_cache": k_cache[:0], "v_cache": v_cache[:0]}),
    ):
        given_arguments = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, **change}
        with pytest.raises(error, match=message):
            function(**given_arguments)
        assert k_cache.isnan().all()
        assert v_cache.isnan().all()
