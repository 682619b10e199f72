"""A file of JSON lines that survives being killed, and a note beside it that says how much of it is valid.

Guarantees that a run with the same options resumes at the last checkpoint, without missing or duplicate lines, and that
lines of different runs never mix.  Does not know what the lines mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from redrafter.errors import RedrafterError
from redrafter.utils.atomic import write_atomically
from redrafter.utils.outputs import NOTE_SUFFIX, check_rows_file

_READ_AS_OTHER_FORMATS = {".json", ".parquet", ".gz", ".xz", ".zst"}


class Journal:
    """The file at `path` and its note, `PATH.state`.

    A checkpoint appends lines, flushes them to disk and then replaces the note, which holds the number of valid bytes.
    Bytes beyond that, from a process that was killed, are cut off by `open`.  Nothing is written before `open`.
    `ahead` holds results that cannot be appended yet because an earlier one is missing: JSON values by the result's
    number.  They are saved in the note.

    `options`: JSON values that determine the lines.  Raises RedrafterError if the file holds lines made with other
    options, unless `overwrite` is set, or if the file was not written by this package.
    """

    def __init__(self, path: Path, options: dict[str, Any], *, overwrite: bool = False):
        self.path = path
        self.note = path.with_name(path.name + NOTE_SUFFIX)
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self.done = 0  # source rows that are finished
        self.source = ""  # digest of those rows
        self.counts: Counter[str] = Counter()
        self.ahead: dict[int, Any] = {}
        self._size = 0
        self._file: BinaryIO | None = None
        if _READ_AS_OTHER_FORMATS & set(path.suffixes):
            raise RedrafterError(f"{path} is a file of JSON lines: use a name that ends in .jsonl.")
        check_rows_file(path)
        if not overwrite:
            self._read_note()

    def _read_note(self) -> None:
        remedy = "name another file, or pass --overwrite"
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            options = dict(note["options"] if "options" in note else note["told"])  # "told" in older notes
            done, size = int(note["done"]), int(note["bytes"])
            source, counts = str(note["source"]), Counter(note["counts"])
            ahead = {int(number): result for number, result in note.get("ahead", {}).items()}
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RedrafterError(f"{self.note} is not a note of this command: {remedy}.") from None
        if not done and not ahead:  # no line depends on the options yet
            return
        changed = [name for name in {**options, **self.options} if options.get(name) != self.options.get(name)]
        if changed:
            pairs = [f"{name} {_short(options.get(name))}, now {_short(self.options.get(name))}" for name in changed]
            raise RedrafterError(
                f"{self.path} was begun with other options ({'; '.join(pairs)}): pass the same options, {remedy}."
            )
        if (self.path.stat().st_size if self.path.exists() else 0) < size:
            raise RedrafterError(f"{self.path} has lost lines since it was written: {remedy}.")
        self.done, self._size, self.source, self.counts, self.ahead = done, size, source, counts, ahead

    def open(self) -> None:
        """Creates the file or truncates it to the last checkpoint.  Raises RedrafterError if it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write_note()
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self._size)
        except OSError as error:
            raise self._write_error(error) from error

    def checkpoint(
        self,
        rows: Iterable[dict[str, Any]],
        *,
        done: int,
        source: str,
        counts: Counter[str],
        ahead: dict[int, Any] | None = None,
    ) -> None:
        """Appends rows, sets `done`, `source` and `ahead`, and adds `counts`.

        Raises RedrafterError if writing fails (the file then ends at the previous checkpoint), or if another process
        writes the same file.
        """
        assert self._file is not None
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = lines.encode("utf-8", errors="replace")  # an endpoint may send lone surrogates
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise RedrafterError(f"Another process writes {self.path}: stop it, or name another file.")
        before = (self._size, self.done, self.source, self.counts, self.ahead)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if data:
                os.fsync(self._file.fileno())
            self._size, self.done, self.source = self._size + len(data), done, source
            self.counts, self.ahead = self.counts + counts, ahead or {}
            self._write_note()
        except OSError as error:
            self._size, self.done, self.source, self.counts, self.ahead = before
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise self._write_error(error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_note(self) -> None:
        note = {"options": self.options, "done": self.done, "bytes": self._size, "source": self.source}
        note |= {"counts": self.counts, "ahead": self.ahead}
        write_atomically(self.note, json.dumps(note, indent=None if self.ahead else 1).encode() + b"\n")

    def _write_error(self, error: OSError) -> RedrafterError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space is left on the device" if full else error.strerror or str(error)
        return RedrafterError(f"{self.path} cannot be written: {reason}.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
