"""Evaluation against small cases worked out by hand and against other ways to compute the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyrlhf.data import EncodedRanking
from pyrlhf.evaluate import perplexity, reward_accuracy, score_rankings, win_rate
from pyrlhf.evaluate.accuracy import ordered_pairs
from pyrlhf.model import CausalLM, ModelConfig, ScalarModel

CONFIG = ModelConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, max_positions=64)


def test_win_rate_counts_ties_half() -> None:
    found = win_rate([3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 4.0])
    assert (found.rate, found.wins, found.ties, found.losses) == (0.625, 2, 1, 1)
    other = win_rate([1.0, 1.0, 4.0, 4.0], [3.0, 1.0, 2.0, 5.0])
    assert other.rate == 1 - found.rate
    assert other.low == pytest.approx(1 - found.high)


def test_win_rate_interval_is_wilsons() -> None:
    found = win_rate([1.0] * 81 + [0.0] * 182, [0.5] * 263)  # Newcombe 1998, table I, 81 of 263
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    certain = win_rate([1.0] * 10, [0.0] * 10)
    assert certain.high == 1.0
    assert 0.6 < certain.low < 0.8


@pytest.mark.parametrize(
    ("a", "b", "said"), [([], [], "0 and 0"), ([1.0], [1.0, 2.0], "1 and 2"), ([math.nan], [0.0], "NaN")]
)
def test_win_rate_refuses(a: list[float], b: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        win_rate(a, b)


def test_ordered_pairs_skip_ties_of_people_and_halve_ties_of_the_model() -> None:
    assert ordered_pairs([3.0, 2.0, 1.0], [0, 1, 2]) == (3.0, 3)
    assert ordered_pairs([1.0, 2.0, 3.0], [0, 1, 2]) == (0.0, 3)
    assert ordered_pairs([1.0, 1.0, 0.0], [0, 1, 1]) == (1.5, 2)
    assert ordered_pairs([1.0, 2.0], [0, 0]) == (0.0, 0)


def rankings() -> list[EncodedRanking]:
    return [
        EncodedRanking([1, 2, 3], [[4, 5], [6], [7, 8, 9]], (0, 1, 2)),
        EncodedRanking([10], [[11, 12], [13]], (1, 0)),
        EncodedRanking([1, 2], [[3], [4]], (0, 0)),
        EncodedRanking([5, 5, 5, 5], [[6, 7], [8], [9]], (0, 1, 1)),
    ]


def test_scores_of_shared_prompts_are_those_of_whole_sequences() -> None:
    model = ScalarModel(CONFIG, seed=3)
    whole = [[model(*sequence(r.prompt + answer))[-1].item() for answer in r.answers] for r in rankings()]
    for budget in (1, 8, 1000):
        found = score_rankings(model, rankings(), tokens_per_batch=budget)
        assert [len(group) for group in found] == [3, 2, 2, 3]
        for group, expected in zip(found, whole):
            assert group == pytest.approx(expected, abs=1e-6)


def test_reward_accuracy_over_all_pairs_and_by_k() -> None:
    model = ScalarModel(CONFIG, seed=3)
    found = reward_accuracy(model, rankings(), tokens_per_batch=10)
    each = [ordered_pairs(s, r.ranks) for s, r in zip(score_rankings(model, rankings()), rankings())]
    assert found.pairs == 3 + 1 + 0 + 2
    assert found.rankings == 3
    assert found.accuracy == pytest.approx(sum(good for good, _ in each) / 6)
    assert found.by_k == {2: (each[1][0], 1), 3: (pytest.approx((each[0][0] + each[3][0]) / 5), 5)}
    losses = []
    for scores, ranking in zip(score_rankings(model, rankings()), rankings()):
        margins = [a - b for a, i in zip(scores, ranking.ranks) for b, j in zip(scores, ranking.ranks) if i < j]
        losses += [sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)] if margins else []
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_reward_accuracy_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        reward_accuracy(ScalarModel(CONFIG), [EncodedRanking([1], [[2], [3]], (0, 0))])


def sequence(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)


def test_perplexity_weighs_every_token_the_same() -> None:
    model = CausalLM(CONFIG, seed=1)
    sequences = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11]]
    total, count = 0.0, 0
    for ids in sequences:
        logits = model.logits(model(*sequence(ids))).double().log_softmax(-1)
        total -= sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        count += len(ids) - 1
    for budget in (1, 6, 1000):
        found = perplexity(model, sequences, tokens_per_batch=budget)
        assert found.tokens == count == 7
        assert found.loss == pytest.approx(total / count, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    def uniform(*_: Any, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full((len(rows),), -math.log(31.0)), None

    assert perplexity(uniform, [[1, 2, 3], [4, 5]]).perplexity == pytest.approx(31.0)


def test_perplexity_needs_a_token_to_predict() -> None:
    with pytest.raises(ValueError, match="found none"):
        perplexity(CausalLM(CONFIG), [[1], []])
