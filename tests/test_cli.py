"""The command line: light imports, clear errors, and the commands on small models."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrlhf import cli

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib", "jsonargparse", "numpy", "rich")


def python(*words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    whole = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=whole, timeout=240)


@pytest.mark.parametrize(
    "work",
    [
        "import pyrlhf",
        "import pyrlhf.cli",
        "from pyrlhf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_early(work: str) -> None:
    done = python("-c", f"import sys\n{work}\nprint('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


# ---- words ------------------------------------------------------------------------------------------------------------


def test_launcher_words_are_dropped() -> None:
    words = ["--local_rank=1", "run", "--local-rank", "0", "r.yaml", "--local-rank=3", "--local_rank", "2", "a.b=1"]
    assert cli._without_launcher_words(words) == ["run", "r.yaml", "a.b=1"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces loading and running of recipes; keeps what they were called with."""
    from pyrlhf import recipe

    noted: dict[str, Any] = {}

    class Loaded:
        output = str(tmp_path / "out")

    def load(path: Path, overrides: list[str]) -> Any:
        noted.update(path=path, overrides=overrides)
        return Loaded()

    def run(_: Any, only: str | None, *, fresh: bool) -> None:
        noted.update(only=only, fresh=fresh)
        if "failure" in noted:
            raise noted["failure"]

    monkeypatch.setattr(recipe, "load_recipe", load)
    monkeypatch.setattr(recipe, "run_recipe", run)
    return noted


@pytest.mark.parametrize(
    ("words", "only", "fresh", "overrides"),
    [
        ("run r.yaml", None, False, []),
        ("run r.yaml --stage ppo --fresh", "ppo", True, []),
        ("ppo r.yaml ppo.lr=1e-5 seed=3", "ppo", False, ["ppo.lr=1e-5", "seed=3"]),
        ("run r.yaml --ppo.lr 1e-5 --ppo.truncated_score -1 --ppo.clip=.1", None, False,
         ["ppo.lr=1e-5", "ppo.truncated_score=-1", "ppo.clip=.1"]),
        ("run --ppo.lr 1e-5 r.yaml --stage sft", "sft", False, ["ppo.lr=1e-5"]),
        ("run ppo.lr=1e-5 r.yaml", None, False, ["ppo.lr=1e-5"]),
        ("run r.yaml --seed 3 --output=x --fresh", None, True, ["seed=3", "output=x"]),
        ("--local_rank=1 reward r.yaml sft.data.path=a=b", "reward", False, ["sft.data.path=a=b"]),
    ],
)  # fmt: skip
def test_overrides(seen: dict[str, Any], words: str, only: str | None, fresh: bool, overrides: list[str]) -> None:
    assert cli.main(words.split()) == 0
    assert seen == {"path": Path("r.yaml"), "only": only, "fresh": fresh, "overrides": overrides}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rnu r.yaml", "invalid choice: 'rnu'"),
        ("run", "RECIPE"),
        ("run r.yaml --stage dpo", "invalid choice: 'dpo'"),
        ("run r.yaml extra", "unrecognized argument: extra"),
        ("doctor seed=3", "unrecognized arguments: seed=3"),
        ("eval", "WHAT"),
        ("eval winrate a b", "--reward-model --labeller is required"),
    ],
)
def test_wrong_words_exit_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# ---- errors -----------------------------------------------------------------------------------------------------------


def test_a_failure_is_one_message_and_the_traceback_is_in_the_log(
    seen: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen["failure"] = RuntimeError("the disk is full")
    assert cli.main(["run", "r.yaml"]) == 1
    said = capsys.readouterr().err
    log = tmp_path / "out" / "log.txt"
    assert said.splitlines() == ["error: the disk is full", f"The whole story is in {log}; --debug prints it."]
    assert "Traceback" in log.read_text()
    assert "the disk is full" in log.read_text()


def test_debug_prints_the_traceback(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    seen["failure"] = KeyError("x")
    assert cli.main(["run", "r.yaml", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "error: KeyError: 'x'" in said


def test_waiting_for_people_and_stopping_are_no_errors(
    seen: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from pyrlhf.rounds import RankingsNeeded

    seen["failure"] = RankingsNeeded("rank this file")
    assert cli.main(["run", "r.yaml"]) == 3
    assert capsys.readouterr().err == "rank this file\n"
    seen["failure"] = KeyboardInterrupt()
    assert cli.main(["run", "r.yaml"]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_mistake_in_a_recipe_exits_2_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("output: out\nstages: [sft]\nmodel: {path: m}\nsft:\n  epochz: 3\n")
    done = python("-m", "pyrlhf", "run", "r.yaml", "sft.optimizer.lr=fast", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: r.yaml, line 5: unknown key `sft.epochz`; did you mean `sft.epochs`?\n"
        "command line: `sft.optimizer.lr`: expected float, found 'fast'\n"
    )
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_by_one_rank_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["run", str(tmp_path / "absent.yaml")]) == 2
    assert capsys.readouterr().err == ""


# ---- demo -------------------------------------------------------------------------------------------------------------


def test_demo_passes_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrlhf import demo

    noted: dict[str, Any] = {}
    monkeypatch.setattr(demo, "main", noted.update)
    words = ["demo", "--quick", "--device", "cpu", "--seed", "5", "--output", str(tmp_path / "new")]
    assert cli.main(words) == 0
    assert noted == {"quick": True, "device": "cpu", "output": tmp_path / "new", "seed": 5}


def test_demo_spares_folders_it_did_not_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    assert cli.main(["demo", "--output", str(tmp_path / "mine")]) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"


# ---- help -------------------------------------------------------------------------------------------------------------


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_of_run_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from pyrlhf.recipe import Recipe
    from pyrlhf.settings import known_settings

    text = help_of("run", capsys)
    known = known_settings(Recipe)
    assert len(known) > 150
    explained = {setting.nested: key for key, setting in reversed(known.items()) if setting.nested}
    for key, setting in known.items():
        section, _, name = key.rpartition(".")
        first = explained.get(known[section].nested, section) if section else section
        assert re.search(rf"^ *{re.escape(f'{first}.{name}'.strip('.'))}(:| \()", text, re.MULTILINE), key
        assert setting.help, f"{key} has no docstring"
    assert len(text.splitlines()) < 400


def test_help_of_a_stage_keeps_to_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("ppo", capsys)
    assert "ppo.kl_coef (float; default 0.02)" in text
    assert "sft.epochs" not in text
    assert "--fresh" in text


# ---- generate and eval ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small language model ``lm``, a reward model ``rm``, and files to use them on."""
    from pyrlhf.data import Tokenizer
    from pyrlhf.model import CausalLM, ModelConfig, ScalarModel

    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(["the cat sat on the mat and the dog ran"] * 9, 280)
    shape = ModelConfig(
        tokenizer.vocab_size, 16, 1, 2, max_positions=128, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    CausalLM(shape, seed=1).save_pretrained(folder / "lm", tokenizer=tokenizer)
    ScalarModel(shape, seed=2).save_pretrained(folder / "rm", tokenizer=tokenizer)
    (folder / "text.txt").write_text("the dog sat on the cat\n" * 5)
    rankings = [
        {"prompt": "the", "responses": [" cat", " dog", " mat"], "ranks": [1, 2, 2]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    (folder / "rank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rankings))
    prompts = [{"prompt": "the cat"}, {"prompt": "the dog"}, {"messages": [{"role": "user", "content": "hello"}]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "grader.py").write_text("def length(prompt, responses):\n    return [len(r) for r in responses]\n")
    return folder


def test_generate_to_the_terminal(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(models / "lm"), "--prompt", "the cat", "--prompt", "the dog", "--max-new-tokens", "5"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "the dog"]
    assert all(isinstance(row["response"], str) and row["finish"] in ("eos", "length") for row in rows)
    assert cli.main(words) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_generate_to_a_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "samples.jsonl"
    words = [
        "generate",
        str(models / "lm"),
        "--prompts",
        str(models / "prompts.jsonl"),
        "-n",
        "3",
        "--output",
        str(out),
    ]
    assert cli.main([*words, "--max-new-tokens", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [3, 3, 3]
    assert rows[2]["messages"] == [{"role": "user", "content": "hello"}]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("answering 3/3")
    assert said[1:] == [f"3 prompts answered in {out}"]


def test_generate_needs_prompts_and_a_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(models / "lm")]) == 2
    assert "give --prompts FILE or --prompt TEXT" in capsys.readouterr().err
    assert cli.main(["generate", str(models), "--prompt", "x"]) == 2
    assert "expected the folder of a model" in capsys.readouterr().err


def numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_eval_perplexity(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "perplexity", str(models / "lm"), str(models / "text.txt")]
    found = numbers(words, capsys)
    vocabulary = json.loads((models / "lm" / "config.json").read_text())["vocab_size"]
    assert found["perplexity"] == pytest.approx(vocabulary, rel=0.2)  # random weights know next to nothing
    assert numbers([*words, "--context", "128"], capsys) == found  # the model reads no more
    assert numbers([*words, "--context", "8", "documents=line"], capsys)["tokens"] != found["tokens"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("perplexity  ")
    assert cli.main([*words, "documents=lines"]) == 2
    assert "did you mean 'line'?" in capsys.readouterr().err


def test_eval_reward_accuracy(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(["eval", "reward-accuracy", str(models / "rm"), str(models / "rank.jsonl")], capsys)
    assert (found["pairs"], found["rankings"]) == (3, 2)
    assert found["accuracy"] == pytest.approx((found["accuracy of K=2"] + 2 * found["accuracy of K=3"]) / 3)


def test_eval_leaves_out_rankings_longer_than_the_model_reads(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(
        (models / "rank.jsonl").read_text() + json.dumps({"prompt": "x" * 200, "chosen": "b", "rejected": "c"}) + "\n"
    )
    found = numbers(["eval", "reward-accuracy", str(models / "rm"), str(tmp_path / "long.jsonl")], capsys)
    assert (found["rankings"], found["too long"]) == (2, 1)


def test_eval_winrate_of_files_by_a_labeller(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(models))
    for name, responses in (("a", ["long one", "x", "yy"]), ("b", ["short", "y", "zzz"])):
        rows = [{"prompt": str(i), "response": response} for i, response in enumerate(responses)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "winrate", str(tmp_path / "a"), str(tmp_path / "b"), "--labeller", "grader:length"]
    found = numbers(words, capsys)
    assert (found["win rate of a"], found["wins"], found["ties"], found["losses"]) == (0.5, 1, 1, 1)
    (tmp_path / "b").write_text(json.dumps({"prompt": "other", "response": "x"}) + "\n")
    assert cli.main(words) == 2
    assert "answer different prompts" in capsys.readouterr().err


def test_eval_winrate_of_models_by_a_reward_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "winrate", str(models / "lm"), str(models / "lm"), "--reward-model", str(models / "rm")]
    found = numbers([*words, "--prompts", str(models / "prompts.jsonl"), "--max-new-tokens", "6"], capsys)
    assert (found["win rate of a"], found["ties"]) == (0.5, 3)  # the same model, seed and prompts


def test_generate_goes_on_where_it_was_interrupted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after two prompts, with half a line written, is continued to the same file as one that does not."""
    from pyrlhf import commands

    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    words = [
        "generate",
        str(models / "lm"),
        "--prompts",
        str(models / "prompts.jsonl"),
        "-n",
        "2",
        "--max-new-tokens",
        "6",
    ]
    assert cli.main([*words, "--output", str(tmp_path / "whole.jsonl")]) == 0
    answered = commands._answer_lines

    def dies(*args: Any, **kwargs: Any) -> Any:
        lines = answered(*args, **kwargs)
        yield next(lines)
        yield next(lines)
        raise RuntimeError("the power went")

    monkeypatch.setattr(commands, "_answer_lines", dies)
    assert cli.main([*words, "--output", str(out)]) == 1
    monkeypatch.setattr(commands, "_answer_lines", answered)
    assert not out.exists()
    with partial.open("a") as file:
        file.write('{"prompt": "the d')
    assert cli.main([*words, "--output", str(out), "--temperature", "0.5"]) == 2
    assert "temperature 1.0 -> 0.5" in capsys.readouterr().err
    assert cli.main([*words, "--output", str(out)]) == 0
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_generate_fresh_forgets_an_interrupted_run(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"settings": {}}\n{"prompt": "x"}\n')
    words = [
        "generate",
        str(models / "lm"),
        "--prompt",
        "the",
        "--max-new-tokens",
        "3",
        "--output",
        str(out),
        "--fresh",
    ]
    assert cli.main(words) == 0
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["the"]


def test_generate_names_a_wrong_sampling_option(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(models / "lm"), "--prompt", "the", "--top-p", "0"]
    assert cli.main(words) == 2
    assert "top_p: expected" in capsys.readouterr().err


def test_chat_answers_line_by_line(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["chat", str(models / "lm"), "--max-new-tokens", "8", "--seed", "3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/help\n/reset\nhello\n"))
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("> ") == 6
    assert said.count("/reset begins") == 2
