"""A real pretrained checkpoint against numbers computed elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from pyrlhf.model import CausalLM


def test_stories260k_reproduces_its_golden_numbers(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("stories260k")
    golden = json.loads((folder / "golden.json").read_text())
    model = CausalLM.from_pretrained(folder)
    tokens = torch.tensor(golden["token_ids"])
    batch = tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(model(*batch))
        logprobs, _ = model(*batch, rows=torch.arange(len(tokens) - 1), targets=tokens[1:])
    assert torch.equal(logits[:-1].argmax(-1), tokens[1:])
    torch.testing.assert_close(logits[0], torch.tensor(golden["logits_at_bos"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(logprobs, torch.tensor(golden["greedy_logprobs"]), rtol=0, atol=1e-4)


def test_stories260k_writes_its_story_again(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("stories260k")
    golden = json.loads((folder / "golden.json").read_text())["token_ids"]
    model = CausalLM.from_pretrained(folder)
    written = golden[:1]
    with torch.no_grad():
        while len(written) < len(golden):
            tokens = torch.tensor(written)
            ends = torch.tensor([0, len(written)], dtype=torch.int32)
            hidden = model(tokens, torch.arange(len(written)), ends, rows=torch.tensor([len(written) - 1]))
            written.append(int(model.logits(hidden).argmax()))
    assert written == golden
