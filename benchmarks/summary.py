"""A results file as one short table: ``python benchmarks/summary.py results/<machine>.json``; a case a line, with what was aimed at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

AT_MOST = ("_us", "_ms", "_micronats")  # units of which less is better


def found(aim: str, ours: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """The figure that this aim is about: a column of ours, or how many times as long another way takes."""
    if aim in ours:
        return ours[aim]
    return next((row["times_ours"] for row in rows if row["way"] == aim and "times_ours" in row), None)


def judged(aim: str, wanted: float, value: float | None) -> str:
    if value is None:
        return f"{aim}: not measured (aim {wanted:g})"
    met = value <= wanted if aim.endswith(AT_MOST) else value >= wanted
    return f"{aim}: {value:g} (aim {wanted:g}{'' if met else ', MISSED'})"


def line(op: str, case: str, result: dict[str, Any]) -> tuple[str, ...]:
    rows = [row for row in result["rows"] if "times_ours" in row]
    ours = min(rows, key=lambda row: abs(row["times_ours"] - 1))
    aims = result.get("aims", {})
    rates = [f"{ours[key]:g} {name}" for key, name in (("gb_s", "GB/s"), ("gflop_s", "GFLOP/s")) if ours.get(key)]
    verdicts = [judged(aim, wanted, found(aim, ours, rows)) for aim, wanted in aims.items()]
    return op, case, f"{ours['median_ms']:g}", ", ".join(rates), "; ".join(verdicts)


def main(path: str) -> None:
    results = json.loads(Path(path).read_text())
    table = Table(title=results["machine"], title_justify="left")
    for heading in ("op", "case", "ms", "rate", "aims"):
        table.add_column(heading)
    for op, cases in results["ops"].items():
        for case, result in cases.items():
            if any("times_ours" in row for row in result["rows"]):  # some benchmarks tell other things than times
                table.add_row(*line(op, case, result))
    Console(width=180).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
