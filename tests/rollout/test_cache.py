"""The paged cache holds what was written where the table says."""

from __future__ import annotations

import pytest
import torch

from pyrlhf.model import ModelConfig
from pyrlhf.rollout import PagedCache, PagedDecode, PagedPrefill

CONFIG = ModelConfig(vocab_size=8, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2)


def cache(pages: int, page_size: int) -> PagedCache:
    return PagedCache(CONFIG, pages, page_size, torch.float32, "cpu")


def test_pages_are_copied_in_every_layer() -> None:
    store = cache(5, 2)
    store.k.normal_()
    store.v.normal_()
    before = store.k.clone(), store.v.clone()
    store.copy_pages([(0, 3), (1, 4)])
    store.copy_pages([])
    for now, old in zip((store.k, store.v), before, strict=True):
        assert torch.equal(now[:, [3, 4]], old[:, [0, 1]])
        assert torch.equal(now[:, :3], old[:, :3])


def test_its_size_in_bytes() -> None:
    """The spare page included."""
    assert cache(5, 2).bytes == 6 * PagedCache.page_bytes(CONFIG, 2, torch.float32) == 6 * 2 * 2 * 2 * 2 * 2 * 4


@pytest.mark.parametrize("tokenwise", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_decoding_through_pages_is_attention_over_the_sequence(window: int | None, tokenwise: bool) -> None:
    """Prefill of two prompts in scattered pages, then one token each: equal to plain attention over all tokens."""
    torch.manual_seed(0)
    store, lengths = cache(16, 4), [5, 9]
    table = torch.tensor([[9, 3, 0], [4, 12, 1]], dtype=torch.int32)
    q, k, v = (torch.randn(16, heads, 2) for heads in (4, 2, 2))  # 14 prompt tokens and 2 new ones
    at = torch.tensor([*range(5), *range(9)])
    owner = torch.tensor([0] * 5 + [1] * 9)
    cu_seqlens = torch.tensor([0, 5, 14], dtype=torch.int32)
    prefill = PagedPrefill(store, cu_seqlens, table[owner], at, tokenwise=tokenwise)
    decode = PagedDecode(store, table, torch.tensor(lengths))

    def expected(layer: int, row: int, places: torch.Tensor) -> torch.Tensor:
        places = places[-(window or 99) :]
        keys, values = ((x[places] + layer).repeat_interleave(2, dim=1) for x in (k, v))
        weights = (torch.einsum("hd,lhd->hl", q[row] + layer, keys) * 2**-0.5).softmax(-1)
        return torch.einsum("hl,lhd->hd", weights, values)

    for layer in range(2):
        how = {"causal": True, "window": window, "scale": None}
        first = prefill(layer, q[:14] + layer, k[:14] + layer, v[:14] + layer, **how)
        out = decode(layer, q[14:] + layer, k[14:] + layer, v[14:] + layer, **how)
        for row, (start, length) in enumerate(zip((0, 5), lengths, strict=True)):
            places = torch.tensor([*range(start, start + length), 14 + row])
            torch.testing.assert_close(out[row], expected(layer, 14 + row, places))
            torch.testing.assert_close(first[start + 2], expected(layer, start + 2, places[:3]))


def test_tokens_drawn_before_are_attended_to_again_as_they_were() -> None:
    """Three tokens at once behind a stored prompt give what they gave one by one, bit for bit."""
    torch.manual_seed(1)
    store = cache(8, 4)
    table = torch.tensor([[5, 2, 7]], dtype=torch.int32)
    q, k, v = (torch.randn(9, heads, 2) for heads in (4, 2, 2))
    how = {"causal": True, "window": None, "scale": None}
    prompt = PagedPrefill(store, torch.tensor([0, 6], dtype=torch.int32), table.expand(6, -1), torch.arange(6))
    prompt(0, q[:6], k[:6], v[:6], **how)
    single = [
        PagedDecode(store, table, torch.tensor([t]))(0, q[t : t + 1], k[t : t + 1], v[t : t + 1], **how)
        for t in (6, 7, 8)
    ]
    nothing = torch.zeros(1, dtype=torch.int32)
    again = PagedPrefill(store, nothing, table.expand(3, -1), torch.arange(6, 9))
    assert torch.equal(again(0, q[6:], k[6:], v[6:], **how), torch.cat(single))
