"""The CUDA kernels of decode_attention over a paged cache whose unused places hold NaN."""

from __future__ import annotations

import functools

import pytest
import torch
from checking import as_good_as
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf.ops import decode_attention, decode_attention_ref
from pyrlhf.ops._core import CUDA_DTYPES

# around a strip (16 keys, 8 in float32), four warps' strips, and the chunks of 512
EDGES = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129)
LONG = (512, 513, 1100)
EVERYTHING = 2**40  # a window as large


class Case:
    """Sequences of given lengths, each also laid out alone, and a cache with NaN wherever they are not."""

    def __init__(
        self, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype,
        seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(sum(lengths))
        self.lengths = lengths
        self.q = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype)
        self.keys, self.values = (
            [torch.randn(n, kv_heads, dim, generator=generator).to(dtype) for n in lengths] for _ in range(2)
        )
        counts = [-(-n // page_size) for n in lengths]
        pages = sum(counts) + 2
        free = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.caches = [torch.full((pages, page_size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2)]
        self.table = torch.full((len(lengths), max(counts, default=0) + 1), -7, dtype=torch.int32)
        for row, count in enumerate(counts):
            used = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
            self.table[row, :count] = used
            for cache, rows in zip(self.caches, (self.keys[row], self.values[row]), strict=True):
                filled = torch.full((count * page_size, kv_heads, dim), torch.nan, dtype=dtype)
                filled[: len(rows)] = rows
                cache[used] = filled.view(count, page_size, kv_heads, dim)

    def arguments(self, device: torch.device) -> list[Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return [x.to(device, copy=True) for x in (self.q, *self.caches, self.table, lengths)]

    def expected(self, dtype: torch.dtype, window: int | None = None, scale: float | None = None) -> Tensor:
        """torch's, one row at a time, over the keys that the row sees."""
        out = torch.zeros(self.q.shape, dtype=dtype)
        for row, n in enumerate(self.lengths):
            first = 0 if window is None else max(0, n - window)
            if n > first:
                k, v = (x[row][first:].to(dtype).transpose(0, 1)[None] for x in (self.keys, self.values))
                q = self.q[row].to(dtype)[None, :, None]
                out[row] = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0, :, 0]
        return out


@functools.cache
def made(lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype) -> Case:
    return Case(lengths, heads, kv_heads, dim, page_size, dtype)


def check(case: Case, device: torch.device, window: int | None = None, scale: float | None = None) -> None:
    out = decode_attention(*case.arguments(device), window=window, scale=scale)
    assert out.dtype == case.q.dtype
    expected = (case.expected(dtype, window, scale) for dtype in (out.dtype, torch.float64))
    as_good_as([out.cpu()], *([x] for x in expected))


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 33, 64, 80, 96, 100, 128, 129, 255, 256])
def test_every_head_size(device: torch.device, poison: None, dim: int, dtype: torch.dtype) -> None:
    check(made((16, 0, 1, 83), 4, 2, dim, 16, dtype), device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (8, 1), (7, 1), (9, 1), (16, 1), (17, 1), (40, 2), (70, 1)]
)
def test_every_group(device: torch.device, poison: None, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(made((37, 2), heads, kv_heads, 16, 16, dtype), device)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 100])
def test_lengths_and_windows_at_every_edge(
    device: torch.device, poison: None, page_size: int, dtype: torch.dtype
) -> None:
    case = made(EDGES, 2, 1, 8, page_size, dtype)
    for window in (None, 0, 1, 16, 65, EVERYTHING):
        check(case, device, window)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_rows_of_several_chunks(device: torch.device, poison: None, dtype: torch.dtype) -> None:
    case = made(LONG, 2, 1, 64, 16, dtype)
    for window in (None, 512, 520, 1):
        check(case, device, window)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.5, 30.0])
def test_scores_of_any_size(device: torch.device, poison: None, scale: float, dtype: torch.dtype) -> None:
    check(made((70, 3, 600), 2, 1, 16, 16, dtype), device, scale=scale)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_a_rows_bits_are_its_own(device: torch.device, dtype: torch.dtype) -> None:
    """Alone, in another order, behind a wider or narrower table, and wherever its pages lie; four times over."""
    lengths = (65, 0, 530, 17, 1)
    case = made(lengths, 4, 2, 24, 16, dtype)
    q, k, v, table, lens = case.arguments(device)
    for window in (None, 40):
        every = decode_attention(q, k, v, table, lens, window=window)
        for rows in ([0], [2], [4, 3, 2, 1, 0]):
            some = decode_attention(q[rows], k, v, table[rows], lens[rows], window=window)
            assert torch.equal(some, every[rows])
        wide = torch.cat((table, torch.full((5, 70), -9, dtype=torch.int32, device=device)), 1)
        assert torch.equal(decode_attention(q, k, v, wide, lens, window=window), every)
        short = [0, 3, 4]  # a table of so few pages needs no second kernel
        narrow = decode_attention(q[short], k, v, table[short, :5], lens[short], window=window)
        assert torch.equal(narrow, every[short])
        for page_size in (1, 100):
            elsewhere = Case(lengths, 4, 2, 24, page_size, dtype, seed=page_size)
            assert torch.equal(decode_attention(*elsewhere.arguments(device), window=window), every)
    first = decode_attention(q, k, v, table, lens)
    assert all(torch.equal(decode_attention(q, k, v, table, lens), first) for _ in range(3))


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_sequences_may_share_pages(device: torch.device, dtype: torch.dtype) -> None:
    case = made((40, 33, 47, 32), 4, 2, 8, 16, dtype)
    q, k, v, table, lens = case.arguments(device)
    for row in range(1, 4):
        for cache in (k, v):
            cache[table[row, :2].long()] = cache[table[0, :2].long()]
    apart = decode_attention(q, k, v, table, lens)
    shared = table.clone()
    shared[:, :2] = table[0, :2]
    for cache in (k, v):
        cache[table[1:, :2].long()] = torch.nan
    assert torch.equal(decode_attention(q, k, v, shared, lens), apart)
    assert apart.isfinite().all()


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_a_nan_stays_in_its_row_and_its_heads(device: torch.device, which: int, dtype: torch.dtype) -> None:
    case = made((600, 70, 0), 8, 2, 16, 16, dtype)
    arguments = case.arguments(device)
    clean = decode_attention(*arguments)
    if which == 0:
        arguments[0][0, 5] = torch.nan
    else:  # token 75 of row 0, key head 1: its fifth page
        arguments[which][int(case.table[0, 4]), 11, 1] = torch.nan
    spoilt = decode_attention(*arguments)
    hit = torch.zeros(3, 8, dtype=torch.bool)
    hit[0, 5 if which == 0 else slice(4, 8)] = True
    assert spoilt[hit.to(device)].isnan().all()
    assert torch.equal(spoilt[~hit.to(device)], clean[~hit.to(device)])


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_views_and_caches_off_16_bytes(device: torch.device, dtype: torch.dtype) -> None:
    case = made((3, 0, 20, 70), 4, 2, 32, 16, dtype)
    q, k, v, table, lens = case.arguments(device)
    expected = decode_attention(q, k, v, table, lens)
    fused = torch.cat((torch.full((4, 5, 32), torch.nan, dtype=dtype, device=device), q), 1)
    odd = torch.cat((q, torch.full((4, 4, 1), torch.nan, dtype=dtype, device=device)), 2)[..., :32]
    wide = torch.full((4, 4, 64), torch.nan, dtype=dtype, device=device)
    wide[..., ::2] = q
    for view in (q.transpose(0, 1).contiguous().transpose(0, 1), fused[:, 5:], odd, wide[..., ::2]):
        assert torch.equal(decode_attention(view, k, v, table, lens), expected)
    tables = table.T.contiguous().T, torch.stack((table, table - 99), 2)[..., 0]
    assert all(torch.equal(decode_attention(q, k, v, t, lens), expected) for t in tables)
    assert torch.equal(decode_attention(q, k, v, table, torch.stack((lens, lens - 99), 1)[:, 0]), expected)
    shifted = [torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view_as(x) for x in (k, v)]
    assert torch.equal(decode_attention(q, *shifted, table, lens), expected)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_no_rows_no_tokens_and_no_pages(device: torch.device, poison: None, dtype: torch.dtype) -> None:
    q, k, v, table, lens = made((3, 0, 20), 4, 2, 8, 16, dtype).arguments(device)
    assert decode_attention(q[:0], k, v, table[:0], lens[:0]).shape == (0, 4, 8)
    zeros = torch.zeros_like(q)
    assert torch.equal(decode_attention(q, k, v, table, lens * 0), zeros)
    assert torch.equal(decode_attention(q, k, v, table, lens, window=0), zeros)
    assert torch.equal(decode_attention(q, k[:0], v[:0], table[:, :0], lens * 0), zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_kernel_agrees(device: torch.device, dtype: torch.dtype) -> None:
    case = made((65, 0, 530, 17, 1), 4, 2, 24, 16, dtype)
    found = decode_attention(*case.arguments(device)).cpu()
    expected = decode_attention_ref(*case.arguments(torch.device("cpu")))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [-1, 1000, 2**31 - 1, -(2**31)])
def test_a_length_out_of_range_is_flagged_and_gives_zeros(
    device: torch.device, raised, poison: None, bad: int, dtype: torch.dtype
) -> None:
    q, k, v, table, lens = made((3, 600, 20), 4, 2, 8, 16, dtype).arguments(device)
    expected = decode_attention(q, k, v, table, lens)
    assert raised() is None
    lens[1], expected[1] = bad, 0.0
    assert torch.equal(decode_attention(q, k, v, table, lens), expected)
    assert "decode_attention: seq_lens must be" in raised()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [-1, 1000, 2**31 - 1, -(2**31)])
def test_a_page_out_of_range_is_flagged_and_its_keys_are_not_seen(
    device: torch.device, raised, poison: None, bad: int, dtype: torch.dtype
) -> None:
    case = made((3, 100, 20), 4, 2, 8, 16, dtype)
    q, k, v, table, lens = case.arguments(device)
    table[1, 6] = bad  # its last four tokens
    found = decode_attention(q, k, v, table, lens)
    assert "decode_attention: page_table must hold" in raised()
    lens[1] = 96
    torch.testing.assert_close(found, decode_attention(q, k, v, table, lens), rtol=1e-2, atol=1e-2)
    table[1] = bad
    assert torch.equal(decode_attention(q, k, v, table, lens)[1], torch.zeros_like(q[1]))
    assert "decode_attention: page_table must hold" in raised()


def test_wrong_values_are_found_before_the_kernel_on_request(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    q, k, v, table, lens = made((3, 100, 20), 4, 2, 8, 16, torch.float32).arguments(device)
    with pytest.raises(ValueError, match="seq_lens must be in"):
        decode_attention(q, k, v, table, lens + 1000)
    with pytest.raises(ValueError, match=r"page_table\[1, 2\] must be a page"):
        decode_attention(q, k, v, table.index_fill(1, torch.tensor([2], device=device), 77), lens)


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_torch_library(device: torch.device, dtype: torch.dtype) -> None:
    q, *rest = made((3, 0, 20), 4, 2, 8, 16, dtype).arguments(device)
    for window in (None, 5):
        torch.library.opcheck(torch.ops.pyrlhf.decode_attention.default, (q, *rest, window, 0.3))
    compiled = torch.compile(lambda x: decode_attention(x * 2, *rest), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), decode_attention(q * 2, *rest))
