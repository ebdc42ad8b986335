"""What a decode step counts, by the core and in plain torch."""

from __future__ import annotations

import pytest
import torch

from pyrlhf.ops.decode_step import embed, note_draws, token_places


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_places_follow_the_table(isa, poison, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    table = torch.tensor([[7, 2, 5], [7, 2, 5], [7, 2, 5], [7, 2, 5], [1, 0, 0]], dtype=torch.int32)
    positions = torch.tensor([0, 3, 4, 11, 2])
    for rows in ([0, 1, 2, 3, 4], [4], []):
        every_other = torch.stack((positions[rows], positions[rows]), 1)[:, 0]
        slots, seq_lens, following = token_places(table[rows].T.contiguous().T, every_other, 4)
        assert slots.tolist() == [[28, 31, 8, 23, 6][row] for row in rows]
        assert seq_lens.tolist() == [[1, 4, 5, 12, 3][row] for row in rows]
        assert following.tolist() == seq_lens.tolist()
        assert (slots.dtype, seq_lens.dtype, following.dtype) == (torch.int64, torch.int32, torch.int64)


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_draws_land_in_their_places(isa, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    tokens, logprobs = torch.full((3, 5), 99), torch.full((3, 5), -9.0)
    columns = torch.tensor([-1, 2])
    rows = {"last": torch.tensor([7, 8]), "positions": torch.tensor([10, 20]), "columns": columns}
    rows["places"] = torch.tensor([2, 0]) * 5 + columns
    for drawn, drawn_logprobs, ended in (([4, -1], [-0.5, 0.0], False), ([0, 6], [-2.0, -1.0], True)):
        noted = {"ends": torch.tensor([9, 6]), "tokens": tokens, "logprobs": logprobs}
        assert note_draws(torch.tensor(drawn), torch.tensor(drawn_logprobs), **rows, **noted) is ended
        assert rows["last"].tolist() == [max(0, token) for token in drawn]
    assert rows["positions"].tolist() == [12, 22]
    assert rows["columns"].tolist() == [1, 4]
    assert rows["places"].tolist() == [11, 4]
    assert tokens.tolist() == [[99, 99, 99, -1, 6], [99] * 5, [4, 0, 99, 99, 99]]
    assert logprobs.tolist() == [[-9.0, -9.0, -9.0, 0.0, -1.0], [-9.0] * 5, [-0.5, -2.0, -9.0, -9.0, -9.0]]


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_nothing_ends_without_ends(backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    numbers = {name: torch.tensor([0]) for name in ("last", "positions", "columns", "places")}
    outputs = {"tokens": torch.zeros(2, dtype=torch.int64), "logprobs": torch.zeros(2)}
    none = torch.zeros(0, dtype=torch.int64)
    assert note_draws(torch.tensor([5]), torch.zeros(1), **numbers, ends=none, **outputs) is False


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 21), (5, 64), (700, 130)])
def test_rows_are_looked_up(isa, poison, rows, width, dtype):
    """Bit for bit as torch has it, NaN rows that nobody asks for aside."""
    table = torch.randn(40, width, dtype=dtype)
    table[::7] = torch.nan
    ids = torch.randint(40, (rows, 2))[:, 0]
    ids[ids % 7 == 0] += 1
    added = torch.randn(width, rows, dtype=dtype).T
    expected = torch.nn.functional.embedding(ids, table)
    assert torch.equal(embed(table, ids), expected)
    assert torch.equal(embed(table, ids, added), expected + added)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_an_id_outside_of_the_table_is_an_error(isa, backend, bad, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    with pytest.raises(IndexError):
        embed(torch.zeros(4, 8), torch.tensor([0, bad, 3]))
