"""Metrics: valid JSON whatever the numbers, append and resume, quiet where there is no terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pyrlhf import metrics as metrics_module
from pyrlhf import terminal
from pyrlhf.metrics import Metrics, Progress, clock, live_line, read_lines


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_a_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "sft")
    metrics.log(3, {"loss": 2.5, "tokens": 7, "skipped": True})
    (line,) = strict(metrics.path)
    assert line.pop("time") > 1e9
    assert line == {"stage": "sft", "step": 3, "loss": 2.5, "tokens": 7, "skipped": 1}


def test_numbers_are_shown_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, "reward")
    metrics.log(1, {"loss": 0.5})
    metrics.log(2, {"eval/loss": 0.25, "eval/pairs": 12}, show=True)
    assert capsys.readouterr().out == "reward, step 2: eval/loss 0.25 · eval/pairs 12\n"
    assert len(metrics.path.read_text().splitlines()) == 2


def test_nonfinite_numbers_are_null_and_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "ppo")
    metrics.log(1, {"loss": float("nan"), "kl": float("-inf"), "reward": 1.0})
    metrics.samples(1, [{"response": "x", "score": float("inf")}])
    (line,) = strict(metrics.path)
    assert (line["loss"], line["kl"], line["reward"], line["nonfinite"]) == (None, None, 1.0, ["loss", "kl"])
    (row,) = strict(metrics.samples_path)
    assert row["score"] is None
    assert row["nonfinite"] == ["score"]
    assert row["response"] == "x"


def test_tensors_of_one_element_are_numbers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    metrics = Metrics(tmp_path, "ppo")
    metrics.log(0, {"a": torch.tensor(0.5), "b": torch.tensor([3]), "c": torch.tensor(float("nan"))})
    (line,) = strict(metrics.path)
    assert (line["a"], line["b"], line["c"]) == (0.5, 3, None)


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'loss'.*str"):
        Metrics(tmp_path, "sft").log(0, {"loss": "low"})


def test_reopening_appends_and_truncate_drops_later_steps(tmp_path: Path) -> None:
    first = Metrics(tmp_path, "sft")
    for step in range(5):
        first.log(step, {"loss": float(step)})
        first.samples(step, [{"response": str(step)}])
    second = Metrics(tmp_path, "sft")
    second.truncate_after(2)
    second.log(3, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in strict(second.path)] == [(0, 0), (1, 1), (2, 2), (3, -1)]
    assert [line["response"] for line in strict(second.samples_path)] == ["0", "1", "2"]


def test_a_line_torn_by_a_crash_is_dropped_on_reopening(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, "sft")
    metrics.log(0, {"loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"stage": "sft", "st')
    assert len(read_lines(metrics.path)) == 1
    Metrics(tmp_path, "sft").log(1, {"loss": 2.0})
    assert [line["step"] for line in strict(metrics.path)] == [0, 1]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path / "rank1", "sft", is_main=False)
    with metrics.progress(2, "SFT") as bar:
        bar.advance(tokens=10)
        metrics.log(0, {"loss": 1.0})
        metrics.samples(0, [{"response": "x"}])
        metrics.note("hello")
    metrics.truncate_after(0)
    assert not (tmp_path / "rank1").exists()
    assert capsys.readouterr().out == ""


def test_without_a_terminal_a_short_stage_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, "sft")
    with metrics.progress(50, "SFT") as bar:
        for step in range(50):
            with metrics.progress(2, "inner") as inner:
                inner.advance(2)
            bar.advance(tokens=100)
            metrics.log(step, {"loss": 1.5, "other": 3.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("SFT 50/50")
    assert "tok/s" in line
    assert line.endswith("loss 1.5")


def test_without_a_terminal_lines_thin_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    bar = Progress(3600, "PPO", "tok", 0, visible=True, outer=None)
    for _ in range(3600):
        now[0] += 1.0
        bar.advance(tokens=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PPO 30/3600 · 0:30 gone · 59:30 left · 10 tok/s")
    assert 8 <= len(lines) <= 16


def test_a_resumed_bar_estimates_from_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    bar = Progress(100, "SFT", "tok", 80, visible=False, outer=None)
    now[0] = 20.0
    bar.advance(10)
    assert "SFT 90/100 · 0:20 gone · 0:20 left" in bar.line()


def test_in_a_terminal_bars_nest_and_show_the_live_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = Console(file=out, force_terminal=True, width=160, height=20)
    monkeypatch.setattr(metrics_module, "console", lambda: shown)
    metrics = Metrics(tmp_path, "ppo")
    with metrics.progress(2, "PPO") as bar:
        with metrics.progress(4, "[rollout]") as inner:
            inner.advance(4, tokens=40)
            assert inner._rich is not None
            inner._rich.refresh()
        bar.advance(tokens=80)
        metrics.log(0, {"reward": 0.25, "kl": 3.0})
        bar.advance(tokens=80)
    text = out.getvalue()
    assert "PPO" in text
    assert "2/2" in text
    assert "tok/s" in text
    assert "reward 0.25 · kl 3" in text
    assert "[rollout]" in text


def test_samples_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, "ppo")
    metrics.samples(0, [{"response": f"\x1b[31m[red]{i}[/red]", "reward": 0.5} for i in range(9)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[red]0[/red]" in printed
    assert "[red]8[/red]" not in printed
    assert len(strict(metrics.samples_path)) == 9
    assert strict(metrics.samples_path)[0]["response"] == "\x1b[31m[red]0[/red]"


def test_live_line_takes_the_telling_numbers() -> None:
    numbers = {"seconds": 3.0, "lr": 1e-5, "reward_normalised": 1.0, "policy/kl": 2.0, "loss": float("nan")}
    assert live_line(numbers) == "loss nan · reward_normalised 1 · policy/kl 2 · lr 1e-05"


def test_clock() -> None:
    assert (clock(9), clock(75), clock(3723)) == ("0:09", "1:15", "1:02:03")


def test_tensorboard_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Metrics(tmp_path, "sft", tensorboard=True)


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch")
    metrics = Metrics(tmp_path, "sft", tensorboard=True)
    metrics.log(0, {"loss": 1.0})
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"sft/loss" in events.read_bytes()


def test_quiet_sends_everything_but_the_console_to_the_log(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys, warnings\n"
        "from pathlib import Path\n"
        "from pyrlhf import terminal\n"
        "with terminal.quiet(Path(sys.argv[1])):\n"
        "    print('python noise'); os.write(2, b'C++ noise\\n'); warnings.warn('warned'); \n"
        "    logging.getLogger('x').info('logged'); terminal.say('for [you]')\n"
        "print('after')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "deep" / "log.txt")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=True,
    )
    assert done.stdout == "for [you]\nafter\n"
    assert done.stderr == ""
    kept = (tmp_path / "deep" / "log.txt").read_text()
    assert all(part in kept for part in ("python noise", "C++ noise", "warned", "logged", "for [you]"))


def test_quiet_restores_logging(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), warnings.showwarning)
    with terminal.quiet(tmp_path / "log.txt"):
        logging.getLogger("x").info("inside")
    assert (root.level, list(root.handlers), warnings.showwarning) == before
    assert "inside" in (tmp_path / "log.txt").read_text()
