"""Settings: YAML and overrides become dataclasses, and every mistake is named with its place and what is near."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pyrlhf.settings import SettingsError, describe, load_settings, plain, to_yaml, type_name


@dataclass
class Data:
    """Where rows come from.

    Args:
        path: files to read.
        format: how to read them.
        fields: names of the columns.
    """

    path: str | list[str] = ""
    format: Literal["auto", "jsonl", "text"] = "auto"
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr: expected at least 0, found {self.lr}")


@dataclass
class Stage:
    """One stage.

    Args:
        data: its data.
        extra: more data.
        sets: several sets.
        optimizer: its optimizer.
        critic: another optimizer, with a learning rate of its own.
        steps: how many steps.
        name: a name.
        clip: a bound, or none.
        quick: hurry.
    """

    data: Data = field(default_factory=Data)
    extra: Data | None = None
    sets: list[Data] = field(default_factory=list)
    optimizer: Optimizer = field(default_factory=Optimizer)
    critic: Optimizer = field(default_factory=lambda: Optimizer(lr=3e-5))
    steps: int = 3
    name: str = ""
    clip: float | None = 0.2
    quick: bool = False


@dataclass
class Run:
    """A run.

    Args:
        output: folder of the results.
        stage: the stage's settings.
        stops: token ids.
    """

    output: str
    stage: Stage = field(default_factory=Stage)
    stops: tuple[int, ...] = ()


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_settings(Run, path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SettingsError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value)


def test_values_of_every_kind(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        """
output: out
stops: [1, 2]
stage:
  steps: 7
  clip: null
  quick: true
  name: no            # YAML 1.1 would read false
  optimizer: {lr: 1e-3, betas: [0.5, 1]}
  data: {path: [a.txt, /b.txt], format: text, fields: {prompt: question}}
  extra: {path: $output/made.jsonl}
  sets: [{path: x}, {path: $output/y, format: jsonl}]
""",
    )
    assert (run.output, run.stops) == (str(tmp_path / "out"), (1, 2))
    stage = run.stage
    assert (stage.steps, stage.clip, stage.quick, stage.name) == (7, None, True, "no")
    assert stage.optimizer == Optimizer(lr=1e-3, betas=(0.5, 1.0))
    assert stage.data == Data([str(tmp_path / "a.txt"), "/b.txt"], "text", {"prompt": "question"})
    assert stage.extra == Data(str(tmp_path / "out" / "made.jsonl"))
    assert stage.sets == [Data(str(tmp_path / "x")), Data(str(tmp_path / "out" / "y"), "jsonl")]


def test_sections_left_out_or_empty_keep_their_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "output: /o\nstage:\n") == Run("/o")


def test_a_section_given_in_part_keeps_the_rest_of_its_defaults(tmp_path: Path) -> None:
    """Those of the place where the section stands, which may differ from its class's."""
    run = load(tmp_path, "output: /o\nstage:\n  critic: {betas: [0.5, 0.6]}")
    assert run.stage.critic == Optimizer(3e-5, (0.5, 0.6))
    assert load(tmp_path, "output: /o", "stage.critic.betas=[0.5, 0.6]") == run
    assert run.stage.optimizer == Optimizer()


def test_overrides_win_and_refine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    text = "output: out\nstage:\n  steps: 7\n  extra: {format: text}\n"
    run = load(
        tmp_path,
        text,
        "stage.steps=9",
        "stage.optimizer.lr=2",
        "stage.extra.path=e.txt",
        "stage.name=12",
        "stage.clip=null",
        "output=here",
        "stops=[3,4]",
    )
    assert run.output == str(work / "here")
    assert run.stage.extra == Data(str(work / "e.txt"), "text")
    assert (run.stage.steps, run.stage.optimizer.lr, run.stage.name, run.stage.clip) == (9, 2.0, "12", None)
    assert run.stops == (3, 4)


def test_unknown_keys_at_any_depth_name_file_line_and_nearest(tmp_path: Path) -> None:
    text = "output: o\nstagee: {}\nstage:\n  stepz: 3\n  lr: 1\n  sets:\n    - {paht: x}\n  extra: {formta: text}\n"
    lines = refusal(tmp_path, text, "stage.optimizer.beta=1", "zzz=1").splitlines()
    file = tmp_path / "run.yaml"
    assert lines == [
        f"{file}, line 2: unknown key `stagee`; did you mean `stage`?",
        f"{file}, line 4: unknown key `stage.stepz`; did you mean `stage.steps`?",
        f"{file}, line 5: unknown key `stage.lr`; did you mean `stage.optimizer.lr` or `stage.critic.lr`?",
        f"{file}, line 7: unknown key `stage.sets.paht`; did you mean `stage.sets.path`?",
        f"{file}, line 8: unknown key `stage.extra.formta`; did you mean `stage.extra.format`?",
        "command line: unknown key `stage.optimizer.beta`; did you mean `stage.optimizer.betas`?",
        "command line: unknown key `zzz`; known keys: output, stage, stops",
    ]


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("steps: 3.5", "line 3: `stage.steps`: expected int, found 3.5"),
        ("steps: many", "line 3: `stage.steps`: expected int, found 'many'"),
        ("steps: true", "line 3: `stage.steps`: expected int, found True"),
        ("name: 3", "line 3: `stage.name`: expected str, found 3"),
        ("quick: soon", "line 3: `stage.quick`: expected bool, found 'soon'"),
        ("clip: wide", "line 3: `stage.clip`: expected float or null, found 'wide'"),
        ("optimizer: {lr: fast}", "line 3: `stage.optimizer.lr`: expected float, found 'fast'"),
        ("optimizer: {betas: [0.5]}", "line 3: `stage.optimizer.betas`: expected [float, float], found [0.5]"),
        ("optimizer: fast", "line 3: `stage.optimizer`: expected a section of settings, found 'fast'"),
        ("data: {format: txt}", "found 'txt'; did you mean 'text'?"),
        ("data: {path: 3}", "`stage.data.path`: expected str or list of str, found 3"),
        ("data: {fields: [a]}", "`stage.data.fields`: expected mapping of str to str, found ['a']"),
        ("extra: 3", "line 3: `stage.extra`: expected a section of settings or null, found 3"),
        ("steps: 1\n  steps: 2", "line 4: `stage.steps` is given twice"),
    ],
)
def test_wrong_values(tmp_path: Path, written: str, complaint: str) -> None:
    assert complaint in refusal(tmp_path, f"output: o\nstage:\n  {written}\n")


def test_wrong_overrides(tmp_path: Path) -> None:
    assert "command line: `stage.steps`: expected int, found 'x'" in refusal(tmp_path, "output: o", "stage.steps=x")
    assert "`stage.steps` has no value; write `stage.steps=VALUE`" in refusal(tmp_path, "output: o", "stage.steps")
    assert "give its keys one by one" in refusal(tmp_path, "output: o", "stage={steps: 3}")


def test_what_a_class_refuses_is_told_with_its_section(tmp_path: Path) -> None:
    text = "output: o\nstage: {optimizer: {lr: -1}}"
    assert refusal(tmp_path, text) == "`stage.optimizer`: lr: expected at least 0, found -1.0"


def test_a_required_key_that_is_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path, "stops: []") == "required, but not given: output"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read: No such file"):
        load_settings(Run, tmp_path / "absent.yaml")
    assert "run.yaml, line 2: not valid YAML" in refusal(tmp_path, "output: o\nstage: ]\n")
    assert "expected `key: value` lines" in refusal(tmp_path, "- output\n")


def test_yaml_comes_back(tmp_path: Path) -> None:
    run = load(tmp_path, "output: /o\nstage: {extra: {path: /x}, optimizer: {lr: 1e-3}}\nstops: [1]")
    assert load(tmp_path, to_yaml(run)) == run
    assert plain(run)["stage"]["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.95]}


def test_describe_documents_every_key() -> None:
    text = describe(Run)
    assert "output (str; required)\n      folder of the results." in text
    assert "stage.optimizer.lr (float; default 1.0e-05)\n      Peak learning rate." in text
    assert "stage.data.format (one of auto, jsonl, text; default auto)\n      how to read them." in text
    assert "stage.extra (a section of settings or null; default null)\n      more data." in text
    assert "      .path, .format, .fields: as in `stage.data`\n" in text
    assert "      .lr (default 3.0e-05), .betas: as in `stage.optimizer`\n" in text
    assert "stage.clip (float or null; default 0.2)" in text
    assert "output" not in describe(Run, "stage")


def test_type_names() -> None:
    assert type_name(tuple[int, ...]) == "list of int"
    assert type_name(dict[str, str | list[str]]) == "mapping of str to str or list of str"
