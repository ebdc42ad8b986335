"""decode_attention, rotary and write_kv where only a GPU will do: large sizes, many runs, graphs, streams and inductor."""

from __future__ import annotations

import pytest
import torch
from checking import captured
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf.ops import decode_attention, rotary, rotary_ref, write_kv
from pyrlhf.ops.write_kv import turn_and_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGE = 16


def batch(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, caches, table and lengths; the cache holds NaN past every row's end."""
    generator = torch.Generator(device="cuda").manual_seed(len(lengths))
    rows, width = len(lengths), -(-max(lengths) // PAGE)
    q = torch.randn(rows, heads, dim, generator=generator, device="cuda").to(dtype)
    shape = (rows * width, PAGE, kv_heads, dim)
    caches = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2)]
    table = torch.randperm(rows * width, generator=generator, device="cuda").int().view(rows, width)
    seen = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    beyond = torch.arange(width * PAGE, device="cuda") >= seen[:, None]
    places = table.long().repeat_interleave(PAGE, 1) * PAGE + torch.arange(PAGE, device="cuda").repeat(width)
    for cache in caches:
        cache.view(-1, kv_heads, dim)[places[beyond]] = torch.nan
    return [q, *caches, table, seen]


def expected(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, table: Tensor, seq_lens: Tensor) -> Tensor:
    """torch's, one row at a time."""
    out = torch.zeros(q.shape, dtype=dtype, device="cuda")
    for row, length in enumerate(seq_lens.tolist()):
        keys, values = (x[table[row].long()].flatten(0, 1)[:length].to(dtype).transpose(0, 1)[None] for x in (k, v))
        out[row] = scaled_dot_product_attention(q[row].to(dtype)[None, :, None], keys, values, enable_gqa=True)[0, :, 0]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (12, 12, 64), (10, 2, 80), (6, 1, 96), (16, 1, 256)]
)
def test_long_rows(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    arguments = batch([1, 511, 512, 513, 4096, 5000, 33_000], heads, kv_heads, dim, dtype)
    truth = expected(torch.float64, *arguments)
    error, peer = (
        (x.double() - truth).abs().max().item() for x in (decode_attention(*arguments), expected(dtype, *arguments))
    )
    assert error <= 2 * peer + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_1000_runs_alone_and_among_others(dtype: torch.dtype) -> None:
    q, k, v, table, seq_lens = batch([700, 2000, 64, 1, 513], 8, 2, 64, dtype)
    first = decode_attention(q, k, v, table, seq_lens)
    for _ in range(1000):
        assert torch.equal(decode_attention(q, k, v, table, seq_lens), first)
    for row in range(5):
        rows = slice(row, row + 1)
        assert torch.equal(decode_attention(q[rows], k, v, table[rows], seq_lens[rows]), first[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_every_length(dtype: torch.dtype) -> None:
    """A decode step's calls, captured once: rotary on the way into the cache, then attention."""
    _, k, v, table, _ = batch([900, 900, 900], 8, 2, 64, dtype)
    k.nan_to_num_()
    v.nan_to_num_()
    fused = torch.randn(3, 12, 64, device="cuda").to(dtype)
    positions = torch.zeros(3, dtype=torch.int64, device="cuda")
    inv_freq = 1.0 / 10000 ** (torch.arange(32, device="cuda") / 32)

    def step(k: Tensor, v: Tensor) -> Tensor:
        q, new_k, new_v = fused.split((8, 2, 2), dim=1)
        page = positions // PAGE
        slots = table.gather(1, page[:, None])[:, 0].long() * PAGE + positions % PAGE
        q = turn_and_store(q, new_k, new_v, positions, inv_freq, k, v, slots)
        return decode_attention(q, k, v, table, (positions + 1).int())

    graph, out = captured(lambda: step(k, v))
    for at in ([0, 1, 2], [511, 512, 513], [899, 3, 640]):
        positions.copy_(torch.tensor(at))
        fused.normal_()
        graph.replay()
        found, caches = out.clone(), [k.clone(), v.clone()]
        assert torch.equal(step(*caches), found)
        assert torch.equal(caches[0], k)
        assert torch.equal(caches[1], v)


def test_it_runs_on_the_callers_stream() -> None:
    arguments = batch([700, 20], 8, 2, 64, torch.bfloat16)
    first = decode_attention(*arguments)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.cuda._sleep(50_000_000)
        arguments[0].mul_(2)  # seen only by what comes after it on this stream
        doubled = decode_attention(*arguments)
    torch.cuda.current_stream().wait_stream(aside)
    assert torch.equal(doubled, decode_attention(*arguments))
    assert not torch.equal(doubled, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_many_tokens_into_the_cache(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(32_768, 48, 128, device="cuda").to(dtype).split((32, 8, 8), dim=1)
    positions = torch.randint(0, 131_072, (32_768,), device="cuda")
    inv_freq = 1.0 / 500_000 ** (torch.arange(64, device="cuda") / 64)
    slots = torch.randperm(32_768, device="cuda")
    caches, others = ([torch.zeros(2048, PAGE, 8, 128, dtype=dtype, device="cuda") for _ in range(2)] for _ in range(2))
    turned_q, turned_k = rotary(q, k, positions, inv_freq)
    write_kv(turned_k, v, *others, slots)
    assert torch.equal(turn_and_store(q, k, v, positions, inv_freq, *caches, slots), turned_q)
    assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(turned_q, rotary_ref(q, k, positions, inv_freq)[0], rtol=tolerance, atol=tolerance)


def test_compiled_by_inductor() -> None:
    q, *rest = batch([700, 20], 8, 2, 64, torch.bfloat16)
    positions, inv_freq = torch.tensor([699, 19], device="cuda"), torch.rand(32, device="cuda")

    def step(x: Tensor) -> Tensor:
        turned, _ = rotary(x * 2, x, positions, inv_freq)
        return decode_attention(turned, *rest) + 1

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q), step(q), rtol=1e-2, atol=1e-2)
    leaf = torch.randn(2, 8, 64, device="cuda", requires_grad=True)
    turn = torch.compile(lambda x: rotary(x, x, positions, inv_freq)[0].square().sum(), fullgraph=True)
    (grad,) = torch.autograd.grad(turn(leaf), leaf)
    torch.testing.assert_close(grad, 2 * leaf)  # a rotation keeps lengths
