"""The reward model in small: rankings of any K are learnt, ties make no pair, scores are calibrated."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from pyrlhf.data import DataConfig, EncodedRanking, LengthRule
from pyrlhf.engine import EngineConfig, OptimizerConfig, ZeroEngine, init_world
from pyrlhf.evaluate import reward_accuracy, score_rankings
from pyrlhf.model import ScalarModel
from pyrlhf.stages import train_reward
from pyrlhf.stages.inputs import load_rankings
from pyrlhf.stages.reward import reward_step, tokens_of

RULE = LengthRule(None)


def rankings(house: tiny.House, data: DataConfig, folder: Path) -> list[EncodedRanking]:
    return load_rankings("data", data, house.tokenizer, RULE, RULE, house.common(folder)["metrics"])


def scores(folder: Path, groups: list[EncodedRanking]) -> torch.Tensor:
    found = score_rankings(ScalarModel.from_pretrained(folder), groups)
    return torch.tensor([score for group in found for score in group])


def test_the_reward_model_learns_what_is_liked(house: tiny.House, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    held_out = house.data("rankings-held-out")
    config = tiny.reward_config(house, eval_data=held_out, eval_every=4, epochs=4, optimizer=OptimizerConfig(lr=1e-2))
    out = train_reward(config, model=house.model, **house.common(tmp_path))
    steps = tiny.steps(tmp_path)
    names = {"loss", "accuracy", "pairs", "grad_norm", "lr", "seconds", "tokens_per_second", "peak_memory_gib"}
    assert all(line.keys() == names | {"skipped_steps", "stage", "step", "time"} for line in steps)
    assert steps[-1]["loss"] < 0.6 < math.log(2) < steps[0]["loss"] + 0.1
    evals = [line for line in tiny.lines(tmp_path) if "eval/accuracy" in line]
    assert [line["step"] for line in evals] == [4, 8, 12]
    assert evals[-1]["eval/accuracy"] > 0.75
    groups = rankings(house, held_out, tmp_path)
    again = reward_accuracy(ScalarModel.from_pretrained(out), groups)
    assert again.accuracy == pytest.approx(evals[-1]["eval/accuracy"])  # calibration moves no order
    assert (evals[-1]["eval/pairs"], evals[-1]["eval/accuracy_k3"]) == (again.pairs, again.by_k[3][0])
    AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)


def test_a_step_is_the_mean_over_prompts_of_the_mean_over_pairs(house: tiny.House, tmp_path: Path) -> None:
    """K of 2 to 5 in one batch, cut into micro-batches, against whole sequences and a loop over pairs."""
    world, engine_config = init_world(EngineConfig(device="cpu")), EngineConfig(device="cpu")
    batch = rankings(house, house.data("rankings"), tmp_path)[:6]
    assert len({len(r.answers) for r in batch}) >= 3
    model, losses, right, pairs = ScalarModel.from_pretrained(house.reward()), [], 0.0, 0
    for ranking in batch:
        s = []
        for answer in ranking.answers:
            tokens = torch.tensor(ranking.prompt + answer)
            cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
            s.append(model(tokens, torch.arange(len(tokens)), cu_seqlens)[-1])
        ordered = [(i, j) for i, j in itertools.permutations(range(len(s)), 2) if ranking.ranks[i] < ranking.ranks[j]]
        losses.append(-sum(torch.nn.functional.logsigmoid(s[i] - s[j]) for i, j in ordered) / len(ordered))
        right, pairs = right + sum(float(s[i] > s[j]) for i, j in ordered), pairs + len(ordered)
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    for budget in (10, 60, 10_000):
        engine = ZeroEngine(ScalarModel.from_pretrained(house.reward()), world, engine_config, OptimizerConfig(lr=0.0))
        numbers, tokens = reward_step(engine, batch, budget)
        assert numbers["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert (numbers["pairs"], numbers["accuracy"]) == (pairs, pytest.approx(right / pairs))
        assert tokens == sum(map(tokens_of, batch))


@pytest.mark.parametrize("own", [True, False])
def test_demonstrations_score_mean_0_and_variance_1(house: tiny.House, tmp_path: Path, own: bool) -> None:
    demonstrations = house.data("demonstrations") if own else DataConfig()
    config = tiny.reward_config(house, demonstrations=demonstrations)
    out = train_reward(config, model=house.model, **house.common(tmp_path))
    rows = encoded(house)
    if not own:
        rows = [best(r) for r in rankings(house, house.data("rankings"), tmp_path)]
    found = scores(out, rows)
    assert float(found.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.std(unbiased=False)) == pytest.approx(1, rel=1e-3)
    (line,) = (line for line in tiny.lines(tmp_path) if "calibration/mean" in line)
    assert line["calibration/answers"] == len(found)


def best(ranking: EncodedRanking) -> EncodedRanking:
    first = [a for a, rank in zip(ranking.answers, ranking.ranks, strict=True) if rank == min(ranking.ranks)]
    return EncodedRanking(ranking.prompt, first, ())


def encoded(house: tiny.House) -> list[EncodedRanking]:
    from pyrlhf.data import encode_demonstrations, read_demonstrations

    found, _ = encode_demonstrations(read_demonstrations(house.data("demonstrations"))[0], house.tokenizer, RULE, RULE)
    return [EncodedRanking(d.prompt, [d.response], (0,)) for d in found]


def test_calibration_of_the_bias_alone_and_of_nothing(house: tiny.House, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for kind in ("bias", "none", "bias_and_gain"):
        settings = {"demonstrations": house.data("demonstrations"), "calibrate": kind, "epochs": 1}
        out = train_reward(tiny.reward_config(house, **settings), model=house.model, **house.common(tmp_path / kind))
        found[kind] = scores(out, encoded(house)).double()
    torch.testing.assert_close(found["bias"], found["none"] - found["none"].mean(), rtol=1e-4, atol=1e-5)
    std = found["none"].std(unbiased=False)
    torch.testing.assert_close(found["bias_and_gain"], found["bias"] / std, rtol=1e-4, atol=1e-4)
    assert not any("calibration/mean" in line for line in tiny.lines(tmp_path / "none"))


def test_rankings_of_ties_alone_are_dropped_and_counted(
    house: tiny.House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "p:", "responses": [" a", " b", " c"], "ranks": [1, 1, 1]},
        {"prompt": "p:", "responses": [" a", " b", " c"], "ranks": [1, 0, 1]},
        {"prompt": "p:", "responses": [" a", " b"], "ranks": [0, 0]},
    ]
    kept = rankings(house, house.write("tied", rows), tmp_path)
    assert [r.ranks for r in kept] == [(1, 0, 1)]
    assert "2 dropped, all ties" in " ".join(capsys.readouterr().out.split())
    out = train_reward(tiny.reward_config(house, data=house.data("tied")), model=house.model, **house.common(tmp_path))
    assert out.exists()
    assert [line["pairs"] for line in tiny.steps(tmp_path)] == [2, 2]
    # One best answer alone: no variance to scale to 1, so its score is only moved to 0.
    assert scores(out, [best(kept[0])]).tolist() == pytest.approx([0.0], abs=1e-6)
    with pytest.raises(ValueError, match=r"data: expected at least one usable record"):
        rankings(house, house.write("all-tied", rows[:1]), tmp_path)
