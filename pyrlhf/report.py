"""report.html: a run's curves, samples and tables in one file that needs nothing else.

Samples come from a model and from data, so every text is escaped and the page loads nothing from outside.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrlhf.metrics import read_lines
from pyrlhf.settings import to_yaml

SHOWN_SAMPLES = 24
TELLING_PARTS = ("loss", "reward", "win_rate", "kl", "accuracy", "perplexity", "skipped")
_RESERVED = ("stage", "step", "time", "nonfinite")

# Curves that are read together, and have about one scale, share a picture; a name joins the first group it has a part of.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("win rate", ("win_rate",)),
    ("reward", ("reward", "score", "gain")),
    ("KL coefficient", ("kl_coef",)),
    ("KL between old and new policy", ("approx_kl",)),
    ("KL a token", ("kl_per_token",)),
    ("KL to the reference", ("kl",)),
    ("policy loss", ("policy_loss",)),
    ("value loss", ("value_loss",)),
    ("loss", ("loss",)),
    ("accuracy", ("accuracy",)),
    ("explained variance", ("explained",)),
    ("perplexity", ("perplexity",)),
    ("clipping", ("clip",)),
    ("ratio", ("ratio",)),
    ("entropy", ("entropy",)),
    ("responses that end", ("eos", "truncated")),
    ("response length", ("length",)),
    ("advantage", ("advantage", "return")),
    ("gradient norm", ("grad",)),
    ("learning rate", ("lr",)),
    ("rollout against training", ("mismatch",)),
    ("tokens a second", ("per_second",)),
    ("seconds", ("seconds",)),
    ("memory", ("memory",)),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { border: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 34em; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 8px; }
.curves img { width: 100%; }
"""


def write_report(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """Write ``folder``/report.html from the metrics, samples and tables of all stages below ``folder``.

    Args:
        folder: a run's output folder.
        recipe: the run's settings as plain values.
    """
    stages = [path.parent for path in sorted(folder.rglob("metrics.jsonl"), key=_order)]
    parts = [_stage_part(stage, str(stage.relative_to(folder))) for stage in stages]
    title = html.escape(folder.name)
    body = [f"<h1>{title}</h1>", _overview(stages, folder), *parts, "<h2>Recipe</h2>"]
    body.append(f"<pre>{_escape(to_yaml(recipe))}</pre>")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _order(metrics: Path) -> tuple[float, str]:
    """Stages in the order in which they first wrote."""
    lines = read_lines(metrics)
    return (float(lines[0].get("time", 0.0)) if lines else math.inf, str(metrics))


def _overview(stages: Sequence[Path], folder: Path) -> str:
    """One row a stage: its last value of the numbers that people look for."""
    rows = []
    for stage in stages:
        last = last_numbers(read_lines(stage / "metrics.jsonl"))
        steps = max((line.get("step", 0) for line in read_lines(stage / "metrics.jsonl")), default=0)
        telling = {k: v for k, v in last.items() if any(part in k for part in TELLING_PARTS)}
        shown = " · ".join(f"{name} {value:.4g}" for name, value in list(telling.items())[:12])
        rows.append({"stage": str(stage.relative_to(folder)), "steps": steps, "at the end": shown})
    return table(rows) if rows else "<p>No stage has written numbers yet.</p>"


def _stage_part(stage: Path, name: str) -> str:
    lines = read_lines(stage / "metrics.jsonl")
    pictures = [f'<img alt="{_escape(title)}" src="data:image/png;base64,{png}">' for title, png in _pictures(lines)]
    parts = [f"<h2>{_escape(name)}</h2>", f'<div class="curves">{"".join(pictures)}</div>']
    for path in sorted(stage.glob("*.json")):
        if path.name not in ("started.json", "done.json"):
            parts.append(_json_part(path))
    rows = [{k: v for k, v in row.items() if k not in ("stage", "time")} for row in read_lines(stage / "samples.jsonl")]
    if rows and "step" in rows[0]:
        parts.append(f"<h3>Samples</h3>{table(_first_and_last(rows))}")
    return "".join(parts)


def _json_part(path: Path) -> str:
    """A table of a stage's own results, if the file holds one: {row: {column: number}} or [{column: value}]."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    if isinstance(found, dict) and found and all(isinstance(value, dict) for value in found.values()):
        found = [{"": name, **row} for name, row in found.items()]
    if isinstance(found, dict) and all(isinstance(value, (int, float, str, type(None))) for value in found.values()):
        found = [{"": name, "value": value} for name, value in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        return ""
    return f"<h3>{_escape(path.stem)}</h3>{table(found)}"


def _first_and_last(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of the first and of the last steps, where there are many."""
    half = SHOWN_SAMPLES // 2
    return list(rows) if len(rows) <= SHOWN_SAMPLES else [*rows[:half], *rows[-half:]]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML table; numbers to four digits, texts escaped."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{_escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in names)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    if value is not None and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return f'<td class="text">{_escape(value or "")}</td>'


def _escape(text: str) -> str:
    """Escaped, and without the control characters that HTML forbids."""
    return html.escape("".join(c for c in text if c in "\n\t" or ord(c) >= 32))


# ---- curves -------------------------------------------------------------------------------------------------------


def series(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (steps, values); a number that was not finite is a gap."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name in _RESERVED or not (value is None or isinstance(value, (int, float))):
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(int(line["step"]))
            values.append(math.nan if value is None else float(value))
    return curves


def last_numbers(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each number's last finite value."""
    return {
        name: finite[-1]
        for name, (_, values) in series(lines).items()
        if (finite := [value for value in values if math.isfinite(value)])
    }


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Picture -> curves; what belongs to no group is drawn alone. A number joins the first group that it matches."""
    pictures: dict[str, list[str]] = {title: [] for title, _ in GROUPS}
    for name in names:
        words = name.lower().replace("/", "_")
        title = next((title for title, stems in GROUPS if any(stem in words for stem in stems)), name)
        pictures.setdefault(title, []).append(name)
    return {title: members for title, members in pictures.items() if members}


def _pictures(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    curves = series(lines)
    for title, names in grouped(list(curves)).items():
        for start in range(0, len(names), 6):  # more than six curves cannot be told apart
            part = {name: curves[name] for name in names[start : start + 6]}
            if all(len(steps) < 2 or not any(values) for steps, values in part.values()):
                continue  # one point, or zeros: the table above says as much
            yield title, base64.b64encode(_draw(title, part)).decode()


def _draw(title: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> bytes:
    """A PNG of some curves over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        axes.plot(
            steps,
            values,
            label=name.replace("$", r"\$"),
            linewidth=1.2,
            marker="o" if len(steps) < 12 else "",
            markersize=3,
        )
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
