"""Atomic writing: a reader sees the previous file or the complete new one, also after a crash.

Does not know what the files contain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

Content = bytes | Callable[[Path], object]
"""The bytes of a file, or a function that writes it to the path it receives."""


def write_atomically(path: Path, content: Content) -> None:
    """Writes one file to `.NAME.PID.part` beside it, flushes it to disk and renames it.

    Raises whatever writing raises; the previous file is then unchanged and the temporary one removed.
    """
    write_all_atomically({path: content})


def write_all_atomically(contents: Mapping[Path, Content]) -> None:
    """Writes several files like `write_atomically`; none is renamed before all are complete."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, content in contents.items():
            if isinstance(content, bytes):
                temporary[path].write_bytes(content)
            else:
                content(temporary[path])
            with temporary[path].open("rb") as file:
                os.fsync(file.fileno())
        for path, complete in temporary.items():
            os.replace(complete, path)
    finally:
        for path in temporary.values():
            with suppress(OSError):  # already renamed, or never created
                path.unlink()
