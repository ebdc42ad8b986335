"""Rows -> records: field mapping, dialogues, ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrlhf.data import (
    DataConfig,
    Demonstration,
    MalformedRow,
    Message,
    Prompt,
    Ranking,
    dense_ranks,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_texts,
)

HI, HO, YES = Message("user", "hi"), Message("assistant", "ho"), Message("user", "yes")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """config(row, ..., **settings): a DataConfig of a file that holds these rows."""

    def make(*rows: Any, **settings: Any) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataConfig(str(path), **settings)

    return make


def ranking(config: DataConfig) -> tuple[Any, ...]:
    ((record,), _) = read_rankings(config)
    return record.prompt, record.responses, record.ranks


def test_columns_of_their_own_name(config: Any) -> None:
    made = config({"text": "t", "prompt": "p", "response": "r"})
    assert read_texts(made)[0][0].text == "t"
    assert read_prompts(made)[0] == [Prompt("p", f"{made.path}:1")]
    assert read_demonstrations(made)[0] == [Demonstration("p", "r", f"{made.path}:1")]


def test_messages(config: Any) -> None:
    turns = [turn._asdict() for turn in (Message("system", "be kind"), HI, HO)]
    made = config({"messages": turns})
    (record,) = read_demonstrations(made)[0]
    assert (record.prompt, record.response) == ((Message("system", "be kind"), HI), "ho")
    assert read_prompts(made)[0][0].prompt == (Message("system", "be kind"), HI), "the answer is no part of the prompt"
    with pytest.raises(MalformedRow, match="expected the last turn to be the assistant's, found 'user'"):
        read_demonstrations(config({"messages": turns[:2]}))
    with pytest.raises(MalformedRow, match=r"messages\[0\].role: expected one of .*found 'bot'"):
        read_prompts(config({"messages": [{"role": "bot", "content": "x"}]}))
    with pytest.raises(MalformedRow, match="expected a turn before the assistant's answer"):
        read_prompts(config({"messages": turns[2:]}))
    with pytest.raises(MalformedRow, match=r"messages\[0\].content: expected text, found null"):
        read_prompts(config({"messages": [{"role": "user", "content": None}]}))
    with pytest.raises(MalformedRow, match=r"expected a list of \{role, content\}, found text"):
        read_prompts(config({"messages": "hi"}))


def test_other_names_inside_messages(config: Any) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    fields = {"messages": "conversations", "role": "from", "content": "value"}
    (record,) = read_demonstrations(config({"conversations": turns}, fields=fields))[0]
    assert (record.prompt, record.response) == ((HI,), "ho")


def test_system_history_and_chat_make_messages(config: Any) -> None:
    row = {"q": "yes", "sys": "be kind", "old": [["hi", "ho"]]}
    full = {"prompt": "q", "system": "sys", "history": "old"}
    (record,) = read_prompts(config(row, fields=full))[0]
    assert record.prompt == (Message("system", "be kind"), HI, HO, YES)
    assert read_prompts(config(row, fields={"prompt": "q"}, chat=True))[0][0].prompt == (YES,)
    empty = config({**row, "sys": "", "old": []}, fields=full)
    assert read_prompts(empty)[0][0].prompt == (YES,), "messages in every row, whatever its history"
    with pytest.raises(MalformedRow, match=r"history\[0\]: expected \[question, answer\]"):
        read_prompts(config({**row, "old": [["hi"]]}, fields=full))


def test_paths(config: Any) -> None:
    row = {"a": {"b": [{"c": "x"}, {"c": "y"}]}, "with.dot": "z", "m": [["p", "q"], ["r"]]}

    def text(where: str) -> str:
        return read_texts(config(row, fields={"text": where}))[0][0].text

    assert text("a.b[1].c") == "y"
    assert text("with.dot") == "z"
    assert text("m[0][1]") == "q"
    assert ranking(config(row, fields={"prompt": "", "responses": "a.b[].c"}, best_first=True))[1] == ("x", "y")
    for where, reason in {
        "a.b[2].c": r"no element 2 in a list of 2",
        "a.d": r"no field 'a.d'; the row has b",
        "a[0]": r"expected a list, found an object",
        "a.b.c": r"expected an object to hold 'c', found a list",
    }.items():
        with pytest.raises(MalformedRow, match=reason):
            text(where)


def test_templates(config: Any) -> None:
    def text(template: str, **row: Any) -> str:
        return read_texts(config(row, fields={"text": template}))[0][0].text

    assert text("{a}\n{b.c}", a="x", b={"c": "y"}) == "x\ny"
    assert text("{a}\n{b}", a="x", b="") == "x"
    assert text("{a}\n{b}", a="x", b=None) == "x"
    assert text("Q: {a}\n\nA:\n", a="x\ny") == "Q: x\ny\n\nA:\n"
    assert text("{{{a}}} {n}", a="x", n=3) == "{x} 3"
    assert text("{a}", a="{b}", b="no") == "{b}", "what is filled in is not filled in again"
    with pytest.raises(MalformedRow, match="field 'a': expected text, found a list"):
        text("{a}", a=["x"])
    with pytest.raises(MalformedRow, match="no field 'b'; the row has a"):
        text("{a}{b}", a="x")


def test_rankings_by_ranks_scores_and_order(config: Any) -> None:
    row = {"prompt": "p", "responses": ["x", "y", "z"], "votes": [0.5, 2, 0.5], "places": [3, 1, 3]}
    assert ranking(config({**row, "ranks": [2, 1, 2]})) == ("p", ("x", "y", "z"), (1, 0, 1))
    assert ranking(config({**row, "scores": [0, True, 0.0]}))[2] == (1, 0, 1)
    assert ranking(config(row, fields={"scores": "votes"}))[2] == (1, 0, 1)
    assert ranking(config(row, fields={"ranks": "places"}))[2] == (1, 0, 1)
    assert ranking(config(row, best_first=True))[2] == (0, 1, 2)
    assert ranking(config({**row, "ranks": [1, 2, 3], "scores": [1, 2, 3]}, fields={"ranks": "ranks"}))[2] == (0, 1, 2)
    apart = config({"p": "p", "m1": {"t": "x", "ok": False}, "m2": {"t": "y", "ok": True}},
                   fields={"prompt": "p", "responses": ["m1.t", "{m2.t}!"], "scores": ["m1.ok", "m2.ok"]})  # fmt: skip
    assert ranking(apart) == ("p", ("x", "y!"), (1, 0))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"responses": ["x"], "ranks": [1]}, "at least 2 responses, found 1"),
        ({"responses": ["x", "y"], "ranks": [1]}, "2 responses but 1 ranks or scores"),
        ({"responses": ["x", 5], "ranks": [1, 2]}, r"responses\[1\]: expected text, found 5"),
        ({"responses": ["x", "y"], "scores": [1, float("nan")]}, "expected finite numbers, found nan"),
        ({"responses": ["x", "y"], "scores": [1, "2"]}, "expected numbers, found '2'"),
        ({"responses": ["x", "y"]}, "no field 'ranks'"),
        ({"responses": "xy", "ranks": [1, 2]}, "responses: expected a list, found text"),
        ({"chosen": "x"}, "no field 'rejected'"),
    ],
)
def test_malformed_rankings(config: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRow, match=rf"rows\.jsonl:1: .*{reason}"):
        read_rankings(config({"prompt": "p", **row}))


def test_rankings_keep_ties_and_equal_answers(config: Any) -> None:
    row = {"prompt": "p", "responses": ["x", "x", "y"], "ranks": [0, 1, 1]}
    assert ranking(config(row)) == ("p", ("x", "x", "y"), (0, 1, 1))
    assert ranking(config({**row, "ranks": [4, 4, 4]}))[2] == (0, 0, 0)
    assert ranking(config({**row, "responses": ["x", "", "y"]}))[1] == ("x", "", "y"), "a model may say nothing"
    with pytest.raises(ValueError, match="expected finite"):
        Ranking("p", ("x", "y"), (0, float("inf")))  # type: ignore[arg-type]
    assert dense_ranks([0.25, -1, 7], higher_is_better=True) == (1, 2, 0)


def test_pairs(config: Any) -> None:
    assert ranking(config({"prompt": "p", "chosen": "x", "rejected": "y"})) == ("p", ("x", "y"), (0, 1))
    good = [t._asdict() for t in (HI, HO, YES, Message("assistant", "a"))]
    bad = [*good[:3], {"role": "assistant", "content": "b"}]
    assert ranking(config({"prompt": "p", "chosen": good, "rejected": bad})) == ((HI, HO, YES), ("a", "b"), (0, 1))
    with pytest.raises(MalformedRow, match="chosen and rejected differ before their last turn"):
        read_rankings(config({"chosen": good, "rejected": good[:2]}))
    with pytest.raises(MalformedRow, match="chosen: expected a turn before the assistant's answer"):
        read_rankings(config({"chosen": good[1:2], "rejected": good[1:2]}))


def test_human_assistant_dialogues(config: Any) -> None:
    start = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: yes"
    row = {"chosen": f"{start}\n\nAssistant: a\n\nb", "rejected": f"{start}\n\nAssistant: c"}
    assert ranking(config(row, dialogue="human_assistant")) == ((HI, HO, YES), ("a\n\nb", "c"), (0, 1))
    made = config(row, dialogue="human_assistant", fields={"messages": "rejected"})
    assert read_demonstrations(made)[0][0].response == "c"
    assert read_prompts(made)[0][0].prompt == (HI, HO, YES)
    for bad, reason in {
        start: "last turn to be the assistant's",
        "Hello": "expected it to begin with",
        "Hello\n\nAssistant: x": "expected it to begin with",
    }.items():
        with pytest.raises(MalformedRow, match=reason):
            read_rankings(config({**row, "rejected": bad}, dialogue="human_assistant"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fields": {"promt": "q"}}, "unknown part 'promt'; did you mean 'prompt'"),
        ({"fields": {"prompt": "a..b"}}, r"cannot read the path 'a\.\.b'"),
        ({"fields": {"prompt": "a[x]"}}, r"cannot read the path"),
        ({"fields": {"prompt": "{a} {"}}, "has an unpaired brace"),
        ({"fields": {"responses": ["a", "b[-1]"], "scores": "s"}}, r"cannot read the path 'b\[-1\]'"),
        ({"fields": {"scores": "s", "ranks": "r"}}, "'scores' and 'ranks' are both mapped"),
        ({"skip": -1}, "data.skip: expected at least 0, found -1"),
        ({"format": "josnl"}, "format: expected one of 'auto', 'jsonl'.*found 'josnl'"),
        ({"limit": 0}, "data.limit: expected at least 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(**{"path": "x", **settings})


LINES = "".join(f"{label} sentence {label}{i}\n" for i in range(6) for label in (0, 1, 2) if label != 1 or i < 3)


def test_labelled_lines(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(LINES)

    def read(**more: Any) -> list[Ranking]:
        return read_rankings(DataConfig(str(tmp_path / "l.txt"), format="labelled_lines", **more))[0]

    first = read()
    assert len(first) == 3
    assert all(r.prompt == "" and r.ranks == (0, 1, 2) for r in first)
    for r in first:
        assert [s[9] for s in r.responses] == ["2", "1", "0"], "a higher label is better"
    assert len({s for r in first for s in r.responses}) == 9, "no sentence twice in one pass"
    assert first == read()
    assert first != read(seed=1)
    more = read(groups=12)
    assert more[:3] == first
    assert len(more) == 12
    assert sorted(r.responses[0] for r in more) == sorted(2 * [f"sentence 2{i}" for i in range(6)])
    assert len(read(limit=4)) == 1, "lines are limited, so that a split never shares a sentence"


def test_malformed_labelled_lines(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    for bad in ("good film", "3", "nan film"):
        path.write_text(LINES + bad + "\n")
        with pytest.raises(MalformedRow, match=r"l\.txt:16: "):
            read_rankings(DataConfig(str(path), format="labelled_lines"))
        rankings, counts = read_rankings(DataConfig(str(path), format="labelled_lines", on_error="skip"))
        assert len(rankings) == 3
        assert counts.numbers() == {"rows": 16, "records": 3, "skipped": 1}
    path.write_text("1 a\n1 b\n")
    with pytest.raises(ValueError, match=r"labels \[1.0\]; rankings need 2 or more"):
        read_rankings(DataConfig(str(path), format="labelled_lines"))


def test_order_does_not_depend_on_the_hash_seed_and_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(LINES)
    code = (
        "import sys; from pyrlhf.data import *\n"
        f"r = read_rankings(DataConfig({str(tmp_path / 'l.txt')!r}, format='labelled_lines', groups=9))[0]\n"
        "s = EpochSampler(20, 6, seed=3)\n"
        "print([x.responses for x in r], [s.batch(k) for k in range(9)])\n"
        "assert not {'torch', 'transformers', 'datasets', 'tokenizers'} & set(sys.modules)\n"
    )
    outputs = set()
    for seed in ("0", "1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1
