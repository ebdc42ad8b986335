"""Files and folders -> rows with their lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pyrlhf.data import DataConfig, MalformedRow, read_prompts, read_texts, resolve


def texts(path: Path | list[str] | str, **more: object) -> list[tuple[str, str]]:
    config = DataConfig(path if isinstance(path, list) else str(path), **more)  # type: ignore[arg-type]
    return [(record.text, record.source.rsplit("/", 1)[-1]) for record in read_texts(config)[0]]


def jsonl(path: Path, *words: str) -> Path:
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words), encoding="utf-8")
    return path


def test_jsonl_gzip_and_json_say_the_same(tmp_path: Path) -> None:
    rows = [{"text": "你好"}, {"text": "b\nb"}, {"text": "c"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("a.jsonl", "a.jsonl.gz", "lines.json", "list.json", "list.json.gz"):
        assert [text for text, _ in texts(tmp_path / name)] == ["你好", "b\nb", "c"], name


def test_every_row_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8b"}\n')
    assert texts(tmp_path / "a.jsonl") == [("a", "a.jsonl:1"), ("b\u2028b", "a.jsonl:3")]
    (tmp_path / "b.json").write_text('\n[\n {"text": "a"},\n\n {"text":\n  "b"} ]\n')
    assert texts(tmp_path / "b.json") == [("a", "b.json:3"), ("b", "b.json:5")]


def test_text_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n\none\ntwo\n \t\n\nthree\n\n")
    assert texts(path, documents="paragraph") == [("one\ntwo", "t.txt:3"), ("three", "t.txt:7")]
    assert texts(path, documents="line") == [("one", "t.txt:3"), ("two", "t.txt:4"), ("three", "t.txt:7")]
    assert texts(path) == [("\n\none\ntwo\n \t\n\nthree\n\n", "t.txt:1")]
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert texts(path, documents="paragraph") == [("one\r\ntwo", "t.txt:1"), ("three", "t.txt:4")]


def test_paths_globs_lists_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "c[1]"):
        jsonl(tmp_path / f"{name}.jsonl", name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path))
    assert [t for t, _ in texts(tmp_path / "?.jsonl")] == ["a", "b"]
    assert [t for t, _ in texts(tmp_path / "c[1].jsonl")] == ["c[1]"], "a name that exists is no glob"
    assert [t for t, _ in texts(["~/b.jsonl", "$SETS/a.jsonl", "${SETS}/b.jsonl"])] == ["b", "a", "b"]
    config = resolve(DataConfig(["a.jsonl", "$SETS/b.jsonl"], skip=1), tmp_path)
    assert config == DataConfig([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], skip=1)
    assert resolve(DataConfig("sub/../a.jsonl"), tmp_path).path == str(tmp_path / "sub/../a.jsonl")


def test_missing_files_say_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no file or folder '{tmp_path}/x.jsonl' \(given as 'x.jsonl'"):
        texts("x.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file matches the glob .*y\*\.jsonl"):
        texts("y*.jsonl")
    assert resolve(DataConfig(), tmp_path) == DataConfig(), "no path is no set, wherever the recipe lies"
    with pytest.raises(ValueError, match=r"data\.path: expected a file"):
        read_texts(DataConfig())
    with pytest.raises(ValueError, match=r"variable \$NOT_SET_HERE is not set"):
        texts("$NOT_SET_HERE/x.jsonl")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"format of .*x\.csv' cannot be told.*set format: jsonl"):
        texts("x.csv")


def test_files_broken_as_a_whole(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "list.json").write_text('[{"text": "a"},\n{"text": }]')
    (tmp_path / "open.json").write_text('[{"text": "a"}\n{"text": "b"}]')
    (tmp_path / "end.json").write_text('[{"text": "a"},\n')
    for name, reason in {
        "cut.jsonl.gz": "not a whole gzip file",
        "not.jsonl.gz": "not a whole gzip file",
        "list.json": r"list\.json:2: not JSON.*cannot be read on",
        "open.json": r"open\.json:2: not JSON: expected ','",
        "end.json": r"end\.json:2: not JSON",
    }.items():
        with pytest.raises(ValueError, match=reason):
            texts(tmp_path / name, on_error="skip")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "b"', r"not JSON: .* at column 13"),
        (b'{"text": "\xff\xfe"}', r"not UTF-8: byte 0xff at offset 10"),
        (b'{"text": 3}', r"text: expected text, found 3"),
        (b'{"text": null}', r"text: expected text, found null"),
        (b'{"txt": "b"}', r"no field 'text'; the row has txt"),
        (b'["b"]', r"field 'text': expected an object to hold 'text', found a list"),
        (b'{"text": "  "}', r"text is empty"),
        (b'{"text": "\\ud800"}', r"not Unicode: half a surrogate pair"),
    ],
)
def test_malformed_rows_stop_or_are_counted(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + bad + b'\n{"text": "c"}\n')
    with pytest.raises(MalformedRow, match=rf"a\.jsonl:2: {reason}.*on_error: skip"):
        texts(path)
    records, counts = read_texts(DataConfig(str(path), on_error="skip"))
    assert [r.text for r in records] == ["a", "c"]
    assert counts.numbers() == {"rows": 3, "records": 2, "skipped": 1}
    assert len(counts.problems) == 1
    assert counts.problems[0].startswith(f"{path}:2: ")


def test_a_set_without_one_good_row_is_an_error_even_with_skip(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "a", "b")
    with pytest.raises(ValueError, match=r"all 2 rows are malformed, the first: .*a\.jsonl:1: no field 'body'"):
        texts(path, on_error="skip", fields={"text": "body"})
    with pytest.raises(ValueError, match="there are no rows"):
        texts(path, skip=2)


def test_skip_and_limit_count_rows_over_all_files(tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "1.jsonl", "a", "b", "c"), jsonl(tmp_path / "2.jsonl", "d", "", "f")
    both = [str(first), str(second)]
    assert [t for t, _ in texts(both, skip=2, limit=2)] == ["c", "d"]
    assert [t for t, _ in texts(both, skip=3, limit=3, on_error="skip")] == ["d", "f"]
    assert [t for t, _ in texts(both, limit=4)] == ["a", "b", "c", "d"], "rows after the limit are not looked at"


def test_dataset_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    turns = [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "x"}],
    ]
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "messages": turns})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "one") == [("a", "one:0"), ("b", "one:1")]
    assert texts(tmp_path / "both", split="test") == [("b", "both:0")]
    prompts, _ = read_prompts(DataConfig(str(tmp_path / "one")))
    assert [[tuple(turn) for turn in p.prompt] for p in prompts] == [[("user", "hi")], [("user", "ho")]]
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]; set split: to one \(found 'dev'\)"):
        texts(tmp_path / "both", split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="was not written by datasets' save_to_disk"):
        texts(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a folder; name the files in it with a glob"):
        texts(tmp_path / "one", format="jsonl")
