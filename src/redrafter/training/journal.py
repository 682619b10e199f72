"""A file of rows that no kill can spoil: JSON lines, and beside them a note of how far they go.

Promises that the same work begun again goes on from the last checkpoint, with nothing lost before it and nothing
doubled, and that lines of different work never mix.  Does not know what the rows mean.
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
from redrafter.utils.outputs import NOTE_SUFFIX, check_rows_file

_OTHERWISE_READ = {".json", ".parquet", ".gz", ".xz", ".zst"}


class Journal:
    """The file at `path` and its note.

    A checkpoint appends lines, makes them safe on the disk, and then replaces the note, which says how many bytes
    count; what a killed process wrote beyond them is cut off by the next one.  Nothing is written before `open`.
    `ahead` holds results that cannot be appended yet, because an earlier one is missing: JSON by the result's number.
    The note contains them, so they are saved together with the size.

    `told` is what the lines depend on: JSON by names.  Raises RedrafterError where the file holds lines of other work,
    unless `overwrite` throws them away, or is not a file of ours.
    """

    def __init__(self, path: Path, told: dict[str, Any], *, overwrite: bool = False):
        self.path = path
        self.note = path.with_name(path.name + NOTE_SUFFIX)
        self.told: dict[str, Any] = json.loads(json.dumps(told))
        self.done = 0  # rows of the source that are answered
        self.source = ""  # a digest of them
        self.counts: Counter[str] = Counter()
        self.ahead: dict[int, Any] = {}
        self._size = 0
        self._file: BinaryIO | None = None
        if _OTHERWISE_READ & set(path.suffixes):
            raise RedrafterError(f"{path} will hold JSON lines: let its name end in .jsonl.")
        check_rows_file(path)
        if not overwrite:
            self._take_up()

    def _take_up(self) -> None:
        again = "name another file, or pass --overwrite"
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            told, done, kept = dict(note["told"]), int(note["done"]), int(note["bytes"])
            source, counts = str(note["source"]), Counter(note["counts"])
            ahead = {int(number): result for number, result in note.get("ahead", {}).items()}
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RedrafterError(f"{self.note} is not a note of this command: {again}.") from None
        if not done and not ahead:  # nothing that other options could contradict
            return
        others = [name for name in {**told, **self.told} if told.get(name) != self.told.get(name)]
        if others:
            differ = "; ".join(f"{name} {_short(told.get(name))}, now {_short(self.told.get(name))}" for name in others)
            raise RedrafterError(f"{self.path} was begun with other options ({differ}): give the same, {again}.")
        if size < kept:
            raise RedrafterError(f"{self.path} has lost lines since it was written: {again}.")
        self.done, self._size, self.source, self.counts, self.ahead = done, kept, source, counts, ahead

    def open(self) -> None:
        """Creates the file or cuts it to its last checkpoint.  Raises RedrafterError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write_note()
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self._size)
        except OSError as error:
            raise self._failed(error) from error

    def checkpoint(
        self,
        rows: Iterable[dict[str, Any]],
        *,
        done: int,
        source: str,
        counts: Counter[str],
        ahead: dict[int, Any] | None = None,
    ) -> None:
        """Appends rows: `done` and `source` are what is answered with them, `counts` what they add.

        `ahead` replaces the results that cannot be appended yet.

        Raises RedrafterError where it cannot be written (the file then ends at the checkpoint before), or where another
        process writes the same file.
        """
        assert self._file is not None
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = lines.encode("utf-8", errors="replace")  # an endpoint may send half a character
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise RedrafterError(f"Something else writes {self.path}; let one process do it.")
        before = (self._size, self.done, self.source, self.counts, self.ahead)
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            if data:
                os.fsync(self._file.fileno())
            self._size, self.done, self.source = self._size + len(data), done, source
            self.counts, self.ahead = self.counts + counts, ahead or {}
            self._write_note()
        except OSError as error:
            self._size, self.done, self.source, self.counts, self.ahead = before
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise self._failed(error) from error

    def close(self) -> None:
        """No more rows."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_note(self) -> None:
        note = {"told": self.told, "done": self.done, "bytes": self._size, "source": self.source}
        text = json.dumps({**note, "counts": self.counts, "ahead": self.ahead}, indent=None if self.ahead else 1)
        passing = self.note.with_name(f".{self.note.name}.{os.getpid()}.part")
        try:
            with passing.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(passing, self.note)
        except OSError:
            with contextlib.suppress(OSError):
                passing.unlink()
            raise

    def _failed(self, error: OSError) -> RedrafterError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space is left on the device" if full else error.strerror or str(error)
        return RedrafterError(f"{self.path} cannot be written: {reason}.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
