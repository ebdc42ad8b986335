"""Pages are handed out once, come back, and hold what was written where the table says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyrlhf.model import ModelConfig
from pyrlhf.rollout import PagedCache, PagedDecode, PagedPrefill

CONFIG = ModelConfig(vocab_size=8, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2)


def cache(pages: int, page_size: int) -> PagedCache:
    return PagedCache(CONFIG, pages, page_size, torch.float32, "cpu")


@given(st.lists(st.integers(0, 6), max_size=30), st.randoms())
def test_pages_are_never_shared_or_lost(sizes: list[int], random: object) -> None:
    store, held = cache(20, 4), []
    for size in sizes:
        if size > store.free_pages:
            with pytest.raises(ValueError, match=f"at most the {store.free_pages} free pages, found {size}"):
                store.take(size)
            store.give_back(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        else:
            held.append(store.take(size))
        everything = [page for pages in held for page in pages]
        assert len(set(everything)) == len(everything)
        assert store.free_pages == 20 - len(everything)
    for pages in held:
        store.give_back(pages)
    assert sorted(store.take(20)) == list(range(20))


def test_slots_follow_the_table() -> None:
    table = torch.tensor([[7, 2, 5], [1, 0, 0]], dtype=torch.int32)
    rows = torch.tensor([0, 0, 0, 0, 1])
    positions = torch.tensor([0, 3, 4, 11, 2])
    assert cache(8, 4).slots(table[rows], positions).tolist() == [28, 31, 8, 23, 6]


@pytest.mark.parametrize(("pages", "page_size"), [(0, 4), (4, 0)])
def test_sizes_are_checked(pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="pages, page_size"):
        cache(pages, page_size)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_through_pages_is_attention_over_the_sequence(window: int | None) -> None:
    """Prefill of two prompts in scattered pages, then one token each: equal to plain attention over all tokens."""
    torch.manual_seed(0)
    store, lengths = cache(16, 4), [5, 9]
    table = torch.tensor([[9, 3, 0], [4, 12, 1]], dtype=torch.int32)
    q, k, v = (torch.randn(16, heads, 2) for heads in (4, 2, 2))  # 14 prompt tokens and 2 new ones
    at = torch.tensor([*range(5), *range(9)])
    owner = torch.tensor([0] * 5 + [1] * 9)
    prefill = PagedPrefill(
        store, torch.tensor([0, 5, 14], dtype=torch.int32), store.slots(table[owner], at), torch.arange(14)
    )
    decode = PagedDecode(store, table, torch.tensor(lengths))
    for layer in range(2):
        prefill(layer, q[:14] + layer, k[:14] + layer, v[:14] + layer, causal=True, window=window, scale=None)
        out = decode(layer, q[14:] + layer, k[14:] + layer, v[14:] + layer, causal=True, window=window, scale=None)
        for row, (start, length) in enumerate(zip((0, 5), lengths, strict=True)):
            places = torch.tensor([*range(start, start + length), 14 + row])[-(window or 99) :]
            keys, values = ((x[places] + layer).repeat_interleave(2, dim=1) for x in (k, v))
            weights = (torch.einsum("hd,lhd->hl", q[14 + row] + layer, keys) * 2**-0.5).softmax(-1)
            torch.testing.assert_close(out[row], torch.einsum("hl,lhd->hd", weights, values))
