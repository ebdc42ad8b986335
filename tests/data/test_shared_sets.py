"""Every set of real data loads by its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pyrlhf.data import (
    DataConfig,
    Message,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_texts,
)

Find = Callable[[str], Path]
TASK = "{instruction}\n{input}"
IBUPROFEN = (Message("user", "布洛芬和对乙酰氨基酚的区别是？"),)


def test_tinyshakespeare(shared_data: Find) -> None:
    path = str(shared_data("tinyshakespeare") / "input.txt")
    texts, _ = read_texts(DataConfig(path, documents="paragraph"))
    assert len(texts) == 7222
    assert texts[0].text == "First Citizen:\nBefore we proceed any further, hear me speak."
    assert texts[-1].source == f"{path}:39997"
    (whole,), _ = read_texts(DataConfig(path))
    assert len(whole.text.encode()) == 1_115_394
    assert len(read_texts(DataConfig(path, documents="line"))[0]) == 32777


def test_sst(shared_data: Find) -> None:
    folder = shared_data("sst_fine")
    for split, lines, groups in (("train", 8544, 1092), ("dev", 1101, 139), ("test", 2210, 279)):
        config = DataConfig(str(folder / f"stsa.fine.{split}.txt"), format="labelled_lines")
        rankings, counts = read_rankings(config)
        assert (counts.rows, len(rankings)) == (lines, groups)
        assert all(r.prompt == "" and r.ranks == (0, 1, 2, 3, 4) for r in rankings)
        labels = dict(line.split(" ", 1)[::-1] for line in Path(str(config.path)).read_text("utf-8").splitlines())
        assert [labels[s] for s in rankings[0].responses] == ["4", "3", "2", "1", "0"]
    texts, _ = read_texts(DataConfig(str(folder / "stsa.fine.dev.txt"), format="labelled_lines"))
    assert len(texts) == 1101
    assert texts[1].text == "one long string of cliches ."


def test_pandalm(shared_data: Find) -> None:
    path = str(shared_data("pandalm") / "kway_human.jsonl")
    fields: dict[str, str | list[str]] = {
        "prompt": TASK,
        "responses": "responses[].text",
        "scores": "responses[].human_win_rate",
    }
    rankings, counts = read_rankings(DataConfig(path, fields=fields))
    assert counts.numbers() == {"rows": 170, "records": 170, "skipped": 0}
    assert rankings[0].ranks == (0, 1, 1, 2)
    assert rankings[0].responses[0] == "If you have any questions, please let me know."
    assert str(rankings[0].prompt).endswith("unnecessary words.\nIf you have any questions about my rate or if you find it "
                                       "necessary to increase or decrease the scope for this project, please let me know.")  # fmt: skip
    assert {len(r.responses) for r in rankings} == {2, 3, 4, 5, 6, 8, 13}
    assert "" in rankings[4].responses, "a model that said nothing was ranked too"
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    kept = [rows[int(r.source.rsplit(":", 1)[1]) - 1] for r in rankings]
    assert sum(not row["input"] for row in kept) > 20
    for row, r in zip(kept, rankings):
        assert r.prompt == (f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"])


def test_oasst(shared_data: Find) -> None:
    folder = shared_data("oasst_zh")
    fields: dict[str, str | list[str]] = {"prompt": TASK, "history": "history"}
    rankings, _ = read_rankings(
        DataConfig(str(folder / "ranking_rm_zh.json"), best_first=True, fields={**fields, "responses": "output"})
    )
    assert len(rankings) == 775
    assert rankings[0].prompt == IBUPROFEN
    assert rankings[0].ranks == (0, 1, 2, 3)
    assert rankings[0].responses[-1] == "能吃"
    assert {len(r.responses) for r in rankings} == {2, 3, 4, 5, 6, 8, 10}
    thanks = next(r for r in rankings if len(r.prompt) > 1)
    assert [turn.role for turn in thanks.prompt if isinstance(turn, Message)] == ["user", "assistant", "user"]
    assert thanks.prompt[-1] == Message("user", "谢谢")
    shown, _ = read_demonstrations(DataConfig(str(folder / "sft_zh.json"), fields={**fields, "response": "output"}))
    assert len(shown) == 766
    assert shown[0].prompt == IBUPROFEN
    assert shown[0].response.startswith("根据维基百科，\n布洛芬")


@pytest.mark.parametrize(("name", "rows", "pairs"), [("helpful", 2354, 2345), ("harmless", 2312, 2307)])
def test_hh_rlhf(shared_data: Find, name: str, rows: int, pairs: int) -> None:
    path = str(shared_data("hh_rlhf") / f"{name}-base.test.jsonl.gz")
    rankings, counts = read_rankings(DataConfig(path, dialogue="human_assistant", on_error="skip"))
    assert counts.numbers() == {"rows": rows, "records": pairs, "skipped": rows - pairs}
    assert all(r.ranks == (0, 1) and len(r.responses) == 2 for r in rankings)
    prompts, _ = read_prompts(DataConfig(path, dialogue="human_assistant", fields={"messages": "chosen"}))
    assert len(prompts) == rows
    assert prompts[0].prompt == rankings[0].prompt
    if name == "helpful":
        assert rankings[0].prompt == (
            Message("user", "Do you know why turkeys became the official food of thanksgiving?"),
        )
        assert rankings[0].responses[0].startswith("To be honest, I don’t know anything about that.")


def test_belle(shared_data: Find) -> None:
    folder = shared_data("belle_zh")
    questions = DataConfig(
        str(folder / "eval_set.json"), fields={"prompt": "question", "response": "std_answer"}, on_error="skip"
    )
    prompts, _ = read_prompts(questions)
    assert len(prompts) == 1000
    assert prompts[0].prompt == "请你写出一个可以生成五个不同随机数的 Python 程序。"
    answered, counts = read_demonstrations(questions)
    assert (len(answered), counts.skipped) == (631, 369), "questions without a standard answer"
    dev, _ = read_demonstrations(DataConfig(str(folder / "dev1K.json"), fields={"prompt": TASK, "response": "output"}))
    assert len(dev) == 1000
    assert isinstance(dev[0].prompt, str)
    assert dev[0].prompt.startswith("题目：小明每天早上花费10分钟")
    nested: dict[str, str | list[str]] = {
        "prompt": "{instruction}\n{instances[0].input}",
        "response": "instances[0].output",
    }
    seeds, _ = read_demonstrations(DataConfig(str(folder / "zh_seed_tasks.json"), fields=nested))
    assert len(seeds) == 175
    assert seeds[0].prompt == "请以下面词语为主题写一首诗\n夏天"
    assert seeds[0].response == "不但春妍夏亦佳，随缘花草是生涯。\n鹿葱解插纤长柄，金凤仍开最小花。"


def test_gsm8k(shared_data: Find) -> None:
    folder = shared_data("gsm8k")
    fields: dict[str, str | list[str]] = {"prompt": "{question}\n", "response": "answer"}
    shown, _ = read_demonstrations(DataConfig(str(folder / "test.jsonl"), fields=fields))
    assert len(shown) == 1319
    assert shown[0].response.endswith("\n#### 18")
    assert isinstance(shown[0].prompt, str)
    assert shown[0].prompt.endswith("at the farmers' market?\n")
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    four: dict[str, str | list[str]] = {
        "prompt": "{question}\n",
        "responses": [f"{model}.solution" for model in models],
        "scores": [f"{model}.is_correct" for model in models],
    }
    rankings, _ = read_rankings(DataConfig(str(folder / "example_model_solutions.jsonl"), fields=four))
    assert len(rankings) == 1319
    assert all(len(r.responses) == 4 for r in rankings)
    assert rankings[0].ranks == (1, 1, 1, 0)
    assert rankings[0].responses[3].endswith("A: 18")
    assert any(set(r.ranks) == {0} for r in rankings), "all right or all wrong: a ranking of ties"
