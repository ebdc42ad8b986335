"""decode_attention over a paged cache whose unused places hold NaN: values, independence of rows and of pages, errors."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from checking import equal, lines_of, offsets, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf.ops import attention, decode_attention, decode_attention_ref, write_kv
from pyrlhf.ops._core import CORE_DTYPES, core

module = sys.modules["pyrlhf.ops.decode_attention"]
LENGTHS = [3, 0, 1, 64, 65, 200, 17]
EDGES = (
    0,
    1,
    15,
    16,
    17,
    63,
    64,
    65,
    511,
    512,
    513,
    1025,
    1540,
)  # of pages of 16, the core's blocks of 64 and chunks of 512
HEADS = [(2, 2), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2)]  # groups of 1, 2, 4, 8, 7 and 7


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
            used = -(-n // page_size)
            self.table[row, :used] = torch.tensor([free.pop() for _ in range(used)])
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


@functools.cache
def made(lengths: tuple[int, ...], *sizes: int | torch.dtype) -> Case:
    """One for all instruction sets, which leave it as it is."""
    return Case(list(lengths), *sizes)


@functools.cache
def answers(case: Case, window: int | None = None, scale: float | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """torch's in the dtype of the case, and the truth."""
    return [case.expected(case.q.dtype, window, scale)], [case.expected(torch.float64, window, scale)]


@pytest.mark.parametrize("function", [decode_attention, decode_attention_ref])
@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("window", [None, 0, 1, 5, 64, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 1, 33), (2, 2, 128)])
def test_as_good_as_torch(heads, kv_heads, dim, window, dtype, function, assert_as_good_as):
    case = Case(LENGTHS, heads, kv_heads, dim, dtype=dtype)
    out = function(*case.arguments(), window=window)
    assert out.dtype == dtype
    assert_as_good_as([out], [case.expected(dtype, window)], [case.expected(torch.float64, window)])


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_every_instruction_set(isa, poison, heads, kv_heads, dtype, assert_as_good_as):
    for dim in (8, 33):
        case = made(EDGES, heads, kv_heads, dim, 16, dtype)
        for window in (None, 70):
            out = decode_attention(*case.arguments(), window=window)
            assert_as_good_as([out], *answers(case, window))


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 4, 7, 8, 16, 31, 80, 127, 128, 129, 255, 256])
def test_every_head_size(isa, poison, dim, dtype, assert_as_good_as):
    for heads, kv_heads in ((3, 1), (5, 1), (2, 2), (8, 4)):  # four of 4 channels fill a vector
        case = made((16, 0, 1, 83), heads, kv_heads, dim, 16, dtype)
        assert_as_good_as([decode_attention(*case.arguments())], *answers(case))


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("window", [0, 1, 15, 16, 64, 512, 513, 1000, 1540, 2**40])
def test_windows_at_every_edge(isa, poison, window, dtype, assert_as_good_as):
    case = made(EDGES, 4, 2, 8, 16, dtype)
    assert_as_good_as([decode_attention(*case.arguments(), window=window)], *answers(case, window))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 150), st.integers(500, 1100)), max_size=9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([1, 5, 8, 17, 64]),
    page_size=st.sampled_from([1, 3, 16, 64, 100]),
    window=st.sampled_from([None, 1, 7, 66, 600]),
    dtype=st.sampled_from(CORE_DTYPES),
    isa=st.sampled_from(core().isas_available()),
)
def test_any_batch(lengths, kv_heads, group, dim, page_size, window, dtype, isa):
    case = Case(lengths, kv_heads * group, kv_heads, dim, page_size, dtype)
    with running_on(isa):
        out = decode_attention(*case.arguments(), window=window, scale=0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    truth = case.expected(torch.float64, window, 0.3)
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5, 30.0, 1e6])
def test_scores_of_any_size(isa, scale, assert_as_good_as):
    """Up to where one key takes everything; the highest score comes anywhere."""
    case = made(EDGES, 4, 2, 16)
    out = decode_attention(*case.arguments(), scale=scale)
    assert out.isfinite().all()
    assert_as_good_as([out], *answers(case, scale=scale))


def test_equals_the_last_row_of_attention():
    case = Case([30, 7])
    q = torch.randn(37, 4, 8)
    q[29], q[36] = case.q
    for window in (None, 4):
        out = attention(q, torch.cat(case.k), torch.cat(case.v), offsets([30, 7]), window=window)
        torch.testing.assert_close(decode_attention(*case.arguments(), window=window), out[[29, 36]])


@pytest.mark.parametrize("dtype", CORE_DTYPES)
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


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (7, 1, 33), (3, 3, 5), (8, 4, 8)])
def test_a_rows_bits_are_its_own(isa, heads, kv_heads, dim, dtype):
    """Alone, among others, in another order, and wherever its pages lie: few rows share out their heads, many do not."""
    case = made(EDGES, heads, kv_heads, dim, 16, dtype)
    q, k_cache, v_cache, table, lens = case.arguments()
    for window in (None, 600):
        every = decode_attention(q, k_cache, v_cache, table, lens, window=window)
        backwards = list(range(len(EDGES)))[::-1]
        for rows in (*([i] for i in range(len(EDGES))), [12, 3], backwards, backwards * 3):
            some = decode_attention(q[rows], k_cache, v_cache, table[rows], lens[rows], window=window)
            assert torch.equal(some, every[rows])
        for page_size, seed in ((16, 1), (8, 2), (100, 3), (1, 4)):
            elsewhere = made(EDGES, heads, kv_heads, dim, page_size, dtype, seed)
            assert torch.equal(decode_attention(*elsewhere.arguments(), window=window), every)


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_sequences_may_share_pages(isa, dtype):
    """Rows of one prompt (40 tokens, 32 of them in two shared pages) against the same rows with pages of their own."""
    case = Case([40, 33, 47, 32], dtype=dtype)
    q, k_cache, v_cache, table, lens = case.arguments()
    for row in range(1, 4):
        for cache in (k_cache, v_cache):
            cache[table[row, :2].long()] = cache[table[0, :2].long()]
    apart = decode_attention(q, k_cache, v_cache, table, lens)
    shared = table.clone()
    shared[:, :2] = table[0, :2]
    for cache in (k_cache, v_cache):
        cache[table[1:, :2].long()] = torch.nan
    assert torch.equal(decode_attention(q, k_cache, v_cache, shared, lens), apart)
    assert apart.isfinite().all()


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("dim", [8, 64])  # key heads side by side in a vector, and each in its own
def test_a_nan_stays_in_its_row_and_its_heads(isa, dim, which, dtype):
    lengths = [600, 70, 0, 129]
    case = Case(lengths, 8, 2, dim, dtype=dtype)
    given_arguments = list(case.arguments())
    clean = [decode_attention(*given_arguments, window=window) for window in (None, 40)]
    if which == 0:
        given_arguments[0][0, 5] = torch.nan
    else:  # token 75 of row 0, key head 1: its fifth page
        given_arguments[which][int(case.table[0, 4]), 11, 1] = torch.nan
    spoilt = [decode_attention(*given_arguments, window=window) for window in (None, 40)]
    hit = torch.zeros(4, 8, dtype=torch.bool)
    hit[0, 5 if which == 0 else slice(4, 8)] = True
    assert spoilt[0][hit].isnan().all()
    assert torch.equal(spoilt[0][~hit], clean[0][~hit])
    if which == 0:
        assert spoilt[1][hit].isnan().all()
        assert torch.equal(spoilt[1][~hit], clean[1][~hit])
    else:  # the window ends before it
        assert torch.equal(spoilt[1], clean[1])


@pytest.mark.parametrize("dtype", CORE_DTYPES)
@pytest.mark.parametrize("lengths", [[1540], [700, 0, 1025], EDGES], ids=["one row", "few rows", "many rows"])
def test_bits_do_not_depend_on_threads(isa, lengths, dtype, same_bits_for_any_threads):
    for dim in (8, 64):
        case = made(tuple(lengths), 8, 2, dim, 16, dtype)
        assert sum(lengths) * 8 * dim >= 65536, "below, one thread does it all"
        for window in (None, 600):
            same_bits_for_any_threads(lambda: [decode_attention(*case.arguments(), window=window)], repeats=3)  # noqa: B023


def test_same_bits_on_repeat():
    case = Case(LENGTHS)
    first = decode_attention(*case.arguments())
    assert all(torch.equal(decode_attention(*case.arguments()), first) for _ in range(1000))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_core_and_plain_torch_agree(isa, heads, kv_heads, dtype, tolerance, monkeypatch):
    case = made(EDGES, heads, kv_heads, 24, 16, dtype)
    for window in (None, 0, 70):
        core_out = decode_attention(*case.arguments(), window=window)
        monkeypatch.setenv("PYRLHF_BACKEND", "ref")
        torch_out = decode_attention(*case.arguments(), window=window)
        monkeypatch.delenv("PYRLHF_BACKEND")
        torch.testing.assert_close(core_out, torch_out, rtol=tolerance, atol=tolerance)


def test_a_plan_serves_every_layer(monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    case = Case(LENGTHS, dim=16)
    q, k_cache, v_cache, table, lens = case.arguments()
    for window in (None, 20):
        plan = module.plan_decode(table, lens, 16, 2, window=window)
        for layer in (1.0, 2.0):
            expected = decode_attention(q, k_cache * layer, v_cache * layer, table, lens, window=window)
            assert torch.equal(module.attend_planned(q, k_cache * layer, v_cache * layer, plan, 0.25), expected)


NO_MEMORY = """
from pyrlhf.ops import decode_attention

def run(rows, tokens):  # every row reads the same page, over and over
    q, cache = torch.ones(rows, 32, 256), torch.ones(1, 16, 1, 256)
    table = torch.zeros(rows, tokens // 16, dtype=torch.int32)
    lengths = torch.full((rows,), tokens, dtype=torch.int32)
    return lambda: decode_attention(q, cache, cache, table, lengths)

small, large = run(2, 64), run(1000, 5120)
expected = small()
resource.setrlimit(resource.RLIMIT_AS, (int(of_this_process("VmSize") + 100) << 20, resource.RLIM_INFINITY))
try:
    large()  # 315 MiB of partial results
except MemoryError as error:
    print(error)
assert torch.equal(small(), expected)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_runs_out_is_an_exception_and_no_more():
    (said,) = lines_of(NO_MEMORY)
    assert said.startswith("decode_attention: the kernel's scratch memory could not be allocated")


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_torch_library(dtype):
    case = Case([3, 0, 20], dtype=dtype)
    for window in (None, 0, 5):
        torch.library.opcheck(torch.ops.pyrlhf.decode_attention.default, (*case.arguments(), window, 0.3))
    q, *rest = case.arguments()
    compiled = torch.compile(lambda x: decode_attention(x * 2, *rest), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), decode_attention(q * 2, *rest))


@pytest.mark.parametrize("dtype", CORE_DTYPES)
def test_views_of_queries_tables_and_lengths(isa, dtype):
    case = Case([3, 0, 20, 70], 4, 2, 33, dtype=dtype)
    q, *caches, table, lens = case.arguments()
    expected = decode_attention(q, *caches, table, lens)
    fused = torch.cat((q, torch.full((4, 4, 33), torch.nan, dtype=dtype)), 1)
    wide = torch.full((4, 4, 66), torch.nan, dtype=dtype)
    wide[..., ::2] = q
    for view in (q.transpose(0, 1).contiguous().transpose(0, 1), fused[:, :4], wide[..., ::2], q.flip(1).flip(1)):
        assert torch.equal(decode_attention(view, *caches, table, lens), expected)
    tables = table.T.contiguous().T, torch.stack((table, table - 99), 2)[..., 0]
    assert all(torch.equal(decode_attention(q, *caches, t, lens), expected) for t in tables)
    assert torch.equal(decode_attention(q, *caches, table, torch.stack((lens, lens - 99), 1)[:, 0]), expected)


def test_no_rows_and_no_tokens(isa, poison):
    case = Case([3, 0, 20])
    q, *caches, table, lens = case.arguments()
    assert decode_attention(q[:0], *caches, table[:0], lens[:0]).shape == (0, 4, 8)
    zeros = torch.zeros(3, 4, 8)
    assert equal([decode_attention(q, *caches, table, lens * 0)], [zeros])
    assert equal([decode_attention(q, *(c[:0] for c in caches), table[:, :0], lens * 0)], [zeros])


@pytest.mark.parametrize("function", [decode_attention, decode_attention_ref])
def test_wrong_calls_name_the_argument(function):
    case = Case([3, 0, 20])
    q, k_cache, v_cache, table, lens = case.arguments()
    broken = table.clone()
    broken[2, 1] = 99
    negative = table.clone()
    negative[0, 0] = -1
    wide_heads = {
        "q": torch.ones(3, 4, 257),
        "k_cache": torch.ones(2, 16, 2, 257),
        "v_cache": torch.ones(2, 16, 2, 257),
    }
    names = ("q", "k_cache", "v_cache", "page_table", "seq_lens")
    for error, message, change in (
        (TypeError, "q must be a torch.Tensor, found NoneType", {"q": None}),
        (TypeError, "q must be float32 or bfloat16.*, found int32", {"q": q.int()}),
        (ValueError, r"q must have shape \[any, any, any\], found \[4, 8\]", {"q": q[0]}),
        (TypeError, "k_cache must be float32", {"k_cache": k_cache.bfloat16()}),
        (ValueError, "k_cache must have shape", {"k_cache": k_cache[..., :7]}),
        (ValueError, "k_cache must be contiguous", {"k_cache": k_cache[:, ::2]}),
        (ValueError, "v_cache must have shape", {"v_cache": v_cache[1:]}),
        (ValueError, "v_cache must be contiguous", {"v_cache": v_cache.transpose(1, 2).contiguous().transpose(1, 2)}),
        (ValueError, "k_cache must be on cpu", {"k_cache": k_cache.to("meta")}),
        (ValueError, "pages of at least 1 token", {"k_cache": k_cache[:, :0], "v_cache": v_cache[:, :0]}),
        (ValueError, r"head size must be in 1\.\.256, found 257", wide_heads),
        (ValueError, "multiple of k_cache's", {"q": q[:, :3]}),
        (TypeError, "page_table must be int32", {"page_table": table.long()}),
        (ValueError, "page_table must have shape", {"page_table": table[:2]}),
        (ValueError, r"page_table\[2, 1\] must be a page in 0..\d+, found 99", {"page_table": broken}),
        (ValueError, r"page_table\[0, 0\] must be a page in 0..\d+, found -1", {"page_table": negative}),
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
