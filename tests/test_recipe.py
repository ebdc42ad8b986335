"""Recipes: what is refused, and how a run goes on. The stages themselves are replaced by ones that note their inputs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyrlhf import recipe as recipe_module
from pyrlhf import rounds
from pyrlhf.data import Tokenizer
from pyrlhf.metrics import read_lines
from pyrlhf.model import CausalLM, ModelConfig
from pyrlhf.recipe import Recipe, RunError, load_recipe, plan, run_recipe
from pyrlhf.report import last_numbers
from pyrlhf.settings import SettingsError

TEXT = "the cat sat on the mat and the dog ran to the red house\n" * 8
CONFIG = "{hidden_size: 16, num_layers: 1, num_heads: 2, max_positions: 64}"
BASE = f"output: out\nmodel: {{config: {CONFIG}}}\ntokenizer: {{train: {{path: text.txt}}, vocab_size: 270}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    prompts = "".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(9))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    old = {"prompt": "old", "responses": ["a", "b"], "ranks": [2, 1]}
    (tmp_path / "rank.jsonl").write_text(json.dumps(old) + "\n")
    return tmp_path


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "run.yaml").write_text(BASE + text)
    return load_recipe(folder / "run.yaml", overrides)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every stage notes (name, its arguments) here, and leaves a small model behind."""
    noted: list[tuple[str, dict[str, Any]]] = []

    def stage(name: str) -> Callable[..., Path]:
        def run(config: Any, *, folder: Path, tokenizer: Tokenizer, **inputs: Any) -> Path:
            noted.append((name, {"config": config, "folder": folder, **inputs}))
            shape = ModelConfig(tokenizer.vocab_size, 16, 1, 2, max_positions=64, eos_id=tokenizer.eos_id)
            CausalLM(shape, seed=len(noted)).save_pretrained(folder / "model", tokenizer=tokenizer)
            inputs["metrics"].log(1, {"loss": 1.0})
            return folder / "model"

        return run

    for name in ("train_pretrain", "train_sft", "train_reward", "train_ppo", "write_samples"):
        monkeypatch.setattr(recipe_module, name, stage(name.removeprefix("train_")))
    return noted


def names(calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [name for name, _ in calls]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages: []", "stages: expected some of generate, pretrain, sft, reward, ppo"),
        ("stages: [sft, sft]", "each at most once"),
        ("stages: [stf]", "`stages`: expected list of one of generate, pretrain, sft, reward, ppo, found ['stf']"),
        ("stages: [sft]\nrounds: 2", "2 rounds need the stages reward and ppo"),
        ("stages: [sft]\nppo: {kl_coeff: 1}", "unknown key `ppo.kl_coeff`; did you mean `ppo.kl_coef`?"),
        ("stages: [sft]\nsft: {optimizer: {lr: fast}}", "`sft.optimizer.lr`: expected float, found 'fast'"),
        ("stages: [sft]\nengine: {zero_stage: 4}", "`engine.zero_stage`: expected one of 0, 1, 2, 3, found 4"),
        ("stages: [ppo]\nppo: {clip: .2, batch_size: 3, samples_per_prompt: 2}", "batch_size"),
    ],
)
def test_refused(folder: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        recipe(folder, text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{}", "expected exactly one of path, preset and config, found none"),
        ("{path: a, preset: gpt2}", "found path and preset"),
        ("{preset: gtp2}", "did you mean 'gpt2'?"),
        ("{config: {hiden_size: 8}}", "unknown field 'hiden_size'; did you mean 'hidden_size'?"),
        ("{preset: gpt2}", "a model with new weights needs tokenizer.path or tokenizer.train"),
    ],
)
def test_refused_models(folder: Path, model: str, said: str) -> None:
    (folder / "run.yaml").write_text(f"output: out\nstages: [sft]\nmodel: {model}\n")
    with pytest.raises(SettingsError) as error:
        load_recipe(folder / "run.yaml")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("lab", "package.module:function"), ("nowhere:f", "cannot import"), ("json:f", "no function 'f'")],
)
def test_refused_labellers(folder: Path, name: str, said: str, calls: list[Any]) -> None:
    with pytest.raises(SettingsError, match=said):
        run_recipe(recipe(folder, f"stages: [reward, ppo]\nrounds: 2\nlabeller: {name}"))
    assert not calls


# ---- how a run goes ---------------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_feed_each_other(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [pretrain, generate, sft, reward, ppo]\nseed: 7"))
    assert names(calls) == ["pretrain", "write_samples", "sft", "reward", "ppo"]
    made = dict(calls)
    out = folder / "out"
    assert [inputs["folder"].name for _, inputs in calls] == [
        "01-pretrain",
        "02-generate",
        "03-sft",
        "04-reward",
        "05-ppo",
    ]
    assert made["pretrain"]["model"] == out / "start" / "model"
    assert made["write_samples"]["model"] == made["sft"]["model"] == out / "01-pretrain" / "model"
    assert made["reward"]["model"] == out / "03-sft" / "model"
    assert made["ppo"]["policy"] == made["ppo"]["reference"] == out / "03-sft" / "model"
    assert made["ppo"]["reward"] == out / "04-reward" / "model"
    assert {inputs["seed"] for _, inputs in calls} == {7}
    assert (out / "report.html").exists()


def test_start_model_fits_the_trained_tokenizer(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [pretrain]"))
    model = CausalLM.from_pretrained(folder / "out" / "start" / "model")
    tokenizer = Tokenizer.from_pretrained(folder / "out" / "start" / "model")
    assert model.config.vocab_size == tokenizer.vocab_size <= 270
    assert (model.config.bos_id, model.config.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.eos_id is not None


def test_finished_stages_are_skipped(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [sft, reward, ppo]"))
    first = names(calls)
    run_recipe(recipe(folder, "stages: [sft, reward, ppo]"))
    assert names(calls) == first == ["sft", "reward", "ppo"]


def test_a_failed_stage_is_taken_up_again_and_the_finished_ones_are_not(
    folder: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = recipe_module.train_reward

    def broken(config: Any, **inputs: Any) -> Path:
        (inputs["folder"] / "checkpoint").mkdir()
        raise RuntimeError("power cut")

    monkeypatch.setattr(recipe_module, "train_reward", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(recipe(folder, "stages: [sft, reward, ppo]"))
    with pytest.raises(RunError, match=r"reward.epochs: 1 -> 2"):  # half-trained with other settings
        run_recipe(recipe(folder, "stages: [sft, reward, ppo]", "reward.epochs=2"))
    monkeypatch.setattr(recipe_module, "train_reward", working)
    run_recipe(recipe(folder, "stages: [sft, reward, ppo]"))
    assert names(calls) == ["sft", "reward", "ppo"]
    assert (folder / "out" / "02-reward" / "checkpoint").exists()


def test_a_stage_that_failed_before_it_made_anything_takes_new_settings(
    folder: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = recipe_module.train_sft

    def broken(config: Any, **inputs: Any) -> Path:
        raise ValueError("no such file")

    monkeypatch.setattr(recipe_module, "train_sft", broken)
    with pytest.raises(ValueError, match="no such file"):
        run_recipe(recipe(folder, "stages: [sft]"))
    monkeypatch.setattr(recipe_module, "train_sft", working)
    run_recipe(recipe(folder, "stages: [sft]", "sft.epochs=3"))
    assert calls[0][1]["config"].epochs == 3


def test_changed_settings_stop_with_what_changed_and_fresh_begins_anew(folder: Path, calls: list[Any]) -> None:
    text = "stages: [sft, reward, ppo]"
    run_recipe(recipe(folder, text))
    changed = recipe(folder, text, "reward.batch_size=5")
    with pytest.raises(RunError) as error:
        run_recipe(changed)
    assert "reward.batch_size: 64 -> 5" in str(error.value)
    assert "--fresh" in str(error.value)
    calls.clear()
    run_recipe(changed, "reward", fresh=True)
    assert names(calls) == ["reward"]
    assert not (folder / "out" / "03-ppo").exists()
    run_recipe(changed)
    assert names(calls) == ["reward", "ppo"]
    calls.clear()
    run_recipe(changed, fresh=True)
    assert names(calls) == ["sft", "reward", "ppo"]


def test_a_change_reaches_the_stages_behind_it(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [sft, reward]"))
    changed = recipe(folder, "stages: [sft, reward]", "sft.epochs=2")
    folder.joinpath("out", "01-sft").rename(folder / "gone")
    calls.clear()
    with pytest.raises(RunError, match="an earlier stage"):
        run_recipe(changed)
    assert names(calls) == ["sft"]


def test_where_it_runs_changes_nothing(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [sft]"))
    run_recipe(recipe(folder, "stages: [sft]", "engine.zero_stage=2", "engine.tokens_per_microbatch=99"))
    assert names(calls) == ["sft"]


def test_one_stage_alone(folder: Path, calls: list[Any]) -> None:
    text = "stages: [sft, reward, ppo]"
    with pytest.raises(RunError, match="the stage sft has to finish first"):
        run_recipe(recipe(folder, text), "reward")
    with pytest.raises(SettingsError, match="`pretrain` is not among"):
        run_recipe(recipe(folder, text), "pretrain")
    run_recipe(recipe(folder, text), "sft")
    with pytest.raises(RunError, match="there is no reward model"):
        run_recipe(recipe(folder, text), "ppo")
    run_recipe(recipe(folder, text), "reward")
    run_recipe(recipe(folder, text), "ppo")
    assert names(calls) == ["sft", "reward", "ppo"]


def test_models_given_as_folders(folder: Path, calls: list[Any]) -> None:
    run_recipe(recipe(folder, "stages: [ppo]\nppo: {policy: p, reference: ref, reward_model: /rm}"))
    inputs = calls[0][1]
    assert (inputs["policy"], inputs["reference"], inputs["reward"]) == (folder / "p", folder / "ref", Path("/rm"))
    calls.clear()
    run_recipe(recipe(folder, "stages: [reward]\nreward: {model: lm}", f"output={folder / 'other'}"))
    assert calls[0][1]["model"] == folder / "lm"


def test_a_folder_that_no_run_made_is_left_alone(folder: Path, calls: list[Any]) -> None:
    precious = folder / "out" / "01-sft" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("do not lose")
    run_recipe(recipe(folder, "stages: [sft]"), fresh=True)
    assert precious.exists()


# ---- round again ------------------------------------------------------------------------------------------------------

ROUNDS = """stages: [sft, reward, ppo]
rounds: 2
ranking: {prompts: 5, samples: 3, batch_size: 2}
reward: {data: {path: rank.jsonl}}
ppo: {prompts: {path: prompts.jsonl}, max_new_tokens: 6}
"""


def test_rounds_with_a_labeller(folder: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "my_labeller.py").write_text("def length(prompt, responses):\n    return [len(r) for r in responses]\n")
    run_recipe(recipe(folder, ROUNDS + "labeller: my_labeller:length"))
    assert names(calls) == ["sft", "reward", "ppo", "reward", "ppo"]
    out = folder / "out"
    again, more = calls[3][1], calls[4][1]
    assert again["folder"] == out / "round-2" / "reward"
    assert again["model"] == more["reference"] == out / "01-sft" / "model"
    assert more["policy"] == out / "03-ppo" / "model"
    assert more["reward"] == out / "round-2" / "reward" / "model"
    assert again["seed"] != calls[1][1]["seed"]

    merged = [json.loads(line) for line in Path(again["config"].data.path).read_text().splitlines()]
    assert merged[0] == {"prompt": "old", "responses": ["a", "b"], "ranks": [1, 0]}
    assert 1 <= len(merged) - 1 <= 5
    for row in merged[1:]:
        lengths = [len(response) for response in row["responses"]]
        assert lengths[row["ranks"].index(0)] == max(lengths)
        assert row["prompt"].startswith("the cat")
    run_recipe(recipe(folder, ROUNDS + "labeller: my_labeller:length"))
    assert len(calls) == 5


def test_rounds_without_a_labeller_wait_for_people(folder: Path, calls: list[Any]) -> None:
    with pytest.raises(rounds.RankingsNeeded) as wait:
        run_recipe(recipe(folder, ROUNDS))
    place = folder / "out" / "round-2" / "rank"
    assert str(place / "rankings.jsonl") in str(wait.value)
    before = (place / "to_rank.jsonl").read_text()
    with pytest.raises(rounds.RankingsNeeded):
        run_recipe(recipe(folder, ROUNDS))
    assert (place / "to_rank.jsonl").read_text() == before

    rows = [row for row in map(json.loads, before.splitlines()) if len(row["responses"]) > 1]
    ranked = [{**row, "ranks": list(range(1, len(row["responses"]) + 1))} for row in rows]
    (place / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    run_recipe(recipe(folder, ROUNDS))
    assert names(calls) == ["sft", "reward", "ppo", "reward", "ppo"]


def test_a_labeller_must_score_every_response() -> None:
    with pytest.raises(ValueError, match="expected 2 scores, found 1"):
        rounds._label([{"prompt": "p", "responses": ["a", "b"]}], lambda prompt, responses: [1.0], None)  # type: ignore[arg-type]


def test_the_plan_names_every_folder(folder: Path) -> None:
    found = plan(recipe(folder, "stages: [sft, reward, ppo]\nrounds: 3"))
    assert [str(step.folder.relative_to(folder / "out")) for step in found] == [
        "01-sft",
        "02-reward",
        "03-ppo",
        *[f"round-{r}/{name}" for r in (2, 3) for name in ("rank", "reward", "ppo")],
    ]


# ---- the stages themselves ----------------------------------------------------------------------------------------------

WHOLE = """stages: [pretrain, generate, sft, reward, ppo]
engine: {device: cpu, tokens_per_microbatch: 512}
pretrain: {data: {path: text.txt, documents: line}, context: 16, batch_size: 4, optimizer: {lr: 1e-3, warmup_steps: 0}}
generate: {count: 6, held_out: 2, max_new_tokens: 6}
sft: {data: {path: demo.jsonl}, epochs: 1, batch_size: 4}
reward: {data: {path: rank.jsonl}, batch_size: 4}
ppo:
  prompts: {path: prompts.jsonl}
  updates: 1
  batch_size: 4
  minibatches: 2
  max_new_tokens: 5
  ptx_coef: 1.0
  ptx_data: {path: $output/02-generate/samples.jsonl, on_error: skip}
  ptx_per_episode: 1
"""


@pytest.fixture
def data(folder: Path) -> Path:
    demos = [{"prompt": f"the cat {i}", "response": " sat on the mat"} for i in range(8)]
    ranked = [
        {"prompt": f"the {i}", "responses": [" cat sat", " dog", " red mat"], "scores": [3, 1, 2]} for i in range(8)
    ]
    for name, rows in (("demo", demos), ("rank", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_whole_pipeline_from_one_recipe(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_recipe(recipe(data, WHOLE))
    for stage in ("01-pretrain", "03-sft", "05-ppo"):
        assert CausalLM.from_pretrained(out / stage / "model").config.hidden_size == 16
        lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines
        assert all(line["stage"] == stage[3:] and "nonfinite" not in line for line in lines)
    assert len((out / "02-generate" / "samples.jsonl").read_text().splitlines()) == 4
    assert "reward" in last_numbers(read_lines(out / "05-ppo" / "metrics.jsonl"))
    page = (out / "report.html").read_text()
    assert "05-ppo" in page
    assert "ptx_per_episode: 1" in page
    capsys.readouterr()
    run_recipe(recipe(data, WHOLE))
    said = capsys.readouterr().out
    assert said.count("finished before") == 5


def test_the_deepspeed_launcher(data: Path) -> None:
    """Two ranks by ``deepspeed --num_gpus 2 --module pyrlhf`` on the CPU train what one rank trains."""
    alone = run_recipe(recipe(data, WHOLE, f"output={data / 'alone'}"), "pretrain")
    (data / "run.yaml").write_text(BASE + WHOLE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--master_port", str(port), "--num_gpus", "2", "--module", "pyrlhf"]
    paths = os.pathsep.join([str(Path(recipe_module.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, "run", "run.yaml", "--stage", "pretrain", "--seed", "0"],
        cwd=data,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_lines(out / "01-pretrain" / "metrics.jsonl") for out in (alone, data / "out"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    ours = [line for line in done.stdout.splitlines() if not line.startswith("[20")]
    assert ours[0].startswith("pretrain: starting in")
    assert len(ours) < 10, ours
