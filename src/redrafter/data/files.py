"""Rows of data files: JSON lines, JSON arrays and parquet, packed or not, local or on the hub.

Promises that a bad row is named by file and place, and that a file is read as a stream where its format allows.  Does
not know what the rows mean.
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
"""Is told the sentence about a bad row, which is then passed over."""

_SUFFIXES = {".jsonl", ".json", ".parquet", ".gz", ".xz", ".zst"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")


def read_records(sources: Iterable[str | Path], skip: Skip | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of the sources with its place, such as `FILE line N`; blank lines are passed over.

    A source is a file (`.jsonl`, `.json`, `.parquet`; text may be packed as `.gz`, `.xz` or `.zst`), a glob pattern, or
    a data set on the hub as `OWNER/NAME` or `OWNER/NAME:SPLIT`, by default its split `train`.  Raises RedrafterError
    for what cannot be read, and, without `skip`, for a row that is not a JSON object.
    """
    for source in sources:
        for where, row in _rows_of(source):
            try:
                record = _json_object(row, where)
            except RedrafterError as error:
                if skip is None:
                    raise
                skip(str(error))
            else:
                yield where, record


def _rows_of(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Rows as text or as objects, with their places."""
    path, name = Path(source), str(source)
    if path.exists() or not (glob.has_magic(name) or _HUB_ID.fullmatch(name)):
        files = [path]
    elif path.suffix in _SUFFIXES or not _HUB_ID.fullmatch(name):
        files = sorted(map(Path, glob.glob(name, recursive=True))) if glob.has_magic(name) else [path]
    else:
        yield from _of_the_hub(name)
        return
    if not files:
        raise RedrafterError(f"No file matches {source}.")
    for file in files:
        try:
            yield from _of_a_file(file)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise RedrafterError(f"{file} is damaged or truncated ({error}).") from None
        except OSError as error:
            raise RedrafterError(f"{file} cannot be read: {error.strerror or error}.") from None
        except UnicodeDecodeError:
            raise RedrafterError(f"{file} is not UTF-8 text.") from None


def _of_a_file(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        yield from _of_parquet(file)
        return
    with _open(file) as lines:
        if ".json" in file.suffixes:
            yield from _of_json(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file} line {number}", line


def _of_json(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file that is one JSON value, or JSON lines under the name of one."""
    try:
        rows = _load_json(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise RedrafterError(f"{file} is not JSON: {error.msg} at line {error.lineno}.") from None
        for number, line in enumerate(io.StringIO(text), start=1):
            if line.strip():
                yield f"{file} line {number}", line
    except (ValueError, RecursionError) as error:
        raise RedrafterError(f"{file} is not JSON: {reason(error)}.") from None
    else:
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
            yield f"{file} item {number}", row


def _load_json(text: str) -> Any:
    """A JSON value.  Raises ValueError, also where an object holds a key twice, which leaves open which one counts."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f'the key "{next(name for name in names if names.count(name) > 1)}" is there twice')
        return found

    return json.loads(text, object_pairs_hook=once)


def _lacks_a_package(source: object) -> RedrafterError:
    return RedrafterError(f"{source} needs a package more: pip install datasets.")


def _open(file: Path) -> IO[str]:
    """The text of a file, without the byte order mark that some editors put before it."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8-sig")
    if file.suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise _lacks_a_package(file) from None
        return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _of_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _lacks_a_package(file) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", _without_nulls(row)
    except ArrowException as error:
        raise RedrafterError(f"{file} is damaged or truncated ({reason(error)}).") from None


def _of_the_hub(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise _lacks_a_package(source) from None
    name, _, split = source.partition(":")
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True), start=1):
            yield f"{source} row {number}", _without_nulls(row)
    except RedrafterError:
        raise
    except Exception as error:  # the hub, the network and each data set's own reader raise what they like
        raise RedrafterError(f"{source} is neither a file nor a data set within reach ({reason(error)}).") from error


def _without_nulls(value: Any) -> Any:
    """A value of a table as JSON has it: without the nulls that fill absent keys; dates, bytes and images as text."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
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
