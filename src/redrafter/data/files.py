"""Reads rows from data files: JSON lines, JSON arrays and parquet, also compressed or on the Hub.

Errors name the file and the position of the row.  Files are streamed if their format allows it.  Does not know what the
rows mean.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from redrafter.errors import RedrafterError, reason

Skip = Callable[[str], None]
"""Callback that receives the error message for a bad row; reading then continues with the next row."""

_SUFFIXES = {".jsonl", ".json", ".parquet", ".gz", ".xz", ".zst"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")


def read_records(sources: Iterable[str | Path], skip: Skip | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every row with its location, such as `FILE line N`; blank lines are ignored.

    A source is a file (`.jsonl`, `.json`, `.parquet`; text may be compressed as `.gz`, `.xz` or `.zst`), a glob
    pattern, or a Hub dataset as `OWNER/NAME` or `OWNER/NAME:SPLIT`, by default with the split `train`.  Raises
    RedrafterError for a source that cannot be read and, without `skip`, for a row that is not a JSON object.
    """
    for source in sources:
        for where, row in _read_source(source):
            try:
                record = _json_object(row, where)
            except RedrafterError as error:
                if skip is None:
                    raise
                skip(str(error))
            else:
                yield where, record


def _read_source(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Rows as text or as objects, with their locations."""
    path, name = Path(source), str(source)
    files = [path]
    if not path.exists():
        if _HUB_ID.fullmatch(name) and path.suffix not in _SUFFIXES:
            yield from _read_hub(name)
            return
        if glob.has_magic(name):
            files = sorted(map(Path, glob.glob(name, recursive=True)))
    if not files:
        raise RedrafterError(f"No file matches {source}.")
    for file in files:
        try:
            yield from _read_file(file)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise RedrafterError(f"{file} is damaged or truncated ({error}).") from None
        except OSError as error:
            raise RedrafterError(f"{file} cannot be read: {error.strerror or error}.") from None
        except UnicodeDecodeError:
            raise RedrafterError(f"{file} is not UTF-8 text.") from None


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    with _open(file) as lines:
        if ".json" in file.suffixes:
            yield from _read_json(file, lines.read())
        else:
            yield from _read_lines(file, lines)


def _read_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file} line {number}", line


def _read_json(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file with one JSON value, or with JSON lines in spite of its suffix."""
    try:
        rows = _load_json(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise RedrafterError(f"{file} is not JSON: {error.msg} at line {error.lineno}.") from None
        yield from _read_lines(file, io.StringIO(text))
    except (ValueError, RecursionError) as error:
        raise RedrafterError(f"{file} is not JSON: {reason(error)}.") from None
    else:
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            yield f"{file} item {number}", row


def _load_json(text: str) -> Any:
    """Parses JSON.  Raises ValueError, also for an object with a repeated key, since its value is ambiguous."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f'the key "{next(name for name in names if names.count(name) > 1)}" is there twice')
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique_keys)


def _missing_package(source: object) -> RedrafterError:
    return RedrafterError(f"{source} needs another package: pip install datasets.")


def _open(file: Path) -> IO[str]:
    """Opens a file as text, without the byte order mark that some editors add."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8-sig")
    if file.suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise _missing_package(file) from None
        return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _missing_package(file) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", _as_json(row)
    except ArrowException as error:
        raise RedrafterError(f"{file} is damaged or truncated ({reason(error)}).") from None


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise _missing_package(source) from None
    name, _, split = source.partition(":")
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True), start=1):
            yield f"{source} row {number}", _as_json(row)
    except RedrafterError:
        raise
    except Exception as error:  # the Hub, the network and the dataset's own reader raise many types
        raise RedrafterError(f"{source} is neither a file nor a reachable Hub dataset ({reason(error)}).") from error


def _as_json(value: Any) -> Any:
    """A value of a table as JSON would hold it: without nulls of missing keys; dates, bytes and images as text."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _json_object(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, str):
        try:
            row = _load_json(row)
        except json.JSONDecodeError as error:
            raise RedrafterError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
        except (ValueError, RecursionError) as error:
            raise RedrafterError(f"{where} is not JSON: {reason(error)}.") from None
    if not isinstance(row, dict):
        raise RedrafterError(f"{where} is not a JSON object.")
    return row
