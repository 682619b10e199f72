"""The frozen target's hidden states of training rows, computed once and cached on disk.

Guarantees that states were computed for these rows by this target, that files are memory-mapped, and that an interrupt
costs at most one file.  Keeps the states that the drafter needs to predict the tokens to learn, in the target's dtype.
Does not know the drafter or the trainer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redrafter.data.examples import Row, collate
from redrafter.errors import RedrafterError, reason
from redrafter.targets.target import Target
from redrafter.utils.atomic import Content, write_atomically
from redrafter.utils.outputs import STATES_INDEX, check_states_folder

TENSOR = "states"
"""Name of the tensor in each file."""

SHARD = 2**28
"""Approximate bytes of a file."""

STALE_SECONDS = 3600
"""Age after which a temporary file belongs to a process that was killed."""

TOKENS_PER_BATCH = 2**14
"""Tokens per run of the target, padding included."""

Forward = Callable[[Int[Tensor, "B P"], Int[Tensor, "B P"]], Float[Tensor, "B P F"]]
"""Hidden states of token ids and segments (`Target.hidden_states`), of any width."""

Report = Callable[[str], object]
"""Receives messages about the progress."""


@dataclass(frozen=True)
class Index:
    """What the states of a folder depend on."""

    target: str | None
    revision: str | None
    dtype: str
    config: str
    """Hash of the target's config."""
    rows: str
    """Hash of all token ids and of which are learned."""
    width: int
    reach: int
    """Number of positions before each token to learn whose states are kept."""
    shard_tokens: int
    """Minimum number of tokens per file, except the last one."""


class _RowStates(NamedTuple):
    """The file and the range in it that hold a row's states."""

    shard: int
    begin: int
    end: int


class States:
    """A folder with the states of some rows: `states.json`, `states-00000.safetensors`, …"""

    def __init__(self, folder: Path, target: Target, forward: Forward, rows: list[Row], *, reach: int = 1):
        """Assigns the rows to files and checks those that exist.

        `reach`: number of last positions whose states the drafter receives.

        Raises RedrafterError if the folder holds states of other rows or another target, or a damaged file.
        """
        check_states_folder(folder)
        self.folder, self._forward, self._device = folder, forward, target.device
        first = next((row for row in rows if row.learnt), None)
        if first is None:
            raise RedrafterError("The data holds no token to learn.")
        self._reach = reach
        (probe,) = self._compute([first])
        self.index = _index(target, rows, reach, probe)
        if (folder / STATES_INDEX).exists():
            self.index = self._saved_index()
        self._assign(rows)
        self.missing = [number for number in range(len(self._rows)) if not self._exists(number)]
        self._open: dict[int, Any] = {}
        if 0 not in self.missing:
            _check_weights(folder, self._read(first), probe)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._bytes(number) for number in range(len(self._rows)))

    def __str__(self) -> str:
        """The size and how it is computed."""
        tokens, index = sum(self._tokens), self.index
        item = getattr(torch, index.dtype).itemsize
        return f"{self.size / 2**30:.2f} GiB ({tokens:,} tokens x {index.width:,} x {item} bytes) in {self.folder}"

    def compute(self, report: Report, *, process: int = 0, processes: int = 1, together: bool = False) -> None:
        """Computes and writes the missing files; several processes share them and wait for all.

        With `together` all processes run the target equally often, as a sharded one requires.  Raises RedrafterError if
        the disk is too small, before anything is computed, or if writing fails.
        """
        report(f"States: {self}." if self.missing else f"States: {self}, all present.")
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
                states = self._compute_file(self._rows[number], runs)
            if process < len(files):
                self._write(self._path(number), partial(save_file, {TENSOR: states}))
            report(f"States: {begin + len(files)} of {len(self.missing)} files written.")
        while not all(map(self._exists, self.missing)):
            time.sleep(0.1)
        self.missing = []

    def __call__(self, row: Row) -> Float[Tensor, "P F"]:
        """The states of a row, zeros at positions that are not kept.  Raises RedrafterError for a damaged file."""
        kept = self._read(row)
        states = kept.new_zeros((len(row.input_ids), kept.shape[1]))
        states[torch.tensor(row.before_learnt(self._reach))] = kept
        return states

    def _read(self, row: Row) -> Float[Tensor, "kept F"]:
        shard, begin, end = self._locations[_digest(row)]
        if shard not in self._open:
            path, remedy = self._path(shard), "delete it and run again"
            try:
                states = safe_open(path, framework="pt").get_slice(TENSOR)
            except (SafetensorError, OSError) as error:
                raise RedrafterError(f"{path} is damaged ({error}): {remedy}.") from None
            if states.get_shape() != [self._tokens[shard], self.index.width]:
                raise RedrafterError(f"{path} is damaged (its shape is {states.get_shape()}): {remedy}.")
            self._open[shard] = states
        return self._open[shard][begin:end]  # type: ignore[no-any-return]

    def _assign(self, rows: list[Row]) -> None:
        """Assigns rows to files; identical rows are stored once."""
        self._locations: dict[bytes, _RowStates] = {}
        self._rows: list[list[Row]] = [[]]  # of each file
        self._tokens = [0]
        for row in rows:
            digest = _digest(row)
            if digest in self._locations:
                continue
            if self._tokens[-1] >= self.index.shard_tokens:
                self._rows.append([])
                self._tokens.append(0)
            begin, count = self._tokens[-1], sum(row.before_learnt(self._reach))
            self._locations[digest] = _RowStates(len(self._rows) - 1, begin, begin + count)
            self._rows[-1].append(row)
            self._tokens[-1] += count

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"

    def _exists(self, number: int) -> bool:
        return self._path(number).exists()

    def _bytes(self, number: int) -> int:
        item: int = getattr(torch, self.index.dtype).itemsize
        return self._tokens[number] * self.index.width * item

    def _saved_index(self) -> Index:
        """The folder's index.  Raises RedrafterError if it is of other rows or another target."""
        path = self.folder / STATES_INDEX
        try:
            saved = Index(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RedrafterError(f"{path} is not the index of a folder of states ({error}).") from None
        for name in ("target", "revision", "dtype", "config", "width", "reach", "rows"):
            if (theirs := getattr(saved, name)) != (ours := getattr(self.index, name)):
                detail = f" ({name} {theirs}, not {ours})" if name not in ("config", "rows") else ""
                owner = "other rows" if name == "rows" else "another target"
                raise RedrafterError(f"{self.folder} holds the states of {owner}{detail}: choose another folder.")
        return saved

    def _compute_file(self, rows: list[Row], runs: int) -> Float[Tensor, "kept F"]:
        """The states of one file, in at least `runs` runs of the target."""
        states: dict[int, Tensor] = {}
        batches = _batches(rows)
        for batch in batches:
            states |= zip(batch, self._compute([rows[number] for number in batch]), strict=True)
        for _ in range(runs - len(batches)):
            self._compute([rows[batches[-1][-1]]])
        return torch.cat([states[number] for number in range(len(rows))])

    def _compute(self, rows: list[Row]) -> list[Tensor]:
        batch = collate(rows)
        states = self._forward(batch["input_ids"].to(self._device), batch["segments"].to(self._device)).cpu()
        return [
            own[: len(row.input_ids)][torch.tensor(row.before_learnt(self._reach))]
            for own, row in zip(states, rows, strict=True)
        ]

    def _prepare(self) -> None:
        """Creates the folder and its index.  Raises RedrafterError if the disk is too small."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.part"):  # of a killed process, or of one that is writing now
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise RedrafterError(f"{self.folder} cannot be written to: {error.strerror}.") from error
        needed = sum(map(self._bytes, self.missing))
        if needed > free:
            raise RedrafterError(
                f"The states take {self}, of which {needed / 2**30:.2f} GiB are missing, but only "
                f"{free / 2**30:.2f} GiB are free there: choose another folder."
            )
        self._write(self.folder / STATES_INDEX, json.dumps(asdict(self.index), indent=2).encode() + b"\n")

    def _write(self, path: Path, content: Content) -> None:
        try:
            write_atomically(path, content)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
            cause = "no space is left on the device" if full else reason(error)
            raise RedrafterError(f"The states {path} could not be written: {cause}.") from error


def _batches(rows: list[Row]) -> list[list[int]]:
    """Indices of a file's rows in batches of similar length, longest first."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].input_ids))
    batches = []
    while order:
        count = max(1, TOKENS_PER_BATCH // max(1, len(rows[order[0]].input_ids)))
        batches.append(order[:count])
        order = order[count:]
    return batches


def _index(target: Target, rows: list[Row], reach: int, probe: Float[Tensor, "kept F"]) -> Index:
    settings = target.model.config.to_diff_dict() | {"context_layers": target.layers}
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset"):
        settings.pop(name, None)  # recorded elsewhere, or irrelevant
    config = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    ids = hashlib.sha256(b"".join(map(_digest, rows))).hexdigest()
    width = probe.shape[-1]
    tokens = max(1, SHARD // (width * probe.dtype.itemsize))
    dtype = str(probe.dtype).removeprefix("torch.")
    return Index(target.name, target.revision, dtype, config, ids, width, reach, tokens)


def _check_weights(folder: Path, kept: Tensor, probe: Tensor) -> None:
    """Raises RedrafterError if the states of a row differ: two trained models may share name and config."""
    distance = (kept.double() - probe.double()).norm() / probe.double().norm()
    if not distance < (1e-3 if probe.dtype in (torch.float32, torch.float64) else 0.1):
        raise RedrafterError(f"{folder} holds the states of a target with other weights: choose another folder.")


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(array("q", row.input_ids).tobytes() + bytes(row.trained), digest_size=16).digest()
