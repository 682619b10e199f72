"""Rules for output paths, and locks on them.

All commands and `save_pretrained` follow them.  A command writes only into a new or empty folder, or over its own
earlier output.  It never writes into a model's folder, a folder of its inputs, or the Hub's cache.  Imports nothing
heavy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redrafter.errors import RedrafterError

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

CUSTOM_GENERATE = {
    "custom_generate/generate.py": (
        '"""For model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)."""\n\n'
        "from redrafter.integrations.transformers import from_folder as generate  # noqa: F401\n"
    ),
    "custom_generate/requirements.txt": "redrafter>=0.1\n",
}
"""Files of a drafter folder for `model.generate(custom_generate=FOLDER)`."""

DRAFTER_FILES = (CONFIG, WEIGHTS, CARD, *CUSTOM_GENERATE)
"""All files of a drafter folder, without checkpoints."""

CHECKPOINTS = "checkpoints"
"""Name of the folder with the checkpoints of an unfinished run."""

ORDER = "order.json"
"""Settings that a resumed run must share with its beginning; marks a folder of this package's checkpoints."""

COMPLETE = "complete"
"""Empty file that marks a complete checkpoint; it is written last."""

RESULTS = ("results.json", "report.md", "report.html")
"""Files of a benchmark's report."""

MEASUREMENTS = "measurements.jsonl"
STATES_INDEX = "states.json"
NOTE_SUFFIX = ".state"
LOCK = ".redrafter.lock"

_TYPES = {"recurrent_drafting_drafter", "medusa_heads", "redrafter_eagle"}
"""The `model_type` of every head in `redrafter.heads`; a test compares the two."""
_TEMPORARY = re.compile(r"\..+\.\d+\.part")
_CACHE = ("models--", "datasets--", "spaces--")

Inputs = Iterable[str | Path | None]


def check_drafter_folder(
    folder: Path, *, overwrite: bool = True, inputs: Inputs = (), own: Iterable[Path | None] = (), advice: str = ""
) -> None:
    """Raises RedrafterError if a drafter may not be written to `folder`.

    `overwrite`: an existing drafter may be replaced; other files in its folder are left alone.  `inputs`: files and
    folders that the command reads.  `own`: folders that the command itself keeps inside `folder`.  `advice`: what to do
    instead of overwriting.
    """
    _check_folder(folder, inputs, DRAFTER_FILES)
    _check_checkpoints(folder / CHECKPOINTS)
    entries = _entries(folder)
    if CONFIG in entries:
        if not is_drafter(folder):
            raise RedrafterError(f"{folder / CONFIG} is not the config of a drafter: choose another folder.")
        if not overwrite:
            raise RedrafterError(f"{folder} already holds a drafter: {advice or 'give another --output'}.")
        return
    unfinished = {CHECKPOINTS} if _is_checkpoints(folder / CHECKPOINTS) else set()
    kept = {one.name for one in own if one is not None and _same(one.parent, folder)}
    foreign = entries - unfinished - kept
    if unfinished:  # loggers and users may have added other files beside an unfinished run's checkpoints
        foreign &= {Path(name).parts[0] for name in DRAFTER_FILES}
    if foreign:
        raise RedrafterError(f"{folder} is not empty and holds no drafter ({min(foreign)}): choose another folder.")


def check_bench_folder(folder: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if measurements and reports may not be written to `folder`."""
    _check_folder(folder, inputs, (MEASUREMENTS, MEASUREMENTS + NOTE_SUFFIX, *RESULTS))
    ours = _is_note(folder / (MEASUREMENTS + NOTE_SUFFIX)) or _holds(folder / RESULTS[0], "about", "asked")
    if not ours and (entries := _entries(folder)):
        raise RedrafterError(f"{folder} is not empty and holds no benchmark ({min(entries)}): choose another folder.")


def check_states_folder(folder: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if a target's hidden states may not be stored in `folder`."""
    _check_folder(folder, inputs, (STATES_INDEX,), option="--cache-states")
    if not (folder / STATES_INDEX).exists() and (entries := _entries(folder)):
        raise RedrafterError(f"{folder} is not empty and holds no states ({min(entries)}): choose another folder.")


def check_rows_file(file: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if `distill` may not write rows to `file`.

    It may continue a file that it wrote before, which has a file `FILE.state` beside it.
    """
    note = file.with_name(file.name + NOTE_SUFFIX)
    if file.is_dir():
        raise RedrafterError(f"{file} is a folder: give a file as --output.")
    inputs = list(inputs)
    for one in (file, note):
        if any(given is not None and _same(Path(given), one) for given in inputs):
            raise RedrafterError(f"{one} is one of the files to read: give another --output.")
    _check_path(file, inputs, ())
    if note.exists() and not _is_note(note):
        raise RedrafterError(f"{note} was not written by this command: give another file.")
    if file.exists() and file.stat().st_size and not note.exists():
        raise RedrafterError(
            f"{file} exists without {note.name} beside it, so it is not an output of distill: give another file."
        )


def is_drafter(folder: Path) -> bool:
    """Whether the folder's `config.json` is a drafter's, of this package or of Apple's code."""
    config = _json(folder / CONFIG)
    return config.get("model_type") in _TYPES and config.get("architectures", ["Drafter"]) == ["Drafter"]


def check_places(folder: Path, names: Iterable[str]) -> None:
    """Raises RedrafterError if a file of the folder would be written through a link to elsewhere, or over a folder."""
    for name in names:
        file = folder / name
        if file.parent.exists() and not file.parent.is_dir():
            raise RedrafterError(f"{file.parent} is a file: choose another folder.")
        if file.parent.resolve() != folder.resolve() / Path(name).parent:
            raise RedrafterError(f"{file.parent} is a link to another folder: choose another folder.")
        if file.is_dir():
            raise RedrafterError(f"{file} is a folder: choose another folder.")


@contextmanager
def locked(output: Path, *, is_file: bool = False) -> Iterator[None]:
    """Locks an output folder or file until the block ends; creates missing folders.

    Raises RedrafterError if another process holds the lock, or if the folder is not writable.  The operating system
    releases the lock of a killed process.
    """
    from filelock import FileLock, Timeout

    path = output.resolve()
    lock = path.with_name(f".{path.name}.lock") if is_file else path / LOCK
    created = [one for one in (lock.parent, *lock.parent.parents) if not one.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
        while not lock.exists():  # the previous holder removed the file in the meantime
            held.release()
            held.acquire()
    except Timeout:
        raise RedrafterError(f"Another process is writing {output}: wait for it, or give another --output.") from None
    except OSError as error:
        raise RedrafterError(f"{output} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        held.release()
        with suppress(OSError):
            for one in created:
                one.rmdir()


def _check_folder(folder: Path, inputs: Inputs, names: Iterable[str], option: str = "--output") -> None:
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: give a folder as {option}.")
    _check_path(folder, inputs, names)


def _check_path(output: Path, inputs: Inputs, names: Iterable[str]) -> None:
    """Raises RedrafterError if `output` is, contains or lies inside something to keep, or cannot be created."""
    path = output.resolve()
    if any(part.startswith(_CACHE) for part in path.parts):
        raise RedrafterError(f"{output} is in the Hub's cache: choose another path.")
    for parent in (path, *path.parents):
        if _is_model(parent):
            where = "is" if parent == path else f"is in {parent},"
            raise RedrafterError(f"{output} {where} a model's folder, which is never written to: choose another path.")
    parent = next(one for one in (path, *path.parents) if one.exists())
    if parent != path and not parent.is_dir():
        raise RedrafterError(f"{parent} is a file, so {output} cannot be created: choose another path.")
    for given in inputs:
        if given is None or not Path(given).exists():
            continue
        source = Path(given).resolve()
        if source.is_dir() and any(_same(source, one) for one in (path, *path.parents)):
            raise RedrafterError(f"{output} is the input {given} or is inside it: choose another path.")
        if source.is_dir() and any(_same(one, path) for one in source.parents):
            raise RedrafterError(f"{output} contains the input {given}: choose another path.")
        if any(_same(source, path / name) for name in names):
            raise RedrafterError(f"The input {given} would be replaced: choose another path.")
    check_places(output, names)


def _check_checkpoints(folder: Path) -> None:
    """Raises RedrafterError if the folder holds checkpoints of other software, which a run would finally remove."""
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: choose another folder.")
    if _holds(folder / ORDER, "--batch-size"):
        return
    if (folder / ORDER).exists():
        raise RedrafterError(f"{folder / ORDER} was not written by this package: choose another folder.")
    for one in folder.glob("checkpoint-*"):
        if not (one / COMPLETE).exists():
            raise RedrafterError(f"{one} is not a checkpoint of this package: choose another folder.")


def _is_checkpoints(folder: Path) -> bool:
    """Whether an unfinished run of this package has its checkpoints here, or the folder is empty."""
    marks = (_holds(folder / ORDER, "--batch-size"), any(folder.glob(f"checkpoint-*/{COMPLETE}")))
    return any(marks) or (folder.is_dir() and not any(folder.iterdir()))


def _is_model(folder: Path) -> bool:
    """Whether the folder holds a model of transformers or an adapter of PEFT."""
    if (folder / "adapter_config.json").is_file():
        return True
    return "architectures" in _json(folder / CONFIG) and not is_drafter(folder)


def _is_note(path: Path) -> bool:
    return any(_holds(path, name, "done", "bytes") for name in ("options", "told"))  # "told" in older notes


def _holds(path: Path, *keys: str) -> bool:
    """Whether the file is a JSON object with these keys."""
    return _json(path).keys() >= set(keys)


def _json(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty if there is no such file or it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _entries(folder: Path) -> set[str]:
    """Names in the folder, without the lock and temporary files of killed processes."""
    if not folder.is_dir():
        return set()
    return {one for one in os.listdir(folder) if one != LOCK and not _TEMPORARY.fullmatch(one)}


def _same(one: Path, other: Path) -> bool:
    """Whether two paths, links resolved, are the same file or folder."""
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()
