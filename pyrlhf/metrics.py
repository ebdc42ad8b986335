"""Numbers of a run: one JSON line a step, samples, a progress bar, and TensorBoard if asked for.

``metrics.jsonl`` holds ``{"stage", "step", "time", <name>: <number>, ...}``. A number that is not finite is written as
``null`` and named in ``"nonfinite"``, so every line stays valid JSON for every reader.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrlhf.terminal import console, log, printable, say

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# What a person watches, in this order; a stage's numbers that match come on the live line.
TELLING = ("loss", "reward", "kl", "accuracy", "ptx_loss", "perplexity", "entropy", "response_length", "lr")
LIVE_NUMBERS = 5
SHOWN_ROWS = 4
CELL_CHARACTERS = 400

FIRST_PLAIN_LINE = 30.0  # seconds between lines where there is no terminal; grows, so that long logs stay short
LAST_PLAIN_LINE = 600.0
RATE_WINDOW = 30.0


class Metrics:
    """Writes and shows the numbers of one stage.

    Args:
        folder: where ``metrics.jsonl``, ``samples.jsonl`` and ``tensorboard/`` go. Existing lines are kept and
            appended to; call ``truncate_after`` when resuming from an older step.
        stage: the name written into every line.
        is_main: only the main rank writes and prints; on the others every method returns at once.
        tensorboard: also write TensorBoard events. ImportError if it is not installed.
    """

    def __init__(self, folder: Path, stage: str, *, is_main: bool = True, tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        self.stage = stage
        self.is_main = is_main
        self._writer: Any = None
        self._writer_class = _summary_writer() if tensorboard and is_main else None
        self._purge_step: int | None = None
        self._bars: list[Progress] = []
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.samples_path):
                drop_torn_line(path)

    @property
    def path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.folder / "samples.jsonl"

    def log(self, step: int, numbers: Mapping[str, Any], *, show: bool = False) -> None:
        """Write one line of numbers (Python numbers or tensors of one element) and refresh the live line.

        ``show`` also prints all of them, above the bar and into the log.

        Raises:
            TypeError: a value is not a number.
        """
        if not self.is_main:
            return
        values = {name: _number(name, value) for name, value in numbers.items()}
        _append(self.path, [self._line(step, values)])
        if self._bars:
            self._bars[0].show(live_line(values))
        if show:
            say(f"{self.stage}, step {step}: {' · '.join(f'{name} {_short(value)}' for name, value in values.items())}")
        if self._writer_class is not None:
            writer = self._tensorboard()
            for name, value in values.items():
                writer.add_scalar(f"{self.stage}/{name}", value, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write every row to ``samples.jsonl`` and show the first few as a table. Cells are texts or numbers."""
        if not self.is_main or not rows:
            return
        _append(self.samples_path, [self._line(step, row) for row in rows])
        _print_table(f"{self.stage}, step {step}", rows[:SHOWN_ROWS])

    def note(self, text: str) -> None:
        """Tell the user something that is no number: printed above the bar and kept in the log."""
        if self.is_main:
            say(f"{self.stage}: {text}")

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps later than ``step``: a resumed stage writes them again."""
        if not self.is_main:
            return
        for path in (self.path, self.samples_path):
            lines = [line for line in read_lines(path) if line.get("step", 0) <= step]
            if path.exists():
                rewrite(path, lines)
        self._purge_step = step + 1

    @contextlib.contextmanager
    def progress(self, total: int, description: str, unit: str = "tok", completed: int = 0) -> Iterator[Progress]:
        """Show progress over ``total`` steps: a live bar in a terminal, a line now and then elsewhere.

        Args:
            total: steps in all.
            description: what is being done.
            unit: what ``advance(tokens=...)`` counts.
            completed: steps that were done before (a resumed stage).
        """
        outer = self._bars[-1] if self._bars else None
        bar = Progress(total, description, unit, completed, visible=self.is_main, outer=outer)
        self._bars.append(bar)
        try:
            with bar.running():
                yield bar
        finally:
            self._bars.remove(bar)

    def close(self) -> None:
        """Flush TensorBoard; the other files are complete after every call."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _line(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        clean, nonfinite = _finite(values)
        head = {"stage": self.stage, "step": int(step), "time": round(time.time(), 3)}
        line = {**head, **clean, **head}
        return {**line, "nonfinite": nonfinite} if nonfinite else line

    def _tensorboard(self) -> Any:
        if self._writer is None:
            assert self._writer_class is not None
            self._writer = self._writer_class(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        return self._writer


class Progress:
    """A running count of steps and tokens; made by ``Metrics.progress``."""

    def __init__(
        self, total: int, description: str, unit: str, completed: int, *, visible: bool, outer: Progress | None
    ) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.steps = completed
        self.tokens = 0
        self._first_step = completed
        self._visible = visible
        self._outer = outer
        self._live = ""
        self._start = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)])
        self._next_line = self._start + FIRST_PLAIN_LINE
        self._interval = FIRST_PLAIN_LINE
        self._rich: RichProgress | None = None
        self._task: Any = None

    def advance(self, steps: int = 1, tokens: int = 0) -> None:
        """Count ``steps`` more steps that handled ``tokens`` tokens."""
        self.steps += steps
        self.tokens += tokens
        now = time.monotonic()
        self._recent.append((now, self.tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_WINDOW:
            self._recent.popleft()
        if self._rich is not None:
            self._update()
        elif self._visible and self._outer is None and now >= self._next_line:
            self._interval = min(self._interval * 1.5, LAST_PLAIN_LINE)
            self._next_line = now + self._interval
            say(self.line())

    def show(self, live: str) -> None:
        """Set the short text after the bar."""
        self._live = live
        if self._rich is not None:
            self._update()

    def rate(self) -> float:
        """Tokens a second over the last half minute."""
        (then, before), (now, after) = self._recent[0], self._recent[-1]
        return (after - before) / max(now - then, 1e-9) if after > before else 0.0

    def line(self) -> str:
        """The state in one plain line."""
        elapsed = time.monotonic() - self._start
        done = self.steps - self._first_step
        parts = [f"{self.description} {self.steps}/{self.total}", f"{clock(elapsed)} gone"]
        if self.steps < self.total and done:
            parts.append(f"{clock(elapsed / done * (self.total - self.steps))} left")
        if self.tokens:
            parts.append(f"{self.tokens / max(elapsed, 1e-9):,.0f} {self.unit}/s")
        return " · ".join([*parts, self._live] if self._live else parts)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if not self._visible:
            yield
        elif console().is_terminal:
            with self._rich_bar():
                yield
        else:
            yield
            if self._outer is None:
                say(self.line())

    @contextlib.contextmanager
    def _rich_bar(self) -> Iterator[None]:
        # An inner bar joins the outer one's display: a terminal has room for one live display only.
        if self._outer is not None and self._outer._rich is not None:
            self._rich = self._outer._rich
            self._task = self._rich.add_task("", total=self.total, speed="", live="")
            self._update()
            yield
            self._rich.remove_task(self._task)
            return
        self._rich = _rich_progress()
        self._task = self._rich.add_task("", total=self.total, speed="", live="")
        with self._rich:
            self._update()
            yield
        log.info(self.line())

    def _update(self) -> None:
        assert self._rich is not None
        speed = f"{self.rate():,.0f} {self.unit}/s" if self.tokens else ""
        self._rich.update(
            self._task,
            completed=self.steps,
            description=printable(self.description),
            speed=speed,
            live=printable(self._live),
        )


def _rich_progress() -> RichProgress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[live]}", markup=False),
        console=console(),
    )


def live_line(numbers: Mapping[str, Any]) -> str:
    """The few numbers worth watching, e.g. ``loss 2.31 · reward 0.42 · kl 3.1``; others follow if room is left."""
    chosen: list[str] = []
    for stem in TELLING:
        matches = [name for name in numbers if name.rsplit("/", 1)[-1] == stem]
        near = [name for name in numbers if name.rsplit("/", 1)[-1].startswith(stem + "_")]
        chosen += [name for name in (matches or near[:1]) if name not in chosen][:1]
    return " · ".join(f"{name} {_short(numbers[name])}" for name in chosen[:LIVE_NUMBERS])


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``; ``3723`` -> ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics or samples file; [] if there is none. A torn last line is left out."""
    if not path.exists():
        return []
    raw = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in raw[:-1] if line]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else printable(str(value), 40)


def _number(name: str, value: Any) -> int | float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, bool) else value
    raise TypeError(f"metric {name!r}: expected a number or a tensor of one element, found {type(value).__name__}")


def _finite(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    clean: dict[str, Any] = {}
    nonfinite: list[str] = []
    for name, value in values.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(name)
            value = None
        clean[name] = value
    return clean, nonfinite


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def rewrite(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Make ``lines`` the whole file in one move: whoever reads it, or dies meanwhile, has the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    _append(new, lines)
    os.replace(new, path)


def drop_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line; what follows it would be unreadable."""
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole != len(raw):
        with path.open("rb+") as file:
            file.truncate(whole)


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    limit = CELL_CHARACTERS if console().is_terminal else CELL_CHARACTERS // 4
    table = Table(title=Text(title), show_lines=True)
    for name in names:
        numeric = all(isinstance(row.get(name), (int, float)) for row in rows)
        table.add_column(Text(name), overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name), limit)) for name in names))
    console().print(table)


def _cell(value: Any, limit: int) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else printable(str(value), limit)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: true needs TensorBoard; `pip install tensorboard` ({error})") from error
    return SummaryWriter
