"""Losses over packed batches: where tokens are predicted, sums that do not depend on how a batch is cut, shared prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlhf.data import pack, pack_groups
from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
from pyrlhf.rlhf import RankedBatch, language_model_loss, response_rows, reward_model_loss, whiten

TINY = ModelConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, max_positions=64)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_response_rows_are_the_tokens_before_each_response_token(shape: list[tuple[int, int]]) -> None:
    expected, counts, start = [], [], 0
    for prompt, response in shape:
        positions = [p for p in range(prompt, prompt + response) if p > 0]
        expected += [start + p - 1 for p in positions]
        counts.append(len(positions))
        start += prompt + response
    cu = torch.tensor([0, *[p + r for p, r in shape]]).cumsum(0).int()
    rows, cu_responses = response_rows(cu, torch.tensor([p for p, _ in shape], dtype=torch.int64))
    assert rows.tolist() == expected
    assert cu_responses.diff().tolist() == counts


def test_language_model_loss_is_the_mean_log_prob_of_responses() -> None:
    model, sequences, prompts = CausalLM(TINY, seed=1), [[3, 4, 5, 6], [7, 8], [9, 1, 2]], [1, 1, 2]
    total, count = 0.0, 0
    for tokens, prompt in zip(sequences, prompts, strict=True):
        batch = pack([tokens])
        logprobs = model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens)).log_softmax(-1)
        picked = [float(logprobs[p - 1, tokens[p]]) for p in range(prompt, len(tokens))]
        total, count = total + sum(picked), count + len(picked)
    loss = language_model_loss(model, pack(sequences), torch.tensor(prompts), 1 / count)
    assert float(loss) == pytest.approx(-total / count, rel=1e-5)


def test_language_model_loss_adds_up_over_micro_batches() -> None:
    model, sequences = CausalLM(TINY, seed=2), [[3, 4, 5, 6], [7, 8], [9, 1, 2], [5] * 9]
    whole = language_model_loss(model, pack(sequences), torch.zeros(4, dtype=torch.int64), 0.1)
    (gradient,) = torch.autograd.grad(whole, [model.head.weight])
    parts = [language_model_loss(model, pack([s]), torch.zeros(1, dtype=torch.int64), 0.1) for s in sequences]
    (summed,) = torch.autograd.grad(sum(parts), [model.head.weight])
    torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-6)


GROUPS = [([3, 4, 5], [[6, 1], [7, 8, 1], [9, 1], [2, 1]]), ([8], [[3, 3, 3, 1], [4, 1]]), ([], [[5, 1], [6, 6, 1]])]
RANKS = [2, 0, 1, 1, 0, 1, 1, 0]


def shared_prompts(groups: list[tuple[list[int], list[list[int]]]], ranks: list[int]) -> RankedBatch:
    packed = pack_groups(groups)
    return RankedBatch(packed.batch, packed.last, packed.cu_groups, torch.tensor(ranks, dtype=torch.int32))


def whole_sequences(groups: list[tuple[list[int], list[list[int]]]], ranks: list[int]) -> RankedBatch:
    batch = pack([[*prompt, *answer] for prompt, answers in groups for answer in answers])
    cu_groups = torch.tensor([0, *[len(answers) for _, answers in groups]]).cumsum(0).int()
    return RankedBatch(batch, batch.cu_seqlens[1:].long() - 1, cu_groups, torch.tensor(ranks, dtype=torch.int32))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_answers_that_share_their_prompt_score_and_learn_like_separate_sequences(positions: str) -> None:
    config = ModelConfig(
        vocab_size=31, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64, positions=positions
    )
    results = []
    for batch in (shared_prompts(GROUPS, RANKS), whole_sequences(GROUPS, RANKS)):
        model = ScalarModel(config, seed=3)
        place = batch.packed
        scores = model(place.tokens, place.positions, place.cu_seqlens, place.prefix, rows=batch.last_tokens)
        loss, stats = reward_model_loss(model, batch, 1 / 3)
        loss.backward()
        results.append((scores, loss, stats.accuracy, [p.grad for p in model.parameters()]))
    for shared, separate in zip(*results, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-6)


def test_reward_model_loss_is_instruct_gpts_formula() -> None:
    model, batch = ScalarModel(TINY, seed=4), shared_prompts(GROUPS, RANKS)
    place = batch.packed
    scores = model(place.tokens, place.positions, place.cu_seqlens, place.prefix, rows=batch.last_tokens).double()
    losses = []
    for a, b in zip(batch.cu_groups.tolist(), batch.cu_groups.tolist()[1:], strict=False):
        pairs = [(i, j) for i in range(a, b) for j in range(a, b) if RANKS[i] < RANKS[j]]
        losses.append(-sum(torch.nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in pairs) / len(pairs))
    loss, stats = reward_model_loss(model, batch, 1 / 3)
    assert float(loss) == pytest.approx(float(sum(losses) / 3), rel=1e-5)
    assert float(stats.pairs) == 5 + 1 + 1
    assert float(stats.groups) == 3


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])
    white = whiten(x)
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    unshifted = whiten(x, shift_mean=False)
    assert float(unshifted.mean()) == pytest.approx(4.0, rel=1e-5)
    assert whiten(torch.empty(0)).numel() == 0
    assert whiten(torch.full((3,), 2.0)).abs().max() < 1e-3
