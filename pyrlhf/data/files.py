"""Files on disk -> rows, each with the place it came from.

A row is one JSON object, one piece of text, or one row of a ``datasets`` folder. Nothing here knows what a row means
(:mod:`pyrlhf.data.records` does); a row that cannot even be read is handed on with its problem, so that one rule
(``on_error``) decides what happens to every malformed row.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """``value`` is the row, or None where ``problem`` says why it could not be read; ``source`` is "file:line"."""

    source: str
    value: Any
    problem: str = ""


def expand(path: str, folder: str | os.PathLike[str] | None = None) -> str:
    """``path`` with ``~`` and environment variables expanded; a relative one is put under ``folder``.

    Raises ValueError for a variable that is not set.
    """
    full = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{[^}]*\})", full)
    if unset:
        raise ValueError(f"path {path!r}: the environment variable {unset.group(0)} is not set")
    return full if folder is None else os.path.join(os.fspath(folder), full)


def find(paths: str | Sequence[str]) -> list[Path]:
    """The files and ``datasets`` folders that the paths and globs name: in the order given, each glob's matches sorted.

    Raises FileNotFoundError saying what was looked for, and where.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        full = expand(path)
        here = [full] if os.path.exists(full) else sorted(glob.glob(full, recursive=True))
        if not here:
            what = "no file matches the glob" if glob.has_magic(full) else "there is no file or folder"
            raise FileNotFoundError(f"data: {what} {os.path.abspath(full)!r} (given as {path!r}, in {os.getcwd()})")
        found += [Path(p) for p in here]
    return found


def rows(path: Path, format: str, documents: str, split: str | None) -> Iterator[Row]:
    """The rows of one file or folder; the arguments are those of ``DataConfig``. Empty lines are no rows.

    Raises ValueError where the file as a whole cannot be read (a broken gzip, JSON list or ``datasets`` folder).
    """
    if format == "auto":
        format = _guess(path)
    if format == "dataset":
        yield from _dataset_rows(path, split)
        return
    data = _bytes(path)
    if format == "json" and data.lstrip()[:1] == b"[":
        yield from _json_list_rows(path, data)
        return
    pieces = _pieces(data, documents if format == "text" else "line")
    parse = {"text": _text_row, "labelled_lines": _labelled_row}.get(format, _json_row)
    for line, piece in pieces:
        source = f"{path}:{line}"
        try:
            yield Row(source, parse(piece.decode("utf-8")))
        except UnicodeDecodeError as error:
            yield Row(source, None, f"not UTF-8: byte 0x{piece[error.start]:02x} at offset {error.start}")
        except json.JSONDecodeError as error:
            yield Row(source, None, f"not JSON: {error.msg} at column {error.pos + 1}")
        except ValueError as error:
            yield Row(source, None, str(error))


def _guess(path: Path) -> str:
    if path.is_dir():
        return "dataset"
    name = path.name.lower().removesuffix(".gz")
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".txt": "text"}
    suffix = os.path.splitext(name)[1]
    if suffix not in known:
        raise ValueError(
            f"data: the format of {str(path)!r} cannot be told from its name (known: {', '.join(known)}, each also .gz,"
            " and folders saved by datasets); set format: jsonl | json | text | labelled_lines | dataset"
        )
    return known[suffix]


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(
            f"data: {str(path)!r} is a folder; name the files in it with a glob, as in {str(path / '*')!r}"
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data: {str(path)!r} is not a whole gzip file: {error}") from error
    return data.removeprefix(b"\xef\xbb\xbf")


_SEPARATORS = {"line": re.compile(rb"\r?\n"), "paragraph": re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")}


def _pieces(data: bytes, documents: str) -> Iterator[tuple[int, bytes]]:
    """(line of its first byte, bytes) of every line, paragraph or whole file that is not blank."""
    if documents == "file":
        if data.strip():
            yield 1, data
        return
    start, line = 0, 1
    for cut in itertools.chain(_SEPARATORS[documents].finditer(data), [None]):
        piece = data[start : cut.start() if cut else len(data)]
        lead = len(piece) - len(piece.lstrip(b"\r\n"))
        if piece.strip():
            yield line + piece[:lead].count(b"\n"), piece[lead:].rstrip(b"\r\n")
        if cut:
            line += data.count(b"\n", start, cut.end())
            start = cut.end()


def _text_row(text: str) -> dict[str, Any]:
    return {"text": text}


def _json_row(text: str) -> Any:
    value = json.loads(text)
    _check_unicode(text, value)
    return value


def _check_unicode(text: str, value: Any) -> None:
    """JSON can write half a surrogate pair as an escape; no tokenizer can read that."""
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"not Unicode: half a surrogate pair, {error.object[error.start]!r}") from None


def _labelled_row(text: str) -> dict[str, Any]:
    """``label sentence`` -> the label as a number, the sentence as text."""
    label, _, sentence = text.strip().partition(" ")
    try:
        number = float(label)
    except ValueError:
        raise ValueError(f"expected 'label sentence' with a number as its label, found {text[:40]!r}") from None
    if not sentence.strip():
        raise ValueError(f"no sentence after the label {label!r}")
    return {"label": number, "text": sentence.strip()}


def _json_list_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Decodes one element at a time, so that every row knows its line. Nothing after broken JSON can be trusted."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: byte 0x{data[error.start]:02x}") from error
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    at = _after(blank, text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            _check_unicode(text[counted:at], value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; a broken list cannot be read on"
            ) from error
        except ValueError as error:
            yield Row(f"{path}:{line}", None, str(error))
        else:
            yield Row(f"{path}:{line}", value)
        at = _after(blank, text, at)
        if text[at : at + 1] not in (",", "]"):
            end = text.count("\n", 0, at) + 1
            raise ValueError(f"{path}:{end}: not JSON: expected ',' or ']' after the row of line {line}")
        if text[at] == ",":
            at = _after(blank, text, at + 1)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _dataset_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Rows of a folder written by ``Dataset.save_to_disk``; they are counted from 0, as ``datasets`` does."""
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"data: the folder {str(path)!r} was not written by datasets' save_to_disk; for files in it give a glob,"
            f" as in {str(path / '*.jsonl')!r}"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(
                f"data: {str(path)!r} holds the splits {sorted(table)}; set split: to one (found {split!r})"
            )
        table = table[split]
    for i, value in enumerate(table):
        yield Row(f"{path}:{i}", value)
