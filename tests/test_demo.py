"""The demo's world: what it holds out, what its gold scorer likes, how noisy its labellers are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyrlhf import demo
from pyrlhf.metrics import read_lines


def test_training_never_sees_the_openings_of_the_verdict(tmp_path: Path) -> None:
    demo.write_data(tmp_path, demo.QUICK, seed=0)
    judged = {row["prompt"] for row in read_lines(tmp_path / "judged.jsonl")}
    assert len(judged) == len(demo.HELD_OUT) > 5
    for name in ("text", "text-held-out", "demonstrations", "prompts"):
        rows = read_lines(tmp_path / f"{name}.jsonl")
        texts = [row.get("text") or row["prompt"] + row.get("response", "") for row in rows]
        assert texts
        assert not [text for text in texts if text.startswith(tuple(judged))], name


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" fresh and superb. i loved the cake.", 3),
        (" fresh and fresh.", 1),  # a word is praised once
        (" bland. i hated the cake.", -2),
        (" warm", -2),  # no end
        (" fresh. the cake the.", -1),  # no sentence
        (" warm. i tried the cake. i tried the cake.", -2),  # nothing new
    ],
)
def test_gold_scores(response: str, score: float) -> None:
    assert demo.gold("review: the soup was", response) == score


def test_labellers_mostly_agree_with_the_gold_scorer_and_sometimes_do_not() -> None:
    rng, answers = random.Random(0), [" fresh. i loved the cake.", " warm."]
    right = sum(demo.noisy_ranks("review: the soup was", answers, rng) == [0, 1] for _ in range(500))
    assert 450 < right < 500  # Bradley-Terry: sigmoid(2 / 0.5) = 0.98
