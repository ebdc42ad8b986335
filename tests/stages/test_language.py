"""Pretraining and SFT in small: the loss falls, only answers are learnt, the checkpoint is chosen on held-out data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from pyrlhf.data import LengthRule, pack
from pyrlhf.engine import EngineConfig, HybridEngine, OptimizerConfig, TrainingDiverged, ZeroEngine, init_world
from pyrlhf.model import CausalLM
from pyrlhf.rlhf.experience import Responses
from pyrlhf.rollout import Sampling
from pyrlhf.stages import PretrainConfig, sft, train_pretrain, train_sft
from pyrlhf.stages.actors import respond
from pyrlhf.stages.inputs import load_demonstrations, load_texts
from pyrlhf.stages.loop import Sequences, backward_language_model, draws, evaluate_language_model, perplexity

NUMBERS = {"loss", "perplexity", "grad_norm", "lr", "seconds", "tokens_per_second", "peak_memory_gib", "skipped_steps"}


def pretrain_config(house: tiny.House, **settings: Any) -> PretrainConfig:
    defaults = {"data": house.data("text"), "context": 32, "epochs": 3, "batch_size": 16, "optimizer": tiny.LEARNING}
    return PretrainConfig(**(defaults | settings))


def loss_of(folder: Path, data: Sequences) -> float:
    """Mean next-token loss of a checkpoint, one sequence after another."""
    model, total = CausalLM.from_pretrained(folder), 0.0
    for tokens, prompt in zip(data.tokens, data.prompt_lengths, strict=True):
        batch = pack([tokens])
        logprobs = model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens)).log_softmax(-1).detach()
        total -= sum(float(logprobs[p - 1, tokens[p]]) for p in range(max(prompt, 1), len(tokens)))
    return total / data.targets


def test_pretraining_learns_and_says_so(house: tiny.House, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held_out = house.data("text-held-out")
    config = pretrain_config(house, eval_data=held_out, eval_every=5)
    common = house.common(tmp_path)
    out = train_pretrain(config, model=house.model, **common)
    steps, evals = tiny.steps(tmp_path), [line for line in tiny.lines(tmp_path) if "eval/loss" in line]
    assert all(line.keys() == NUMBERS | {"stage", "step", "time"} for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[0]["perplexity"] == pytest.approx(math.exp(steps[0]["loss"]))
    assert [line["step"] for line in evals] == [*range(5, len(steps), 5), len(steps)]
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    data = load_texts("data", held_out, house.tokenizer, 32, common["metrics"])
    assert evals[-1]["eval/loss"] == pytest.approx(loss_of(out, data), rel=1e-5)
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).eos_token_id == house.tokenizer.eos_id


@pytest.mark.parametrize("join", [True, False])
def test_documents_run_on_or_stand_alone(house: tiny.House, tmp_path: Path, join: bool) -> None:
    common = house.common(tmp_path)
    found = load_texts("data", house.data("text-held-out"), house.tokenizer, 32, common["metrics"], join=join)
    eos = house.tokenizer.eos_id
    ended_early = [eos in tokens[:-1] for tokens in found.tokens]
    assert any(ended_early) == join
    config = pretrain_config(house, data=house.data("text-held-out"), epochs=1, join=join)
    assert train_pretrain(config, model=house.model, **common).exists()


def test_sft_learns_answers_only(house: tiny.House, tmp_path: Path) -> None:
    config = tiny.sft_config(house, epochs=4)
    common = house.common(tmp_path)
    out = train_sft(config, model=house.model, **common)
    steps = tiny.steps(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    data = load_demonstrations("data", config.data, house.tokenizer, config.prompt, config.response, common["metrics"])
    assert data.prompt_lengths[0] == len(house.tokenizer.encode_prompt(house.tokenizer.decode(data.prompts[0])))
    whole = Sequences(data.tokens, [0] * len(data))
    answers, everything = (loss_of(house.model, d) - loss_of(out, d) for d in (data, whole))
    assert answers > everything + 0.1


def test_the_gradient_is_of_answer_tokens(house: tiny.House) -> None:
    """A minibatch's gradient is that of the mean of -log p over answer tokens, prompts giving context alone."""
    world = init_world(EngineConfig(device="cpu"))
    batch = Sequences([[5, 6, 7, 8, 9], [10, 11, 12]], [3, 1])
    engine = ZeroEngine(CausalLM.from_pretrained(house.model), world, EngineConfig(device="cpu"), OptimizerConfig())
    loss = backward_language_model(engine, batch, 1000, coef=2.0)
    model, total = CausalLM.from_pretrained(house.model), torch.zeros(())
    for tokens, prompt in zip(batch.tokens, batch.prompt_lengths, strict=True):
        packed = pack([tokens])
        logprobs = model.logits(model(packed.tokens, packed.positions, packed.cu_seqlens)).log_softmax(-1)
        total = total - sum(logprobs[p - 1, tokens[p]] for p in range(prompt, len(tokens)))
    (2.0 * total / 4).backward()
    assert loss == pytest.approx(float(total.detach()) / 4, rel=1e-5)
    assert loss == pytest.approx(evaluate_language_model(engine, batch, 4), rel=1e-5)
    for found, expected in zip(engine.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_cut_answer_is_not_taught_to_end(house: tiny.House, tmp_path: Path) -> None:
    metrics = house.common(tmp_path)["metrics"]
    rules = LengthRule(None), LengthRule(6, "truncate")
    data = load_demonstrations("data", house.data("demonstrations"), house.tokenizer, *rules, metrics)
    answers = [tokens[p:] for tokens, p in zip(data.tokens, data.prompt_lengths, strict=True)]
    assert max(map(len, answers)) == 6
    assert all(answer[-1] != house.tokenizer.eos_id for answer in answers)
    short = LengthRule(9, "truncate")
    data = load_demonstrations("data", house.data("demonstrations"), house.tokenizer, rules[0], short, metrics)
    ends = {len(t) - p: t[-1] == house.tokenizer.eos_id for t, p in zip(data.tokens, data.prompt_lengths, strict=True)}
    assert ends[9] == any(len(f" {w} {w}") == 8 for w in tiny.WORDS)
    assert all(ended for length, ended in ends.items() if length < 9)


def test_the_epoch_with_the_least_held_out_loss_is_kept(house: tiny.House, tmp_path: Path) -> None:
    """A learning rate that grows until it wrecks the model: a later, worse epoch must not be taken."""
    rising = OptimizerConfig(lr=0.5, warmup_steps=12, warmup_start=1e-3)
    held_out = house.data("demonstrations-held-out")
    config = tiny.sft_config(house, epochs=3, eval_data=held_out, optimizer=rising)
    common = house.common(tmp_path)
    out = train_sft(config, model=house.model, **common)
    losses = [line["eval/loss"] for line in tiny.lines(tmp_path) if "eval/loss" in line]
    assert len(losses) == 3
    assert min(losses) < losses[-1] - 0.1
    data = load_demonstrations("data", held_out, house.tokenizer, config.prompt, config.response, common["metrics"])
    assert loss_of(out, data) == pytest.approx(min(losses), rel=1e-4)


def test_a_reward_model_chooses_the_epoch(house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three epochs gets the best score, though neither the first nor the last loss is the worst."""
    scores = iter([0.1, 0.9, 0.5])
    monkeypatch.setattr(sft, "model_scores", lambda *_: lambda responses: torch.full((len(responses),), next(scores)))
    kept: list[dict[str, torch.Tensor]] = []
    real = sft.save_model

    def save(engine: ZeroEngine, *args: Any) -> Path:
        kept.append(engine.full_state_dict())
        return real(engine, *args)

    monkeypatch.setattr(sft, "save_model", save)
    config = tiny.sft_config(house, epochs=3, eval_data=house.data("demonstrations-held-out"), max_new_tokens=4)
    out = train_sft(config, model=house.model, reward_model=house.reward(), **house.common(tmp_path))
    rewards = [line["eval/reward"] for line in tiny.lines(tmp_path) if "eval/reward" in line]
    assert rewards == pytest.approx([0.1, 0.9, 0.5])
    assert len(kept) == 2  # the first epoch and the second, not the third
    assert torch.equal(CausalLM.from_pretrained(out).state_dict()["head.weight"], kept[1]["head.weight"])


def test_a_real_reward_model_scores_held_out_answers(house: tiny.House, tmp_path: Path) -> None:
    settings = {"eval_data": house.data("demonstrations-held-out"), "reward_model": str(house.reward())}
    train_sft(tiny.sft_config(house, max_new_tokens=4, **settings), model=house.model, **house.common(tmp_path))
    rewards = [line["eval/reward"] for line in tiny.lines(tmp_path) if "eval/reward" in line]
    assert len(set(rewards)) == 2
    assert all(math.isfinite(reward) for reward in rewards)


def test_skipped_steps_are_counted_and_three_in_a_row_stop(
    house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ZeroEngine.backward
    bad = {1}

    def backward(engine: ZeroEngine, loss: torch.Tensor, *, last: bool) -> None:
        real(engine, loss * (math.inf if engine.steps in bad else 1.0), last=last)

    monkeypatch.setattr(ZeroEngine, "backward", backward)
    train_sft(tiny.sft_config(house), model=house.model, **house.common(tmp_path / "one"))
    assert [line["skipped_steps"] for line in tiny.steps(tmp_path / "one")] == [0, 1, 1, 1, 1, 1]
    assert tiny.steps(tmp_path / "one")[1]["nonfinite"] == ["grad_norm"]
    bad |= {2, 3}
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train_sft(tiny.sft_config(house), model=house.model, **house.common(tmp_path / "three"))


def test_a_sequence_longer_than_the_context_is_refused_before_work(house: tiny.House, tmp_path: Path) -> None:
    long = house.write("long", [{"prompt": "p" * 60, "response": "r" * 60}])
    with pytest.raises(ValueError, match=r"sft\.prompt, sft\.response: expected sequences of at most 64 tokens"):
        train_sft(tiny.sft_config(house, data=long), model=house.model, **house.common(tmp_path))
    with pytest.raises(ValueError, match=r"pretrain\.context: expected sequences of at most 64 tokens"):
        train_pretrain(pretrain_config(house, context=100), model=house.model, **house.common(tmp_path))
    assert not tiny.steps(tmp_path)


def test_data_that_is_missing_or_all_dropped_is_named(house: tiny.House, tmp_path: Path) -> None:
    nothing = replace(tiny.sft_config(house), prompt=LengthRule(1))
    with pytest.raises(ValueError, match=r"sft\.data: expected at least one usable record"):
        train_sft(nothing, model=house.model, **house.common(tmp_path))
    with pytest.raises(ValueError, match=r"pretrain\.data\.path: expected"):
        train_pretrain(PretrainConfig(), model=house.model, **house.common(tmp_path))


def test_draws_go_through_all_items_again_and_again_in_full_batches() -> None:
    batch = draws(5, 3, seed=1)
    drawn = [i for k in range(5) for i in batch(k)]
    assert [sorted(drawn[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert drawn[:5] != drawn[5:10]
    assert batch(3) == drawn[9:12]  # a function of k alone
    assert len(draws(2, 5, seed=1)(0)) == 5


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
    assert perplexity(0.0) == 1.0


def test_samples_as_text_files(house: tiny.House, tmp_path: Path) -> None:
    from pyrlhf.stages import GenerateConfig, write_samples

    def rows(name: str, batch_size: int) -> list[dict[str, Any]]:
        config = GenerateConfig(
            prompts=house.data("prompts"), count=14, held_out=3, max_new_tokens=5, batch_size=batch_size
        )
        folder = write_samples(config, model=house.folder / "terse", **house.common(tmp_path / name))
        parts = [(folder / f"{part}.jsonl").read_text().splitlines() for part in ("samples", "held_out")]
        assert list(map(len, parts)) == [11, 3]
        return [json.loads(line) for part in parts for line in part]

    found = rows("one", 14)
    assert found == rows("two", 4)  # a sample depends on its id, not on the batch
    prompts = [json.loads(line)["prompt"] for line in (house.folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == (prompts * 2)[:14]
    for row in found:
        assert row["text"] == row["prompt"] + row["response"]
        assert row["finish"] in ("eos", "length")
    assert {row["finish"] for row in found} == {"eos", "length"}
    assert found[0]["response"] != found[10]["response"]  # the same prompt again, another sample
    free = write_samples(
        GenerateConfig(count=2, max_new_tokens=3), model=house.model, **house.common(tmp_path / "free")
    )
    assert [json.loads(line)["prompt"] for line in (free / "samples.jsonl").read_text().splitlines()] == ["", ""]


def test_samples_without_text_are_left_out_and_counted(
    house: tiny.House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyrlhf.stages import GenerateConfig, generate

    def every_other(policy: Any, prompts: list[list[int]], *args: Any, first_id: int) -> Responses:
        """From nothing but BOS, every other sample ends at once, as a model may do."""
        answers = [[*house.tokenizer.encode("red"), 1] if i % 2 else [1] for i in range(len(prompts))]
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        logprobs = [torch.zeros(len(answer)) for answer in answers]
        return Responses(sequences, list(map(len, prompts)), ["eos"] * len(prompts), logprobs)

    monkeypatch.setattr(generate, "respond", every_other)
    settings = GenerateConfig(count=6, held_out=1)
    folder = generate.write_samples(settings, model=house.model, **house.common(tmp_path / "some"))
    parts = [(folder / f"{part}.jsonl").read_text().splitlines() for part in ("samples", "held_out")]
    assert [[json.loads(line)["text"] for line in part] for part in parts] == [["red"] * 2, ["red"]]
    assert "3 of 6 samples left out: empty texts" in capsys.readouterr().out
    settings = GenerateConfig(count=6, held_out=4)
    with pytest.raises(ValueError, match=r"generate\.count: expected more than held_out \(4\) .* found 3 among 6"):
        generate.write_samples(settings, model=house.model, **house.common(tmp_path / "none"))


def test_a_rank_without_prompts_still_gets_all_responses(house: tiny.House) -> None:
    """One prompt and two ranks, played one after the other: the first has nothing to answer."""
    engine = HybridEngine(CausalLM.from_pretrained(house.model), EngineConfig(device="cpu"))
    sampling = Sampling(4)
    whole = respond(engine, [[5, 6]], sampling, n=2)
    own: list[Responses] = []

    def gather(part: Any) -> list[Any]:
        if isinstance(part, Responses):
            own.append(part)
        return [part]

    for rank in (0, 1):
        engine.world = SimpleNamespace(rank=rank, size=2, gather=gather)
        respond(engine, [[5, 6]], sampling, n=2)
    assert [len(part) for part in own] == [0, 2]
    joined = Responses.join(own)
    assert joined.sequences == whole.sequences
    assert joined.finish == whole.finish


PHASES = """
import torch
from pyrlhf.stages.loop import Stopwatch
watch = Stopwatch()
watch.lap("before")
torch.ones(64 << 18)  # 64 MiB, given back at once
watch.lap("large")
watch.lap("after")
print(*(watch.numbers[f"peak_memory_gib/{phase}"] for phase in ("before", "large", "after")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a process's peak")
def test_each_phase_has_its_own_peak_of_memory() -> None:
    """In a process of its own: where `keep_freed_memory` was called, freed memory stays with the process."""
    ran = subprocess.run(
        [sys.executable, "-c", PHASES],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    before, large, after = map(float, ran.stdout.split())
    assert large > after + 0.05
    assert large > before - 1e-3
