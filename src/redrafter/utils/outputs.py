"""Where commands may write, and locks on what they write.

All commands and `save_pretrained` share these rules.  A command writes only into a new or empty place, or over what it
wrote there before.  It never writes into a model, a folder of its inputs, or the hub's cache.  Imports nothing heavy.
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
"""Files of a drafter folder that let transformers decode with it."""

DRAFTER_FILES = (CONFIG, WEIGHTS, CARD, *CUSTOM_GENERATE)
"""Everything that a drafter folder holds, except checkpoints."""

CHECKPOINTS = "checkpoints"
"""The folder of an unfinished run's checkpoints."""

ORDER = "order.json"
"""What a run that is resumed must have in common with its beginning; marks the checkpoints' folder as ours."""

COMPLETE = "complete"
"""Empty file that marks a checkpoint as whole; it is written after all else."""

RESULTS = ("results.json", "report.md", "report.html")
"""Files of a benchmark's report, beside its measurements."""

MEASUREMENTS = "measurements.jsonl"
STATES_INDEX = "states.json"
NOTE_SUFFIX = ".state"
LOCK = ".redrafter.lock"

_TYPES = {"recurrent_drafting_drafter", "medusa_heads", "redrafter_eagle"}
"""The `model_type` of every head (`redrafter.heads`); a test compares them."""
_TEMPORARY = re.compile(r"\..+\.\d+\.part")
_CACHE = ("models--", "datasets--", "spaces--")

Inputs = Iterable[str | Path | None]


def check_drafter_folder(
    folder: Path, *, overwrite: bool = True, inputs: Inputs = (), own: Iterable[Path | None] = (), advice: str = ""
) -> None:
    """Raises RedrafterError if a drafter may not be written to `folder`.

    `overwrite`: whether a drafter that is there may be replaced.  Only its own files are replaced; other files in the
    folder are left alone.  `inputs`: files and folders that the command reads.  `own`: folders that the command itself
    keeps inside `folder`.  `advice`: what to do instead of overwriting.
    """
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: give a folder as --output.")
    _check_place(folder, inputs, DRAFTER_FILES)
    _check_checkpoints(folder / CHECKPOINTS)
    entries = _entries(folder)
    if CONFIG in entries:
        if not is_drafter(folder):
            raise RedrafterError(f"{folder / CONFIG} is not a drafter's: choose another folder.")
        if not overwrite:
            raise RedrafterError(f"{folder} already holds a drafter: {advice or 'give another --output'}.")
        return
    unfinished = {CHECKPOINTS} if _is_checkpoints(folder / CHECKPOINTS) else set()
    kept = {one.name for one in own if one is not None and _same(one.parent, folder)}
    foreign = entries - unfinished - kept
    if unfinished:  # loggers and users may have put other files beside an unfinished run's checkpoints
        foreign &= {Path(name).parts[0] for name in DRAFTER_FILES}
    if foreign:
        raise RedrafterError(f"{folder} is not empty and holds no drafter ({min(foreign)}): choose another folder.")


def check_bench_folder(folder: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if measurements and reports may not be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: give a folder as --output.")
    _check_place(folder, inputs, (MEASUREMENTS, MEASUREMENTS + NOTE_SUFFIX, *RESULTS))
    ours = _is_note(folder / (MEASUREMENTS + NOTE_SUFFIX)) or _holds(folder / RESULTS[0], "about", "asked")
    if not ours and (entries := _entries(folder)):
        raise RedrafterError(f"{folder} is not empty and holds no benchmark ({min(entries)}): choose another folder.")


def check_states_folder(folder: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if a target's hidden states may not be kept in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: give a folder as --cache-states.")
    _check_place(folder, inputs, (STATES_INDEX,))
    if not (folder / STATES_INDEX).exists() and (entries := _entries(folder)):
        raise RedrafterError(f"{folder} is not empty and holds no states ({min(entries)}): choose another folder.")


def check_rows_file(file: Path, *, inputs: Inputs = ()) -> None:
    """Raises RedrafterError if rows may not be written to `file`: it is an input, or was not written by this package.

    A file of ours has a note beside it, `FILE.state`.
    """
    note = file.with_name(file.name + NOTE_SUFFIX)
    if file.is_dir():
        raise RedrafterError(f"{file} is a folder; name a file.")
    inputs = list(inputs)
    for one in (file, note):
        if any(given is not None and _same(Path(given), one) for given in inputs):
            raise RedrafterError(f"{one} is one of the files to read; name another --output.")
    _check_place(file, inputs, ())
    if note.exists() and not _is_note(note):
        raise RedrafterError(f"{note} is not a note of this command: name another file.")
    if file.exists() and file.stat().st_size and not note.exists():
        raise RedrafterError(f"{file} exists and has no {note.name} beside it, so it is not ours: name another file.")


def is_drafter(folder: Path) -> bool:
    """Whether the folder's `config.json` is that of a drafter, written by this package or by Apple's code."""
    config = _json(folder / CONFIG)
    return config.get("model_type") in _TYPES and config.get("architectures", ["Drafter"]) == ["Drafter"]


def check_places(folder: Path, names: Iterable[str]) -> None:
    """Raises RedrafterError if a file of the folder would be written elsewhere, through a link, or over a folder."""
    for name in names:
        place = folder / name
        if place.parent.exists() and not place.parent.is_dir():
            raise RedrafterError(f"{place.parent} is a file: choose another folder.")
        if place.parent.resolve() != folder.resolve() / Path(name).parent:
            raise RedrafterError(f"{place.parent} is a link to another folder: choose another folder.")
        if place.is_dir():
            raise RedrafterError(f"{place} is a folder: choose another folder.")


@contextmanager
def locked(output: Path, *, is_file: bool = False) -> Iterator[None]:
    """Locks an output folder, or file, until the block ends.  Missing folders are created.

    Raises RedrafterError if another process holds the lock, or if the folder cannot be written.  The operating system
    releases the lock of a process that is killed.
    """
    from filelock import FileLock, Timeout

    whole = output.resolve()
    lock = whole.with_name(f".{whole.name}.lock") if is_file else whole / LOCK
    made = [one for one in (lock.parent, *lock.parent.parents) if not one.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
        while not lock.exists():  # the process that held it before removed the file in between
            held.release()
            held.acquire()
    except Timeout:
        raise RedrafterError(f"Another process is writing {output}: wait for it, or name another --output.") from None
    except OSError as error:
        raise RedrafterError(f"{output} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        held.release()
        with suppress(OSError):
            for one in made:
                one.rmdir()


def _check_place(place: Path, inputs: Inputs, names: Iterable[str]) -> None:
    """Raises RedrafterError if `place` is, contains or lies inside what must stay as it is, or cannot be made."""
    whole = place.resolve()
    if any(part.startswith(_CACHE) for part in whole.parts):
        raise RedrafterError(f"{place} lies in the hub's cache: choose another place.")
    for above in (whole, *whole.parents):
        if _is_model(above):
            where = "is" if above == whole else f"lies in {above},"
            raise RedrafterError(f"{place} {where} a model's folder, which is never written to: choose another place.")
    above = next(one for one in (whole, *whole.parents) if one.exists())
    if above != whole and not above.is_dir():
        raise RedrafterError(f"{above} is a file, so {place} cannot be made.")
    for given in inputs:
        if given is None or not Path(given).exists():
            continue
        path = Path(given).resolve()
        if path.is_dir() and any(_same(path, one) for one in (whole, *whole.parents)):
            raise RedrafterError(f"{place} is {given}, which is read, or lies in it: choose another place.")
        if path.is_dir() and any(_same(one, whole) for one in path.parents):
            raise RedrafterError(f"{place} contains {given}, which is read: choose another place.")
        if any(_same(path, whole / name) for name in names):
            raise RedrafterError(f"{given} is read and would be replaced: choose another place.")
    check_places(place, names)


def _check_checkpoints(folder: Path) -> None:
    """Raises RedrafterError if the folder holds checkpoints of other software, which a run would remove in the end."""
    if folder.exists() and not folder.is_dir():
        raise RedrafterError(f"{folder} is a file: choose another folder.")
    if _holds(folder / ORDER, "--batch-size"):
        return
    if (folder / ORDER).exists():
        raise RedrafterError(f"{folder / ORDER} is not a run's of this package: choose another folder.")
    for one in folder.glob("checkpoint-*"):
        if not (one / COMPLETE).exists():
            raise RedrafterError(f"{one} is not a checkpoint of this package: choose another folder.")


def _is_checkpoints(folder: Path) -> bool:
    """Whether an unfinished run of ours has its checkpoints here."""
    marks = (_holds(folder / ORDER, "--batch-size"), any(folder.glob(f"checkpoint-*/{COMPLETE}")))
    return any(marks) or (folder.is_dir() and not any(folder.iterdir()))


def _is_model(folder: Path) -> bool:
    """Whether transformers would load a model, or PEFT an adapter, from the folder."""
    if (folder / "adapter_config.json").is_file():
        return True
    return "architectures" in _json(folder / CONFIG) and not is_drafter(folder)


def _is_note(path: Path) -> bool:
    return any(_holds(path, name, "done", "bytes") for name in ("options", "told"))  # "told" in older notes


def _holds(path: Path, *keys: str) -> bool:
    """Whether the file is a JSON object with these keys."""
    return _json(path).keys() >= set(keys)


def _json(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty if there is no such file or it holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _entries(folder: Path) -> set[str]:
    """Names in the folder, without our lock and the remains of killed processes."""
    if not folder.is_dir():
        return set()
    return {one for one in os.listdir(folder) if one != LOCK and not _TEMPORARY.fullmatch(one)}


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or folder, by whatever links."""
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()
