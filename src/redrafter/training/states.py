"""The frozen target's hidden states of training rows, computed once and kept on disk.

Promises that what is read was computed for these rows by this target, that files are mapped and not read whole, and
that an interrupt costs one file at most: each is written beside its place and renamed.  Kept are the states that a
draft of tokens to learn can be given, in the target's dtype.  Does not know the drafter or the trainer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redrafter.data.examples import Row, collate
from redrafter.errors import RedrafterError, reason
from redrafter.targets.target import Target
from redrafter.utils.outputs import STATES_INDEX, check_states_folder

INDEX, STATES = STATES_INDEX, "states"

SHARD = 2**28
"""Bytes of a file, about; the most that an interrupt can cost."""

STALE = 3600
"""Seconds after which nobody writes to a file any more that is not whole."""

BATCH = 2**14
"""Tokens that go through the target together, padding counted."""

Forward = Callable[[Int[Tensor, "B P"], Int[Tensor, "B P"]], Float[Tensor, "B P F"]]
"""States of token ids and segments (`Target.hidden_states`), of any width."""

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Index:
    """What a folder of states is of; each part must be the same where it is used again."""

    target: str | None
    revision: str | None
    dtype: str
    config: str
    """Hash of what the target's config sets."""
    rows: str
    """Hash of all ids, and of which are learnt."""
    width: int
    reach: int
    """Kept are the states of so many places before each token to learn."""
    shard_tokens: int
    """Tokens of a file at least, but for the last one."""


@dataclass(frozen=True)
class Place:
    """Where a row's states lie."""

    shard: int
    begin: int
    end: int


class States:
    """A folder with the states of some rows: `states.json` and `states-00000.safetensors`, …"""

    def __init__(self, folder: Path, target: Target, forward: Forward, rows: list[Row], *, reach: int = 1):
        """Plans the folder's files, and reads what it holds already.

        A drafter that is given the states of several positions asks for a `reach` of as many.

        Raises RedrafterError where it holds states of other rows or of another target, or a damaged file.
        """
        check_states_folder(folder)
        self.folder, self._forward, self._device = folder, forward, target.device
        first = next((row for row in rows if row.learnt), None)
        if first is None:
            raise RedrafterError("The data holds no token to learn.")
        self._reach = reach
        (probe,) = self._of([first])
        self.index = _index(target, rows, reach, probe)
        if (folder / INDEX).exists():
            self.index = self._agreed()
        self._plan(rows)
        self.missing = [number for number in range(len(self._rows)) if not self._is_there(number)]
        self._open: dict[int, Any] = {}
        if 0 not in self.missing:
            _refuse_other_weights(folder, self._read(first), probe)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._bytes(number) for number in range(len(self._rows)))

    @property
    def to_write(self) -> int:
        """Bytes of the files that are not there yet."""
        return sum(map(self._bytes, self.missing))

    def __str__(self) -> str:
        """The size, and how it comes about."""
        tokens, index = sum(self._tokens), self.index
        return (
            f"{self.size / 2**30:.2f} GiB ({tokens:,} tokens x {index.width:,} x "
            f"{getattr(torch, index.dtype).itemsize} bytes) in {self.folder}"
        )

    def compute(self, tell: Tell, *, process: int = 0, processes: int = 1, together: bool = False) -> None:
        """Computes and writes what is missing; of several processes each its part, and all wait for the whole.

        With `together` they run the target equally often, as one asks for that is itself divided among them.  Raises
        RedrafterError where the disk is too small, before anything is computed, or cannot be written to.
        """
        tell(f"States: {self}." if self.missing else f"States: {self}, all there.")
        if not self.missing:
            return
        if process == 0:
            self._prepare()
        if processes > 1:
            torch.distributed.barrier()  # so that all see the same files
        for begin in range(0, len(self.missing), processes):
            files = self.missing[begin : begin + processes]
            runs = max(len(_batches(self._rows[number])) for number in files) if together else 0
            number = files[min(process, len(files) - 1)]
            if process < len(files) or together:
                states = self._compute(self._rows[number], runs)
            if process < len(files):
                self._write(self._path(number).name, partial(save_file, {STATES: states}))
            tell(f"States: {begin + len(files)} of {len(self.missing)} files written.")
        while not all(map(self._is_there, self.missing)):
            time.sleep(0.1)
        self.missing = []

    def __call__(self, row: Row) -> Float[Tensor, "P F"]:
        """The states of a row, zeros where none are kept.  Raises RedrafterError for a damaged file."""
        kept = self._read(row)
        whole = kept.new_zeros((len(row.input_ids), kept.shape[1]))
        whole[torch.tensor(row.before_learnt(self._reach))] = kept
        return whole

    def _read(self, row: Row) -> Float[Tensor, "kept F"]:
        place = self._places[_digest(row)]
        if place.shard not in self._open:
            path = self._path(place.shard)
            try:
                states = safe_open(path, framework="pt").get_slice(STATES)
            except (SafetensorError, OSError) as error:
                raise RedrafterError(f"{path} is damaged ({error}): delete it and run again.") from None
            if states.get_shape() != [self._tokens[place.shard], self.index.width]:
                raise RedrafterError(f"{path} is damaged (its shape is {states.get_shape()}): delete it and run again.")
            self._open[place.shard] = states
        return self._open[place.shard][place.begin : place.end]  # type: ignore[no-any-return]

    def _plan(self, rows: list[Row]) -> None:
        """Which rows go to which file; rows that are alike lie there once."""
        self._places: dict[bytes, Place] = {}
        self._rows: list[list[Row]] = [[]]
        self._tokens = [0]
        for row in rows:
            digest = _digest(row)
            if digest in self._places:
                continue
            if self._tokens[-1] >= self.index.shard_tokens:
                self._rows.append([])
                self._tokens.append(0)
            begin, count = self._tokens[-1], sum(row.before_learnt(self._reach))
            self._places[digest] = Place(len(self._rows) - 1, begin, begin + count)
            self._rows[-1].append(row)
            self._tokens[-1] += count

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"

    def _is_there(self, number: int) -> bool:
        return self._path(number).exists()

    def _bytes(self, number: int) -> int:
        item: int = getattr(torch, self.index.dtype).itemsize
        return self._tokens[number] * self.index.width * item

    def _agreed(self) -> Index:
        """The folder's own index, once it is known to be of the same rows and target."""
        path = self.folder / INDEX
        try:
            found = Index(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RedrafterError(f"{path} is not the index of a folder of states ({error}).") from None
        for name in ("target", "revision", "dtype", "config", "width", "reach", "rows"):
            if (theirs := getattr(found, name)) != (ours := getattr(self.index, name)):
                told = f" ({name} {theirs}, not {ours})" if name not in ("config", "rows") else ""
                of = "other rows" if name == "rows" else "another target"
                raise RedrafterError(f"{self.folder} holds the states of {of}{told}: choose another folder.")
        return found

    def _compute(self, rows: list[Row], runs: int) -> Float[Tensor, "kept F"]:
        """The states of one file, in `runs` of the target at least."""
        found: dict[int, Tensor] = {}
        batches = _batches(rows)
        for part in batches:
            found |= zip(part, self._of([rows[number] for number in part]), strict=True)
        for _ in range(runs - len(batches)):
            self._of([rows[batches[-1][-1]]])
        return torch.cat([found[number] for number in range(len(rows))])

    def _of(self, rows: list[Row]) -> list[Tensor]:
        batch = collate(rows)
        states = self._forward(batch["input_ids"].to(self._device), batch["segments"].to(self._device)).cpu()
        return [
            own[: len(row.input_ids)][torch.tensor(row.before_learnt(self._reach))]
            for own, row in zip(states, rows, strict=True)
        ]

    def _prepare(self) -> None:
        """The folder and its index; refuses a disk that is too small."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for rest in self.folder.glob(".*.part"):  # of a run that was killed, or of one that fills the folder too
                with suppress(FileNotFoundError):
                    if time.time() - rest.stat().st_mtime > STALE:
                        rest.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise RedrafterError(f"{self.folder} cannot be written to: {error.strerror}.") from error
        if self.to_write > free:
            raise RedrafterError(
                f"The states take {self}, of which {self.to_write / 2**30:.2f} GiB are to be written, and "
                f"{free / 2**30:.2f} GiB are free there."
            )
        text = json.dumps(asdict(self.index), indent=2) + "\n"
        self._write(INDEX, lambda path: path.write_text(text, encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        path = self.folder / name
        beside = path.with_name(f".{name}.{os.getpid()}.part")
        try:
            write(beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
            beside.unlink(missing_ok=True)
            cause = "no space is left on the device" if full else reason(error)
            raise RedrafterError(f"The states {path} could not be written: {cause}.") from error


def _batches(rows: list[Row]) -> list[list[int]]:
    """The rows of a file by their numbers, as they go through the target together: those of like length."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].input_ids))
    batches = []
    while order:
        count = max(1, BATCH // max(1, len(rows[order[0]].input_ids)))
        batches.append(order[:count])
        order = order[count:]
    return batches


def _index(target: Target, rows: list[Row], reach: int, probe: Float[Tensor, "kept F"]) -> Index:
    settings = target.model.config.to_diff_dict() | {"context_layers": target.layers}
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset"):
        settings.pop(name, None)  # said elsewhere, or of no matter
    config = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    ids = hashlib.sha256(b"".join(map(_digest, rows))).hexdigest()
    width = probe.shape[-1]
    tokens = max(1, SHARD // (width * probe.dtype.itemsize))
    dtype = str(probe.dtype).removeprefix("torch.")
    return Index(target.name, target.revision, dtype, config, ids, width, reach, tokens)


def _refuse_other_weights(folder: Path, kept: Tensor, probe: Tensor) -> None:
    """Names and configs can be the same for two trainings of one model."""
    distance = (kept.double() - probe.double()).norm() / probe.double().norm()
    if not distance < (1e-3 if probe.dtype in (torch.float32, torch.float64) else 0.1):
        raise RedrafterError(f"{folder} holds the states of a target with other weights: choose another folder.")


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(array("q", row.input_ids).tobytes() + bytes(row.trained), digest_size=16).digest()
