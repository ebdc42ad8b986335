"""What the user sees and what only the log keeps.

Libraries below us write to stdout and stderr from Python and from C++. ``quiet(log)`` points both file descriptors at
the log for the length of a run, so that nothing but our own console reaches the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("pyrlhf")

_stream: IO[str] | None = None  # the real stdout while ``quiet`` holds the descriptors
_console: tuple[IO[str], Console] | None = None


def is_main_process() -> bool:
    """True on the rank that prints and writes files (launchers set RANK; without one there is a single process)."""
    return int(os.environ.get("RANK", "0")) == 0


def out() -> IO[str]:
    """The terminal's stdout, also while ``quiet`` holds the descriptors."""
    return _stream or sys.stdout


def console() -> Console:
    """The one console that everything is printed through, so that tables and notes appear above a live bar."""
    global _console
    from rich.console import Console

    stream = out()
    if _console is None or _console[0] is not stream:
        width = None if stream.isatty() else 120
        _console = (stream, Console(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=width))
    return _console[1]


def say(text: str) -> None:
    """Print one line for the user (main rank only) and keep it in the log."""
    log.info(text)
    if is_main_process():
        console().print(text, markup=False)


def printable(text: str, limit: int | None = None) -> str:
    """``text`` without control characters (a sample must not drive the terminal), at most ``limit`` characters."""
    clean = "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if limit is None or len(clean) <= limit else clean[: limit - 1] + "…"


@contextlib.contextmanager
def quiet(log_path: Path | None) -> Iterator[None]:
    """Send stdout, stderr, warnings and every logger to ``log_path`` (appended); ``console`` keeps the real stdout.

    ``None`` changes nothing: used with ``--debug``, where the noise is wanted.
    """
    global _stream
    if log_path is None:
        yield
        return
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    outer = _stream
    with log_path.open("a", encoding="utf-8") as sink, contextlib.ExitStack() as undo:
        if outer is None:
            undo.callback(_restore, "_stream", None)
            _stream = _keep_stdout(undo)
        for stream in (sys.stdout, sys.stderr):
            _redirect(stream, sink, undo)
        _log_to(log_path, undo)
        yield


def _restore(name: str, value: object) -> None:
    globals()[name] = value


def _keep_stdout(undo: contextlib.ExitStack) -> IO[str]:
    """A stream on the present stdout that survives the redirection; stdout itself where it has no descriptor."""
    try:
        copy = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):
        return sys.stdout
    stream = os.fdopen(copy, "w", encoding=sys.stdout.encoding or "utf-8", errors="replace", buffering=1)
    undo.callback(stream.close)
    return stream


def _redirect(stream: IO[str], sink: IO[str], undo: contextlib.ExitStack) -> None:
    """Point ``stream``'s descriptor at ``sink``; a stream without one (a test's StringIO) is left as it is."""
    try:
        number = stream.fileno()
        saved = os.dup(number)
    except (OSError, ValueError):
        return

    def back() -> None:
        stream.flush()
        os.dup2(saved, number)
        os.close(saved)

    os.dup2(sink.fileno(), number)
    undo.callback(back)


def _log_to(path: Path, undo: contextlib.ExitStack) -> None:
    root = logging.getLogger()
    handler = logging.FileHandler(path, encoding="utf-8")
    rank = os.environ.get("RANK", "0")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)

    def back() -> None:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()

    undo.callback(back)
