"""Data files of every format, intact and damaged."""

from __future__ import annotations

import gzip
import json
import lzma

import pyarrow
import pytest

from redrafter import RedrafterError
from redrafter.data.files import read_records

ROWS = [{"text": "one", "n": [1, 2]}, {"text": "zwei ü"}, {"other": {"a": 1}}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def write(tmp_path, name: str):
    path = tmp_path / name
    raw = LINES.encode()
    zst = lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)  # noqa: E731
    if name.endswith(".parquet"):
        from pyarrow import Table, parquet

        keys = ("text", "n", "other")
        parquet.write_table(Table.from_pydict({key: [row.get(key) for row in ROWS] for key in keys}), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}.get(path.suffix, bytes)
        path.write_bytes(pack(raw))
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.json"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_reads_the_same(tmp_path, name):
    path = write(tmp_path, name)
    kind = {".parquet": "row", ".json": "item"}.get(path.suffix, "line")
    numbers = (1, 3, 5) if kind == "line" else (1, 2, 3)
    expected = [(f"{path} {kind} {i}", row) for i, row in zip(numbers, ROWS, strict=True)]
    assert list(read_records([path])) == expected


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_damaged_file_is_named(tmp_path, name):
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RedrafterError, match=rf"{name}.* (damaged|not JSON|cannot be read)"):
        list(read_records([path]))


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert [row["name"] for _, row in read_records([tmp_path / "*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(RedrafterError, match=r"No file matches .*x\*\.jsonl"):
        list(read_records([tmp_path / "x*.jsonl"]))


def test_a_dataset_on_the_hub(monkeypatch):
    def load(name, split, streaming):
        assert streaming
        if name != "someone/chats":
            raise FileNotFoundError(f"{name} is not there")
        return iter([{"split": split, "absent": None}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read_records(["someone/chats"])) == [("someone/chats row 1", {"split": "train"})]
    assert list(read_records(["someone/chats:test"])) == [("someone/chats:test row 1", {"split": "test"})]
    with pytest.raises(RedrafterError, match="someone/none is neither a file nor"):
        list(read_records(["someone/none"]))


def test_bad_rows_are_reported_and_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[1]\n{\n{"a": 2}')
    messages: list[str] = []
    assert [row["a"] for _, row in read_records([path], messages.append)] == [1, 2]
    assert messages == [
        f"{path} line 2 is not a JSON object.",
        f"{path} line 3 is not JSON: {messages[1].split(': ', 1)[1]}",
    ]
    with pytest.raises(RedrafterError, match="line 2 is not a JSON object"):
        list(read_records([path]))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RedrafterError, match=r"none\.jsonl cannot be read: No such file"):
        list(read_records([tmp_path / "none.jsonl"]))
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RedrafterError, match="is not UTF-8 text"):
        list(read_records([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_byte_order_mark_is_ignored(tmp_path, name):
    raw = b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode()
    zst = lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)  # noqa: E731
    path = tmp_path / name
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}.get(path.suffix, bytes)(raw))
    assert [row for _, row in read_records([path])] == [{"a": 1}]


def test_json_lines_in_a_file_with_the_suffix_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}\r\n\r\n{"a": "two\\nlines"}\r\n[3]\r\n')
    reported: list[str] = []
    rows = list(read_records([path], reported.append))
    assert rows == [(f"{path} line 1", {"a": 1}), (f"{path} line 3", {"a": "two\nlines"})]
    assert reported == [f"{path} line 4 is not a JSON object."]
    path.write_text('{\n "a": 1\n}\n')
    assert [row for _, row in read_records([path])] == [{"a": 1}]


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', "[" * 100_000, '{"a": 1} {"a": 2}'])
def test_invalid_rows_raise_an_error_with_their_location(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + content)
    with pytest.raises(RedrafterError, match=r"a\.jsonl line 2 is not JSON: .*\.$"):
        list(read_records([path]))


def test_a_table_is_converted_to_json_values(tmp_path):
    from datetime import date

    from pyarrow import Table, parquet

    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": None}], "day": date(2024, 1, 2), "raw": b"x"},
        {"messages": [{"role": "user", "content": "yo", "name": "Al"}], "day": None, "raw": None},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read_records([tmp_path / "a.parquet"])] == [
        {"messages": [{"role": "user", "content": "hi"}], "day": "2024-01-02", "raw": "b'x'"},
        {"messages": [{"role": "user", "content": "yo", "name": "Al"}]},
    ]
