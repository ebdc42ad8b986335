"""The report: whole, self-contained, and safe to open whatever a model wrote."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pyrlhf.metrics import Metrics
from pyrlhf.report import grouped, last_numbers, series, table, write_report

EVIL = "<script>alert('x')</script><img src=http://evil.example/x>\x1b[31m&amp;"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps tags, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    sft, ppo = Metrics(tmp_path / "01-sft", "sft"), Metrics(tmp_path / "02-ppo", "ppo")
    for step in range(5):
        sft.log(step, {"loss": 3.0 - step, "lr": 1e-5})
        ppo.log(
            step,
            {
                "reward": float("nan") if step == 2 else step / 2,
                "kl": float(step),
                "odd$name": 1.0 + step,
                "skipped_steps": 0,
            },
        )
    ppo.samples(4, [{"prompt": "a", "response": EVIL, "score": 0.123456}])
    (tmp_path / "02-ppo" / "evaluation.json").write_text(json.dumps({"policy": {"win_rate": 0.75, "kl": 3.0}}))
    (tmp_path / "02-ppo" / "start.json").write_text(json.dumps({"prompts": ["p"], "scores": [1.0]}))
    path = write_report(tmp_path, {"output": str(tmp_path), "ppo": {"kl_coef": 0.02, "note": EVIL}})
    assert path == tmp_path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert page.open == []
    assert "script" not in page.tags
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_pictures_are_png(page: Page) -> None:
    images = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    assert len(images) == 2 + 3  # sft: loss, learning rate; ppo: reward, KL, the odd one; zeros are not drawn
    assert all(image.startswith(b"\x89PNG") for image in images)


def test_samples_tables_and_recipe_are_there_as_text(page: Page) -> None:
    assert "<script>alert('x')</script><img src=http://evil.example/x>[31m&amp;" in page.text
    assert "0.1235" in page.text
    assert "evaluation" in page.text
    assert "0.75" in page.text
    recipe = page.text[page.text.index("Recipe") + len("Recipe") :]
    assert yaml.safe_load(recipe)["ppo"]["kl_coef"] == 0.02
    assert page.text.index("01-sft") < page.text.index("02-ppo")


def test_a_run_without_numbers_still_has_a_report(tmp_path: Path) -> None:
    assert "No stage has written numbers" in write_report(tmp_path, {"seed": 0}).read_text()


def test_series_leave_gaps_where_a_number_was_not_finite() -> None:
    lines = [
        {"stage": "s", "step": 0, "time": 1.0, "a": 1.0},
        {"stage": "s", "step": 2, "a": None, "nonfinite": ["a"], "b": 3},
    ]
    curves = series(lines)
    assert curves["a"][0] == [0, 2]
    assert curves["a"][1][0] == 1.0
    assert curves["a"][1][1] != curves["a"][1][1]
    assert curves["b"] == ([2], [3.0])
    assert last_numbers(lines) == {"a": 1.0, "b": 3.0}


def test_groups() -> None:
    assert grouped(["eval/kl", "kl_coef", "kl", "custom", "approx_kl", "policy_loss", "loss"]) == {
        "KL coefficient": ["kl_coef"],
        "KL between old and new policy": ["approx_kl"],
        "KL to the reference": ["eval/kl", "kl"],
        "policy loss": ["policy_loss"],
        "loss": ["loss"],
        "custom": ["custom"],
    }


def test_table_escapes_names_and_cells() -> None:
    assert table([{"<b>": "<i>", "n": 2, "x": 0.5, "none": None}]) == (
        "<table><thead><tr><th>&lt;b&gt;</th><th>n</th><th>x</th><th>none</th></tr></thead><tbody><tr>"
        '<td class="text">&lt;i&gt;</td><td class="number">2</td><td class="number">0.5</td><td class="text"></td></tr></tbody></table>'
    )
