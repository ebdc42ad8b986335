"""PPO and PPO-ptx in small: what is logged, what is written, every option, an easy task that is learnt."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pyrlhf.engine import EngineConfig, OptimizerConfig, TrainingDiverged, ZeroEngine, init_world
from pyrlhf.model import CausalLM, ScalarModel
from pyrlhf.rlhf.experience import Experience, Responses, assemble
from pyrlhf.stages import PPOConfig, ppo
from pyrlhf.stages.actors import function_scores, texts

#: Numbers that recipe by recipe a person asks for, under the names they have in metrics.jsonl.
NUMBERS = {
    *("reward_raw", "reward", "reward_std", "reward_with_kl", "kl", "kl_k3", "kl_per_token", "kl_coef", "entropy"),
    *("ratio_mean", "ratio_max", "first_ratio_max", "first_approx_kl", "approx_kl", "clip_fraction"),
    *("policy_loss", "value_loss", "value_clip_fraction", "explained_variance", "advantage_std"),
    *("response_length", "eos_rate", "ptx_loss", "grad_norm", "critic_grad_norm", "lr", "critic_lr"),
    *("tokens_per_second/rollout", "tokens_per_second/training", "tokens_per_second"),
    *("seconds/rollout", "seconds/experience", "seconds/training", "seconds", "peak_memory_gib", "skipped_steps"),
    *("mismatch/mean", "mismatch/max", "mismatch/k3"),
    *("seconds/refresh", "seconds/prefill", "seconds/decode"),
    *("peak_memory_gib/rollout", "peak_memory_gib/experience", "peak_memory_gib/training"),
    *("rollout/refresh_bytes", "rollout/cache_bytes", "rollout/peak_pages", "rollout/preemptions"),
}


def run(house: tiny.House, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    tiny.run_ppo(house, folder, **settings)
    return tiny.steps(folder)


def test_every_number_is_logged_at_every_update(house: tiny.House, tmp_path: Path) -> None:
    steps = run(house, tmp_path, ptx_coef=1.0, updates=3)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line.keys() == NUMBERS | {"stage", "step", "time"}
        assert all(math.isfinite(line[name]) for name in NUMBERS)
        assert line["mismatch/max"] <= 1e-5
        assert line["first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert line["first_approx_kl"] == pytest.approx(0.0, abs=1e-5)
        assert 0 <= line["entropy"] <= math.log(house.tokenizer.vocab_size)
        assert line["seconds/rollout"] + line["seconds/training"] <= line["seconds"]
        peaks = [line[f"peak_memory_gib/{phase}"] for phase in ("rollout", "experience", "training")]
        assert 0 < max(peaks) <= line["peak_memory_gib"]
    first = steps[0]  # the policy is the reference, and its critic is the reward model, before the first step
    assert first["kl"] == first["kl_k3"] == 0.0
    assert first["reward_with_kl"] == pytest.approx(first["reward"])
    assert steps[-1]["kl_k3"] > 0


def test_at_update_0_the_ratio_is_1(house: tiny.House, tmp_path: Path) -> None:
    """One minibatch and one pass: nothing is trained before all ratios are taken. The temperature is in all log-probs alike."""
    (line,) = run(house, tmp_path, updates=1, minibatches=1, temperature=0.7, tokens_per_microbatch=30)
    assert line["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert line["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert abs(line["approx_kl"]) <= 1e-5
    assert line["clip_fraction"] == 0
    assert line["mismatch/max"] <= 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_makes_the_ratio_1_to_the_last_bit(house: tiny.House, tmp_path: Path, dtype: str) -> None:
    """At every update the sampler's log-probs are training's, and the first minibatch's ratios are exactly 1."""
    settings = {"minibatches": 2, "temperature": 0.7, "tokens_per_microbatch": 30}
    for line in run(house, tmp_path, updates=3, exact=True, dtype=dtype, **settings):
        assert line["mismatch/max"] == 0.0
        assert line["first_ratio_max"] == 1.0
        assert line["first_approx_kl"] == 0.0
        assert line["grad_norm"] > 0


def test_files_that_ppo_leaves(house: tiny.House, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    held_out = {"eval_prompts": house.data("prompts-held-out"), "ptx_eval_data": house.data("text-held-out")}
    run(house, tmp_path, **held_out, updates=3, eval_every=1, sample_every=2, ema_decay=0.5)
    table = json.loads((tmp_path / "evaluation.json").read_text())
    assert table.keys() == {"start", "policy", "ema"}
    names = {"reward", "reward_std", "gain_in_std", "win_rate", "kl", "response_length", "eos_rate", "ptx_perplexity"}
    for row in table.values():
        assert row.keys() == names
        assert all(math.isfinite(value) for value in row.values())
    assert table["start"]["win_rate"] == 0.5
    assert table["start"]["gain_in_std"] == table["start"]["kl"] == 0
    for who in table:
        answers = json.loads((tmp_path / f"{who}.json").read_text())
        assert answers["prompts"] == [f"tell {i}:" for i in range(6)]
        assert len(answers["responses"]) == len(answers["scores"]) == 6
    logged = [line for line in tiny.lines(tmp_path) if "eval/reward" in line]
    assert [line["step"] for line in logged] == [0, 1, 2, 3]
    assert logged[-1]["eval/reward"] == table["policy"]["reward"]
    (average,) = (line for line in tiny.lines(tmp_path) if "eval_ema/reward" in line)
    assert average["eval_ema/reward"] == table["ema"]["reward"]
    sampled = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in sampled if "finish" in row] == [1] * 8 + [3] * 8
    assert {row["step"] for row in sampled if "start" in row} == {1, 2, 3}
    for kind, folder in ((AutoModelForCausalLM, "model"), (AutoModelForCausalLM, "ema")):
        kind.from_pretrained(tmp_path / folder)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert not torch.equal(*(tiny.weights(tmp_path / f)["transformer.wte.weight"] for f in ("model", "ema")))


OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "truncated drop": {"truncated": "drop"},
    "truncated score": {"truncated": "score"},
    "k2": {"kl_penalty": "k2"},
    "k3": {"kl_penalty": "k3"},
    "adaptive KL": {"kl_target": 1e-3, "kl_horizon": 80},
    "whitened rewards": {"whiten_rewards": True},
    "clipped reward": {"truncated": "score", "reward_clip": 0.05},
    "raw advantages": {"whiten_advantages": False},
    "discount": {"gamma": 0.9, "lam": 0.5},
    "dual clip": {"dual_clip": 3.0},
    "no value clip": {"value_clip": None},
    "entropy bonus": {"entropy_coef": 0.1},
    "rollout correction": {"rollout_correction": 2.0},
    "samples a prompt": {"samples_per_prompt": 4},
    "epochs": {"epochs": 3},
    "one minibatch": {"minibatches": 1},
    "ragged minibatches": {"minibatches": 3},
    "critic warm-up": {"critic_warmup": 1, "ptx_coef": 1.0},
    "ptx": {"ptx_coef": 1.0},
    "no moving average": {"ema_decay": 0.0},
    "reward function": {"reward_function": "tiny:letters"},
    "bf16": {"dtype": "bf16"},
}


@pytest.fixture(scope="module")
def logs(house: tiny.House, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The lines of two updates under each option."""
    return {}


@pytest.fixture
def option(house: tiny.House, logs: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """option(name) -> the lines of two updates under it, run once."""

    def lines(name: str) -> list[dict[str, Any]]:
        if name not in logs:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            logs[name] = run(house, folder, model="terse", batch_size=16, **OPTIONS[name])
        return logs[name]

    return lines


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_runs_and_logs_finite_numbers(option: Any, name: str) -> None:
    lines = option(name)
    assert len(lines) == 2
    for line in lines:
        assert line.keys() >= NUMBERS - {"ptx_loss", "grad_norm", "lr"}
        assert all(isinstance(value, (int, float)) for key, value in line.items() if key != "stage"), line
        assert line["skipped_steps"] == 0
        assert 0 < line["eos_rate"] < 1  # so that the fate of truncated responses is tried


def test_truncated_responses_are_penalised_scored_or_dropped(option: Any) -> None:
    penalised, scored, dropped = (option(name)[0] for name in ("no option", "truncated score", "truncated drop"))
    assert penalised["eos_rate"] == scored["eos_rate"] == dropped["eos_rate"]  # the same responses
    assert scored["reward"] == scored["reward_raw"] == penalised["reward_raw"]
    ended = penalised["eos_rate"]
    assert penalised["reward"] == pytest.approx(ended * dropped["reward"] - (1 - ended), abs=1e-5)
    assert penalised["response_length"] == dropped["response_length"]


def test_the_adaptive_coefficient_moves_with_the_kl(option: Any) -> None:
    first, second = option("adaptive KL")
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl_coef"] == pytest.approx(first["kl_coef"] * (1 - 0.2 * 16 / 80))
    assert option("no option")[1]["kl_coef"] == first["kl_coef"] == 0.02


def test_rewards_are_clipped_and_whitened(option: Any) -> None:
    clipped = option("clipped reward")[0]
    assert abs(clipped["reward"]) <= 0.05
    assert abs(clipped["reward_raw"]) > 0.05 or clipped["reward_std"] <= 0.05
    plain, white = option("no option")[0], option("whitened rewards")[0]
    assert white["reward"] == plain["reward"]
    assert white["reward_with_kl"] == pytest.approx(plain["reward_with_kl"], rel=1e-4)  # the mean stays
    assert white["advantage_std"] > 1.2 * plain["advantage_std"]  # rewards at one token in six vary by less than 1


def test_the_critic_warms_up_alone(house: tiny.House, tmp_path: Path) -> None:
    run(house, tmp_path, updates=3, critic_warmup=2, save_every=2, ptx_coef=1.0, ema_decay=0.5)
    warm, _, trained = tiny.steps(tmp_path)
    assert warm.keys() == NUMBERS - {"grad_norm", "lr", "ptx_loss"} | {"stage", "step", "time"}
    assert warm["critic_grad_norm"] > 0
    assert warm["ratio_max"] == warm["ratio_mean"] == pytest.approx(1.0)
    assert trained.keys() >= NUMBERS
    assert trained["kl_k3"] == 0  # its responses were drawn from a policy that had not moved


def test_more_epochs_are_more_steps(house: tiny.House, tmp_path: Path) -> None:
    once = OptimizerConfig(lr=1e-3, schedule="linear")
    line = run(house, tmp_path, epochs=2, updates=1, policy_optimizer=once)[0]
    assert line["lr"] == pytest.approx(
        1e-3 * (1 + 0.75 + 0.5 + 0.25) / 4
    )  # four steps, to an end that the schedule knows


def test_samples_of_a_prompt_differ_and_the_last_prompts_fill_the_batch(house: tiny.House, tmp_path: Path) -> None:
    run(
        house, tmp_path, samples_per_prompt=4, batch_size=24, updates=2, sample_every=1
    )  # 6 of the 10 prompts an update
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert len({row["prompt"] for row in rows[:4]}) == 1
    assert len({row["response"] for row in rows[:4]}) > 1


def test_entropy_bonus_raises_entropy(house: tiny.House, tmp_path: Path) -> None:
    common: dict[str, Any] = {"updates": 3, "reward_function": "tiny:letters", "model": "terse", "batch_size": 16}
    plain, bonus = (run(house, tmp_path / str(c), entropy_coef=c, **common)[-1] for c in (0.0, 1.0))
    assert bonus["entropy"] > plain["entropy"]


def experience(count: int = 6) -> Experience:
    """An experience of `count` response tokens with made-up numbers."""
    generator = torch.Generator().manual_seed(0)
    made = replace(Experience.idle(), **{f.name: torch.empty(0) for f in fields(Experience) if f.name in ("scores",)})
    names = ("sampled_logprobs", "logprobs", "ref_logprobs", "values", "advantages", "returns", "entropy")
    return replace(made, **{name: torch.randn(count, generator=generator) for name in names})


def test_rollout_correction_weighs_the_policy_loss_alone() -> None:
    given = experience()
    plain, fixed = (ppo.weigh(given, PPOConfig(rollout_correction=cap)) for cap in (None, 1.5))
    expected = (given.logprobs - given.sampled_logprobs).exp().clamp(max=1.5)
    torch.testing.assert_close(fixed.advantages, plain.advantages * expected)
    assert float(expected.max()) == 1.5
    assert torch.equal(fixed.weights, plain.weights)
    assert float(plain.weights.sum()) == pytest.approx(1)
    assert float(plain.advantages.mean()) == pytest.approx(0, abs=1e-6)
    raw = ppo.weigh(given, PPOConfig(whiten_advantages=False))
    assert torch.equal(raw.advantages, given.advantages)


@pytest.mark.parametrize("settings", [{}, {"dual_clip": 1.5}, {"value_clip": None}, {"clip": 0.05}])
def test_gradients_of_both_models_are_those_of_the_whole_loss(settings: dict[str, Any]) -> None:
    """Each model's backward starts from its part of the loss's gradient: the same as one backward of the formula."""
    config = PPOConfig(**settings)
    given = ppo.weigh(experience(64), config)
    new = [given.logprobs + 0.3 * torch.randn(64), given.values + torch.randn(64)]
    logprobs, values = (x.double().requires_grad_() for x in new)
    old = given.to("cpu")
    ratio, adv = (logprobs - old.logprobs).exp(), old.advantages
    policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - config.clip, 1 + config.clip))
    if config.dual_clip is not None:
        policy = torch.where(adv < 0, torch.minimum(policy, -config.dual_clip * adv), policy)
    error = (values - old.returns).square()
    if config.value_clip is not None:
        near = values.clamp(old.values - config.value_clip, old.values + config.value_clip)
        error = torch.maximum(error, (near - old.returns).square())
    (policy.mean() + 0.5 * error.mean()).backward()
    _, dlogprobs, dvalues = ppo.ppo_gradients(*new, given, config)
    assert logprobs.grad is not None
    assert values.grad is not None
    torch.testing.assert_close(dlogprobs.double(), logprobs.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(dvalues.double(), values.grad, rtol=1e-4, atol=1e-7)


def test_the_critic_runs_when_the_policy_s_activations_are_gone(
    house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training only one of the two models holds what its backward needs."""
    events: list[tuple[str, str]] = []
    run_forward, run_backward = ZeroEngine.__call__, ZeroEngine.backward

    def forward(engine: ZeroEngine, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and engine.trains:
            events.append((type(engine.module).__name__, "forward"))
        return run_forward(engine, *args, **kwargs)

    def backward(engine: ZeroEngine, loss: torch.Tensor, *, last: bool) -> None:
        events.append((type(engine.module).__name__, "backward"))
        run_backward(engine, loss, last=last)

    monkeypatch.setattr(ZeroEngine, "__call__", forward)
    monkeypatch.setattr(ZeroEngine, "backward", backward)
    run(house, tmp_path, updates=1, tokens_per_microbatch=40)
    cycle = [(model, way) for model in ("CausalLM", "ScalarModel") for way in ("forward", "backward")]
    assert len(events) > 4
    assert events == cycle * (len(events) // 4)


def test_minibatches_hold_every_response_once() -> None:
    responses = Responses([[1, 2 + i] for i in range(7)], [1] * 7, ["eos"] * 7, [torch.zeros(1)] * 7)
    whole = assemble(responses, torch.arange(7.0))
    parts = list(ppo.minibatches(whole, 3, seed=5))
    assert sorted(len(p) for p in parts) == [2, 2, 3]
    assert sorted(score for p in parts for score in p.scores.tolist()) == list(range(7))
    again = [p.scores.tolist() for p in ppo.minibatches(whole, 3, seed=5)]
    assert again == [p.scores.tolist() for p in parts]
    assert again != [p.scores.tolist() for p in ppo.minibatches(whole, 3, seed=6)]
    assert len(list(ppo.minibatches(whole, 9, seed=5))) == 7


LEARN: dict[str, Any] = {
    "reward_function": "tiny:letters",
    "truncated": "score",
    "updates": 15,
    "batch_size": 64,
    "minibatches": 4,
    "kl_coef": 0.0,
    "sample_every": 0,
    "policy_optimizer": OptimizerConfig(lr=1e-2, warmup_steps=4),
    "critic_optimizer": OptimizerConfig(lr=5e-3),
}


def test_an_easy_task_is_learnt(house: tiny.House, tmp_path: Path) -> None:
    steps = run(house, tmp_path, **LEARN, eval_prompts=house.data("prompts-held-out"))
    rewards = [line["reward"] for line in steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    table = json.loads((tmp_path / "evaluation.json").read_text())
    assert table["policy"]["reward"] > table["start"]["reward"] + 0.3
    assert table["policy"]["win_rate"] > 0.7
    assert steps[-1]["kl_k3"] > steps[0]["kl_k3"]


def test_ptx_of_27_8_trains_stably(house: tiny.House, tmp_path: Path) -> None:
    """InstructGPT's coefficient, which users of other programs report unstable: rewards rise, the text is not unlearnt."""
    steps = run(house, tmp_path, **LEARN, ptx_coef=27.8, ptx_eval_data=house.data("text-held-out"))
    assert all(isinstance(value, (int, float)) for line in steps for key, value in line.items() if key != "stage")
    assert steps[-1]["skipped_steps"] == 0
    assert sum(line["reward"] for line in steps[-3:]) / 3 > sum(line["reward"] for line in steps[:3]) / 3 + 0.1
    ptx = [line["ptx_loss"] for line in steps]
    assert max(b - a for a, b in zip(ptx, ptx[1:])) < 0.05
    assert ptx[-1] < ptx[0] - 0.1
    table = json.loads((tmp_path / "evaluation.json").read_text())
    assert table["policy"]["ptx_perplexity"] < table["start"]["ptx_perplexity"]
    assert max(line["grad_norm"] for line in steps) > 1  # so clipping to 1 had something to do


def test_a_skipped_step_is_counted_and_three_in_a_row_stop_the_run(
    house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ZeroEngine.backward

    def bad_from(first: int, last: int) -> None:
        def backward(engine: ZeroEngine, loss: torch.Tensor, *, last: bool) -> None:
            real(engine, loss * (math.nan if is_critic(engine) and engine.steps in bad else 1.0), last=last)

        bad = range(first, last)
        monkeypatch.setattr(ZeroEngine, "backward", backward)

    def is_critic(engine: ZeroEngine) -> bool:
        return isinstance(engine.module, ScalarModel)

    bad_from(2, 4)  # both steps of the second update
    steps = run(house, tmp_path / "two", updates=3)
    assert [line["skipped_steps"] for line in steps] == [0, 2, 2]
    assert steps[1]["critic_grad_norm"] is None
    assert "critic_grad_norm" in steps[1]["nonfinite"]
    assert steps[2]["critic_grad_norm"] > 0
    bad_from(2, 5)
    with pytest.raises(TrainingDiverged, match="3 steps in a row were skipped: the loss of step 4 is not finite"):
        run(house, tmp_path / "three", updates=3)
    assert [line["step"] for line in tiny.steps(tmp_path / "three")] == [1, 2]


def test_the_critic_without_a_reward_model_says_0(house: tiny.House, tmp_path: Path) -> None:
    from pyrlhf.stages.actors import zero_critic

    tokens = torch.tensor([3, 4, 5])
    values = zero_critic(house.model)(tokens, torch.arange(3), torch.tensor([0, 3], dtype=torch.int32))
    assert values.tolist() == [0, 0, 0]


def test_the_text_of_a_response_keeps_its_first_space(house: tiny.House) -> None:
    prompt, response = house.tokenizer.encode_prompt("say red:"), house.tokenizer.encode_response(" red")
    responses = Responses([[*prompt, *response]], [len(prompt)], ["eos"], [torch.zeros(len(response))])
    assert texts(responses, house.tokenizer) == (["say red:"], [" red"])


def too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0]


def not_finite(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan for _ in responses]


def test_scores_of_a_reward_function_are_checked(house: tiny.House, monkeypatch: pytest.MonkeyPatch) -> None:
    world = init_world(EngineConfig(device="cpu"))
    responses = Responses([[5, 6, 7], [5, 6, 8]], [2, 2], ["eos", "eos"], [torch.zeros(1)] * 2)
    for function, said in ((too_few, "found 1, 1 of them finite"), (not_finite, "found 2, 0 of them finite")):
        monkeypatch.setattr(tiny, "letters", function)
        with pytest.raises(
            ValueError, match=rf"ppo.reward_function: expected 2 finite scores from tiny:letters, {said}"
        ):
            function_scores("tiny:letters", house.tokenizer, world)(responses)


@pytest.mark.parametrize("name", ["tiny", "tiny:nothing", "no_such_module:f"])
def test_a_reward_function_that_is_not_there_is_named(house: tiny.House, name: str) -> None:
    with pytest.raises(ValueError, match=rf"ppo\.reward_function: .*{name}"):
        function_scores(name, house.tokenizer, init_world(EngineConfig(device="cpu")))


def test_a_dropped_batch_skips_its_update_and_three_in_a_row_stop(
    house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"truncated": "drop", "batch_size": 2, "minibatches": 1, "updates": 6, "reward_function": "tiny:letters"}
    batches = iter([False, True, True, False, True, True])

    def some_end(policy: Any, prompts: Any, *args: Any, n: int, first_id: int) -> Responses:
        finish = "length" if next(batches) else "eos"
        return Responses([[5, 6, 7]] * 2, [2, 2], [finish] * 2, [torch.full((1,), -5.0)] * 2)

    monkeypatch.setattr(ppo, "respond", some_end)
    lines = run(house, tmp_path / "some", **settings)
    assert [line["responses_kept"] for line in lines] == [2, 0, 0, 2, 0, 0]
    assert lines[-1]["empty_updates"] == 4
    assert ["grad_norm" in line for line in lines] == [True, False, False, True, False, False]
    assert "update 2 skipped: every response was truncated" in capsys.readouterr().out
    batches = iter([False, True, True, True])
    with pytest.raises(ValueError, match=r"ppo\.truncated: 'drop' left no response of 3 batches in a row"):
        run(house, tmp_path / "none", **settings)


def test_models_that_do_not_fit_each_other_are_refused(house: tiny.House, tmp_path: Path) -> None:
    small = CausalLM.from_pretrained(house.model).config
    ScalarModel(replace(small, vocab_size=300)).save_pretrained(tmp_path / "other", house.tokenizer)
    ScalarModel(replace(small, max_positions=8)).save_pretrained(tmp_path / "short", house.tokenizer)
    for reward, said in (("other", "one vocabulary, found .*300"), ("short", "at most 8 tokens")):
        config = tiny.ppo_config(house)
        with pytest.raises(ValueError, match=said):
            ppo.train_ppo(
                config,
                policy=house.model,
                reference=house.model,
                reward=tmp_path / reward,
                **house.common(tmp_path / "run"),
            )
    with pytest.raises(ValueError, match=r"ppo\.reward_model: expected a reward model"):
        ppo.train_ppo(
            tiny.ppo_config(house),
            policy=house.model,
            reference=house.model,
            reward=None,
            **house.common(tmp_path / "run"),
        )
