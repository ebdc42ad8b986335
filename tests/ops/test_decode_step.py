"""What a decode step counts, by the core and in plain torch."""

from __future__ import annotations

import pytest
import torch

from pyrlhf.ops.decode_step import note_draws, token_places


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_places_follow_the_table(isa, poison, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    table = torch.tensor([[7, 2, 5], [7, 2, 5], [7, 2, 5], [7, 2, 5], [1, 0, 0]], dtype=torch.int32)
    positions = torch.tensor([0, 3, 4, 11, 2])
    for rows in ([0, 1, 2, 3, 4], [4], []):
        every_other = torch.stack((positions[rows], positions[rows]), 1)[:, 0]
        slots, seq_lens = token_places(table[rows].T.contiguous().T, every_other, 4)
        assert slots.tolist() == [[28, 31, 8, 23, 6][row] for row in rows]
        assert seq_lens.tolist() == [[1, 4, 5, 12, 3][row] for row in rows]
        assert (slots.dtype, seq_lens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_draws_land_in_their_places(isa, backend, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    tokens, logprobs = torch.full((3, 5), 99), torch.full((3, 5), -9.0)
    columns = torch.tensor([-1, 2])
    rows = {"last": torch.tensor([7, 8]), "positions": torch.tensor([10, 20]), "columns": columns}
    rows["places"] = torch.tensor([2, 0]) * 5 + columns
    for drawn, drawn_logprobs in (([4, -1], [-0.5, 0.0]), ([0, 6], [-2.0, -1.0])):
        note_draws(torch.tensor(drawn), torch.tensor(drawn_logprobs), **rows, tokens=tokens, logprobs=logprobs)
        assert rows["last"].tolist() == [max(0, token) for token in drawn]
    assert rows["positions"].tolist() == [12, 22]
    assert rows["columns"].tolist() == [1, 4]
    assert rows["places"].tolist() == [11, 4]
    assert tokens.tolist() == [[99, 99, 99, -1, 6], [99] * 5, [4, 0, 99, 99, 99]]
    assert logprobs.tolist() == [[-9.0, -9.0, -9.0, 0.0, -1.0], [-9.0] * 5, [-0.5, -2.0, -9.0, -9.0, -9.0]]
