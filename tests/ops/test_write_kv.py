"""write_kv: what lands where, and that a wrong call writes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import write_kv, write_kv_ref


def inputs(tokens: int, pages: int = 5, page_size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(tokens, 2, 3, generator=generator).to(dtype) for _ in range(2))
    caches = (torch.full((pages, page_size, 2, 3), torch.nan, dtype=dtype) for _ in range(2))
    return k, v, *caches, torch.randperm(pages * page_size, generator=generator)[:tokens]


@pytest.mark.parametrize("function", [write_kv, write_kv_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), pages=st.integers(5, 9), page_size=st.sampled_from([4, 5, 16]))
def test_each_row_lands_in_its_slot_and_nowhere_else(function, dtype, tokens, pages, page_size):
    k, v, k_cache, v_cache, slots = inputs(tokens, pages, page_size, dtype)
    assert function(k, v, k_cache, v_cache, slots) is None
    for given_rows, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.reshape(-1, 2, 3)
        assert torch.equal(flat[slots], given_rows)
        rest = torch.ones(pages * page_size, dtype=torch.bool)
        rest[slots] = False
        assert flat[rest].isnan().all()


def test_non_contiguous_rows():
    k, v, k_cache, v_cache, slots = inputs(6)
    fused = torch.stack((k, v), 1)
    write_kv(*fused.unbind(1), k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(-1, 2, 3)[slots], k)
    assert torch.equal(v_cache.view(-1, 2, 3)[slots], v)


def test_torch_library():
    k, v, k_cache, v_cache, slots = inputs(6)
    k_cache, v_cache = k_cache.zero_(), v_cache.zero_()
    torch.library.opcheck(torch.ops.pyrlhf.write_kv.default, (k, v, k_cache, v_cache, slots))

    def f(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Tensor:
        write_kv(k * 2, v, k_cache, v_cache, slots)
        return k_cache.sum()

    total = torch.compile(f, fullgraph=True, backend="aot_eager")(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(-1, 2, 3)[slots], k * 2)
    torch.testing.assert_close(total, (k * 2).sum())


@pytest.mark.parametrize("function", [write_kv, write_kv_ref])
def test_wrong_calls_name_the_argument_and_write_nothing(function):
    k, v, k_cache, v_cache, _ = inputs(3)
    slots = torch.tensor([0, 7, 19])
    for error, message, change in (
        (TypeError, "k must be", {"k": 1}),
        (TypeError, "k must be float32", {"k": k.int()}),
        (ValueError, "k must have shape", {"k": k[0]}),
        (ValueError, "v must have shape", {"v": v[:2]}),
        (TypeError, "v must be float32", {"v": v.bfloat16()}),
        (TypeError, "k_cache must be float32", {"k_cache": k_cache.bfloat16()}),
        (ValueError, "k_cache must have shape", {"k_cache": k_cache[:, :, :1]}),
        (ValueError, "k_cache must be contiguous", {"k_cache": k_cache.transpose(0, 1).contiguous().transpose(0, 1)}),
        (ValueError, "v_cache must have shape", {"v_cache": v_cache[:4]}),
        (TypeError, "slots must be int64", {"slots": slots.int()}),
        (ValueError, "slots must have shape", {"slots": slots[:2]}),
        (ValueError, r"slots must be in 0\.\.19.*found 20", {"slots": torch.tensor([0, 7, 20])}),
        (ValueError, r"slots must be in 0\.\.19.*found -1", {"slots": torch.tensor([0, 7, -1])}),
        (ValueError, "slots must all differ, found 7", {"slots": torch.tensor([7, 0, 7])}),
    ):
        given_arguments = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots, **change}
        with pytest.raises(error, match=message):
            function(**given_arguments)
        assert k_cache.isnan().all()
        assert v_cache.isnan().all()
