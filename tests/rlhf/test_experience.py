"""Experience: packing, selecting, rewards and advantages against a plain loop; the same for any number of ranks and any budget."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pyrlhf.model import CausalLM, ModelConfig, ScalarModel
from pyrlhf.rlhf import experience as ex
from pyrlhf.rlhf import kl

TINY = ModelConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, max_positions=64)
CPU = torch.device("cpu")
ALONE = SimpleNamespace(rank=0, size=1, device=CPU, gather=lambda x: [x])


def responses() -> ex.Responses:
    sequences = [[1, 5, 6, 7, 2], [1, 9, 2], [1, 3, 3, 3, 3, 3, 3], [1, 8, 4, 2]]
    prompt_lengths = [2, 1, 3, 2]
    logprobs = [torch.linspace(-2, -1, len(s) - p) for s, p in zip(sequences, prompt_lengths, strict=True)]
    return ex.Responses(sequences, prompt_lengths, ["eos", "eos", "length", "eos"], logprobs)


def analysed(budget: int = 100) -> ex.Experience:
    policy, reference, critic = CausalLM(TINY, seed=1), CausalLM(TINY, seed=2), ScalarModel(TINY, seed=3)
    experience = ex.assemble(responses(), torch.tensor([1.0, -2.0, 0.5, 3.0]))
    return ex.analyse(
        experience, policy=policy, reference=reference, critic=critic, world=ALONE, budget=budget, temperature=0.7
    )


def test_assembled_rows_stand_before_the_response_tokens() -> None:
    experience = ex.assemble(responses(), torch.zeros(4))
    assert experience.targets.tolist() == [6, 7, 2, 9, 2, 3, 3, 3, 3, 4, 2]
    assert experience.response_lengths.tolist() == [3, 2, 4, 2]
    assert experience.sums(torch.ones(11)).tolist() == [3, 2, 4, 2]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [2], [3, 0], []])
def test_selecting_packs_anew(chosen: list[int]) -> None:
    whole = analysed()
    part = whole.select(chosen)
    assert part.lengths == [whole.lengths[i] for i in chosen]
    for name in ("logprobs", "values", "targets", "sampled_logprobs"):
        pieces = getattr(whole, name).split(whole.response_lengths.tolist())
        expected = torch.cat([pieces[i] for i in chosen]) if chosen else pieces[0][:0]
        assert torch.equal(getattr(part, name), expected)


def test_selection_gives_the_models_the_same_sequences() -> None:
    policy, whole = CausalLM(TINY, seed=1), analysed()
    part = whole.select([3, 1])
    logprobs, _ = policy(
        part.tokens, part.positions, part.cu_seqlens, rows=part.rows, targets=part.targets, temperature=0.7
    )
    torch.testing.assert_close(logprobs, part.logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 8, 11])
def test_analysis_does_not_depend_on_the_token_budget(budget: int) -> None:
    small, large = analysed(budget), analysed()
    for name in ("logprobs", "entropy", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-5, atol=1e-6)


def test_analysis_is_a_plain_forward() -> None:
    experience, policy = analysed(), CausalLM(TINY, seed=1)
    i = 0
    for tokens, prompt in zip(responses().sequences, responses().prompt_lengths, strict=True):
        t, n = torch.tensor(tokens), len(tokens)
        hidden = policy(t, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
        expected = (policy.logits(hidden) / 0.7).log_softmax(-1).detach()
        for p in range(prompt, n):
            assert float(experience.logprobs[i]) == pytest.approx(float(expected[p - 1, tokens[p]]), abs=1e-5)
            i += 1
    assert i == len(experience.logprobs)


def test_two_ranks_see_what_one_sees() -> None:
    lengths = [3, 9, 2, 5, 7]
    seen: list[list[dict[int, int]]] = [[], []]

    def rank(r: int, others: list[dict[int, int]]) -> list[int]:
        def gather(found: dict[int, int]) -> list[dict[int, int]]:
            seen[r].append(dict(found))
            return [found, *others]

        world = SimpleNamespace(rank=r, size=2, device=CPU, gather=gather)
        return ex.over_ranks(world, lengths, 9, lambda indices: [lengths[i] for i in indices])

    both = dict(enumerate(lengths))
    assert rank(0, [both]) == rank(1, [both]) == [3, 9, 2, 5, 7]
    first, second = seen[0][0], seen[1][0]
    assert first | second == both
    assert not first.keys() & second.keys()


def test_rewards_and_advantages_are_the_textbook_loop() -> None:
    experience = ex.reward_tokens(analysed(), kl_coef=0.1, reward_clip=2.0)
    experience = ex.estimate_advantages(experience, gamma=0.9, lam=0.8)
    scores = [1.0, -2.0, 0.5, 2.0]
    for s, (a, b) in enumerate(
        zip(experience.cu_responses.tolist(), experience.cu_responses.tolist()[1:], strict=False)
    ):
        kl = experience.logprobs[a:b] - experience.ref_logprobs[a:b]
        rewards = [-0.1 * float(k) for k in kl]
        rewards[-1] += scores[s]
        values, advantage = [*experience.values[a:b].tolist(), 0.0], 0.0
        for t in reversed(range(b - a)):
            delta = rewards[t] + 0.9 * values[t + 1] - values[t]
            advantage = delta + 0.9 * 0.8 * advantage
            assert float(experience.advantages[a + t]) == pytest.approx(advantage, abs=1e-5)
            assert float(experience.returns[a + t]) == pytest.approx(advantage + values[t], abs=1e-5)


def test_whitened_rewards_keep_their_mean() -> None:
    plain = ex.reward_tokens(analysed(), kl_coef=0.1).rewards
    white = ex.reward_tokens(analysed(), kl_coef=0.1, whiten_rewards=True).rewards
    assert float(white.mean()) == pytest.approx(float(plain.mean()), abs=1e-5)
    assert float(white.std(unbiased=False)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "context", [64, 8, 7]
)  # the truncated response of 7 tokens leaves room for EOS, just so, or not
def test_scores_are_read_at_the_end_of_sequence_token_even_where_a_response_has_none(context: int) -> None:
    reward, found = ScalarModel(TINY, seed=5), responses()
    scores = ex.score_responses(reward, found, world=ALONE, budget=100, eos_id=2, context=context)
    for tokens, score in zip(found.sequences, scores, strict=True):
        ended = tokens if tokens[-1] == 2 else [*tokens[: context - 1], 2]
        n = len(ended)
        whole = reward(torch.tensor(ended), torch.arange(n), torch.tensor([0, n], dtype=torch.int32)).detach()
        assert float(score) == pytest.approx(float(whole[-1]), abs=1e-5)


def test_mismatch_reports_the_difference_between_sampler_and_training() -> None:
    experience = analysed()
    experience.sampled_logprobs = experience.logprobs + torch.tensor([0.5] + [0.0] * 10)
    found = ex.mismatch(experience)
    assert found["mismatch/max"] == pytest.approx(0.5, rel=1e-5)
    assert found["mismatch/mean"] == pytest.approx(0.5 / 11, rel=1e-4)
    assert found["mismatch/k3"] > 0


@pytest.mark.parametrize("truncated_score", [None, -1.5])
def test_a_truncated_response_gets_its_fixed_score(truncated_score: float | None) -> None:
    found = ex.reward_tokens(analysed(), kl_coef=0.0, truncated_score=truncated_score, reward_clip=2.0)
    assert found.scores.tolist() == [1.0, -2.0, 0.5, 3.0]
    assert found.outcomes.tolist() == [1.0, -2.0, 0.5 if truncated_score is None else -1.5, 2.0]
    assert torch.equal(found.sums(found.rewards), found.outcomes)
    assert found.select([2]).outcomes.tolist() == found.outcomes[2:3].tolist()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_the_chosen_estimate_at_every_token(estimator: kl.Estimator) -> None:
    experience = ex.reward_tokens(analysed(), kl_coef=0.5, estimator=estimator)
    penalty = kl.kl_estimate(experience.logprobs, experience.ref_logprobs, estimator)
    torch.testing.assert_close(experience.sums(experience.rewards), experience.scores - 0.5 * experience.sums(penalty))


def test_responses_know_how_they_ended_and_come_apart_and_together() -> None:
    found = responses()
    assert found.truncated == [False, False, True, False]
    assert found.eos_rate == 0.75
    assert found.tokens == 11
    again = ex.Responses.join([found.select([0, 1]), found.select([]), found.select([2, 3])])
    assert vars(again) == vars(found)
