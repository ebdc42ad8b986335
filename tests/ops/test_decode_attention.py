"""decode_attention over a paged cache whose unused places hold NaN."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf.ops import attention, decode_attention, decode_attention_ref, write_kv

module = sys.modules["pyrlhf.ops.decode_attention"]
LENGTHS = [3, 0, 1, 64, 65, 200, 17]


class Case:
    """Sequences of given lengths, their keys and values also laid out one by one, and a cache with NaN everywhere else."""

    def __init__(
        self,
        lengths: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 8,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        self.q = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype)
        self.k, self.v = (
            [torch.randn(n, kv_heads, dim, generator=generator).to(dtype) for n in lengths] for _ in range(2)
        )
        pages = sum(-(-n // page_size) for n in lengths) + 2
        self.caches = [torch.full((pages, page_size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
        free = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
        width = max(-(-n // page_size) for n in [*lengths, 1]) + 1
        self.table = torch.full((len(lengths), width), -7, dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        for row, n in enumerate(lengths):
            for column in range(-(-n // page_size)):
                self.table[row, column] = free.pop()
            place = torch.arange(n)
            slots = self.table[row].long()[place // page_size] * page_size + place % page_size
            write_kv(self.k[row], self.v[row], *self.caches, slots)

    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, *self.caches, self.table, self.lengths

    def expected(self, dtype: torch.dtype, window: int | None = None, scale: float | None = None) -> Tensor:
        """torch's SDPA, one row at a time, over the keys that the row sees."""
        out = torch.zeros(self.q.shape, dtype=dtype)
        for row, n in enumerate(self.lengths.tolist()):
            first = 0 if window is None else max(0, n - window)
            if n > first:
                q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (self.q[row][None], self.k[row], self.v[row]))
                seen = (q, k[:, :, first:], v[:, :, first:])
                out[row] = scaled_dot_product_attention(*seen, scale=scale, enable_gqa=True)[0, :, 0]
        return out


@pytest.mark.parametrize("function", [decode_attention, decode_attention_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 0, 1, 5, 64, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 1, 33), (2, 2, 128)])
def test_as_good_as_torch(heads, kv_heads, dim, window, dtype, function, assert_as_good_as):
    case = Case(LENGTHS, heads, kv_heads, dim, dtype=dtype)
    out = function(*case.arguments(), window=window)
    assert out.dtype == dtype
    assert_as_good_as([out], [case.expected(dtype, window)], [case.expected(torch.float64, window)])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), max_size=9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 8]),
    page_size=st.sampled_from([1, 3, 16, 64]),
    window=st.sampled_from([None, 1, 7, 66]),
)
def test_any_batch(lengths, kv_heads, group, dim, page_size, window):
    case = Case(lengths, kv_heads * group, kv_heads, dim, page_size)
    out = decode_attention(*case.arguments(), window=window, scale=0.3)
    torch.testing.assert_close(out.double(), case.expected(torch.float64, window, 0.3), rtol=1e-5, atol=1e-5)


def test_equals_the_last_row_of_attention():
    case = Case([30, 7])
    q = torch.randn(37, 4, 8)
    q[29], q[36] = case.q
    cu = torch.tensor([0, 30, 37], dtype=torch.int32)
    for window in (None, 4):
        out = attention(q, torch.cat(case.k), torch.cat(case.v), cu, window=window)
        torch.testing.assert_close(decode_attention(*case.arguments(), window=window), out[[29, 36]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 33), (3, 3, 1), (4, 2, 16), (5, 1, 13), (4, 4, 64), (2, 2, 8)]
)
def test_bits_do_not_depend_on_other_rows_or_on_pages(heads, kv_heads, dim, dtype):
    lengths = [*LENGTHS, 66, 70, 128, 129, 2]
    case = Case(lengths, heads, kv_heads, dim, dtype=dtype)
    q, k_cache, v_cache, table, lens = case.arguments()
    for window in (None, 70):
        every = decode_attention(q, k_cache, v_cache, table, lens, window=window)
        for rows in ([0], [5], [4, 7], [11, 10, 9, 8, 7, 6, 5, 4]):
            some = decode_attention(q[rows], k_cache, v_cache, table[rows], lens[rows], window=window)
            assert torch.equal(some, every[rows])
        for page_size, seed in ((16, 1), (8, 2)):
            elsewhere = Case(lengths, heads, kv_heads, dim, page_size, dtype, seed)
            assert torch.equal(decode_attention(*elsewhere.arguments(), window=window), every)


def test_same_bits_on_repeat():
    case = Case(LENGTHS)
    first = decode_attention(*case.arguments())
    assert all(torch.equal(decode_attention(*case.arguments()), first) for _ in range(1000))


def test_a_plan_serves_every_layer(monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    case = Case(LENGTHS, dim=16)
    q, k_cache, v_cache, table, lens = case.arguments()
    for window in (None, 20):
        plan = module.plan_decode(table, lens, 16, 2, window=window)
        for layer in (1.0, 2.0):
            expected = decode_attention(q, k_cache * layer, v_cache * layer, table, lens, window=window)
            assert torch.equal(module.attend_planned(q, k_cache * layer, v_cache * layer, plan, 0.25), expected)


def test_torch_library():
    case = Case([3, 0, 20])
    torch.library.opcheck(torch.ops.pyrlhf.decode_attention.default, (*case.arguments(), None, 0.3))
    torch.library.opcheck(torch.ops.pyrlhf.decode_attention.default, (*case.arguments(), 5, 0.3))
    q, *rest = case.arguments()
    compiled = torch.compile(lambda x: decode_attention(x * 2, *rest), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), decode_attention(q * 2, *rest))


def test_non_contiguous_queries():
    case = Case([3, 0, 20])
    q, *rest = case.arguments()
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(decode_attention(swapped, *rest), decode_attention(q, *rest))


@pytest.mark.parametrize("function", [decode_attention, decode_attention_ref])
def test_wrong_calls_name_the_argument(function):
    case = Case([3, 0, 20])
    q, k_cache, v_cache, table, lens = case.arguments()
    broken = table.clone()
    broken[2, 1] = 99
    names = ("q", "k_cache", "v_cache", "page_table", "seq_lens")
    for error, message, change in (
        (TypeError, "q must be", {"q": None}),
        (ValueError, "q must have shape", {"q": q[0]}),
        (TypeError, "k_cache must be float32", {"k_cache": k_cache.bfloat16()}),
        (ValueError, "k_cache must have shape", {"k_cache": k_cache[..., :7]}),
        (ValueError, "k_cache must be contiguous", {"k_cache": k_cache[:, ::2]}),
        (ValueError, "v_cache must have shape", {"v_cache": v_cache[1:]}),
        (ValueError, "multiple of k_cache's", {"q": q[:, :3]}),
        (TypeError, "page_table must be int32", {"page_table": table.long()}),
        (ValueError, "page_table must have shape", {"page_table": table[:2]}),
        (ValueError, r"page_table\[2, 1\] must be a page", {"page_table": broken}),
        (ValueError, r"page_table\[1, 0\] must be a page", {"seq_lens": lens + 1}),
        (TypeError, "seq_lens must be int32", {"seq_lens": lens.long()}),
        (ValueError, "seq_lens must have shape", {"seq_lens": lens[:2]}),
        (ValueError, "seq_lens must be in", {"seq_lens": lens + 100}),
        (ValueError, "seq_lens must be in", {"seq_lens": lens - 1}),
        (ValueError, "window must be", {"window": -1}),
        (TypeError, "window must be", {"window": 1.5}),
        (TypeError, "scale must be a number", {"scale": "x"}),
    ):
        with pytest.raises(error, match=message):
            function(**{**dict(zip(names, case.arguments(), strict=True)), **change})
