"""Identifies a model by digests of a sample of its weights, independent of its name.

The sample contains a few elements of every parameter: it is cheap for large models, and a fine-tuned variant has
another digest.  There is one digest for each dtype that the weights can be rounded to, so that a model is recognised in
float32, bfloat16 and float16.  Parts that cannot be read (offloaded, sharded or quantised weights) have no digest and
are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes in which weights are compared, in order of precision."""


class Fingerprint(BaseModel):
    """Digests of a model's weights by the dtypes that they were rounded to; empty for weights that cannot be read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    embedding: dict[str, str] = {}
    layers: dict[str, str] = {}
    """Digests of all other parameters."""
    structure: str = ""
    """Digest of the names and shapes of these; `layers` are compared only if it is equal."""

    def __bool__(self) -> bool:
        """Whether there is any digest."""
        return bool(self.embedding or self.layers)

    def matches(self, other: Fingerprint) -> bool | None:
        """Whether both identify the same model; None if unknown."""
        results = [_equal(self.embedding, other.embedding)]
        if self.structure == other.structure:
            results.append(_equal(self.layers, other.layers))
        if False in results:
            return False
        return True if True in results else None


@runtime_checkable
class Identified(Protocol):
    """A model as far as a head must know it to decide whether it was trained for that model."""

    vocab_size: int
    hidden_size: int
    name: str | None
    """Hub id or name of the folder; None if unknown."""

    def fingerprint(self) -> Fingerprint:
        """Digests that identify the weights; empty if they cannot be read."""
        ...


def _equal(one: dict[str, str], other: dict[str, str]) -> bool | None:
    """Whether digests are equal in the most precise common dtype; None if there is none or it is inconclusive.

    float32 weights that were rounded to bfloat16 in one model and to float16 in the other may differ in bfloat16.
    """
    shared = [kind for kind in DTYPES if kind in one and kind in other]
    if not shared:
        return None
    if one[shared[0]] == other[shared[0]]:
        return True
    finest = {next(kind for kind in DTYPES if kind in digests) for digests in (one, other)}
    return None if finest == {"bfloat16", "float16"} else False


ROWS = 256
"""Rows of the token embedding that are sampled."""

VALUES = 64
"""Elements that are sampled from each row of the embedding and from every other parameter."""

SMALLEST = 2.0**-14
"""Smaller numbers count as zero: float16 holds them less precisely than bfloat16."""

_ROUNDED = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16,),
}
"""The dtypes in which weights of a dtype are compared, in order of precision."""


@torch.no_grad()
def fingerprint(model: nn.Module, embedding: nn.Module, vocab_size: int) -> Fingerprint:
    """The fingerprint of a transformers model without its adapters.  `embedding` is its token embedding."""
    rows = _samples([_inner(embedding).weight], ROWS, VALUES, vocab_size)  # type: ignore[list-item]
    left_out = {id(_inner(embedding).weight)} | _adapters(model)
    rest = {
        name.replace(".base_layer", "").replace(".original_module", ""): one
        for name, one in model.named_parameters()
        if id(one) not in left_out
    }
    shapes = sorted((name, list(one.shape)) for name, one in rest.items())
    quantised = getattr(model.config, "quantization_config", None) is not None
    layers = None if quantised else _samples([rest[name] for name, _ in shapes], 1, VALUES)
    return Fingerprint(
        embedding=_digests(rows), layers=_digests(layers), structure=_structure(shapes) if layers else ""
    )


def _samples(parameters: Iterable[Any], rows: int, values: int, limit: int | None = None) -> list[Tensor] | None:
    """Elements of each parameter at indices that depend on its shape only; None if one of them cannot be read.

    `limit`: number of rows that count, because a table may be padded.
    """
    found = []
    for one in parameters:
        data: Any = getattr(one, "data", None)
        if type(data) is not Tensor or data.is_meta or data.dtype not in (*_ROUNDED, torch.float64) or not data.numel():
            return None
        shape = list(data.shape)
        if limit is not None:
            shape[0] = min(shape[0], limit)
        size = torch.Size(shape).numel()
        index = torch.unravel_index(_spaced(size, rows * values).to(data.device), shape) if shape else ()
        found.append(data[index].reshape(-1).cpu())
    return found


def _spaced(size: int, most: int) -> Tensor:
    """At most `most` evenly spaced indices of `size` elements."""
    count = min(size, most)
    return torch.arange(count) * size // count


@torch.no_grad()
def embedding_digests(embed: Callable[[Tensor], Tensor], vocab_size: int, hidden_size: int) -> dict[str, str]:
    """`Fingerprint.embedding` of a table that can only be looked up, such as one that is divided between devices.

    `embed` returns rows of the table for ids on the CPU.
    """
    index = _spaced(vocab_size * hidden_size, ROWS * VALUES)
    parts = []
    for part in index.split(1024):  # a lookup of all rows at once could take gigabytes
        rows = embed(part // hidden_size).cpu()
        parts.append(rows[torch.arange(len(part)), part % hidden_size])
    return _digests([torch.cat(parts)])


def checkpoint_fingerprint(folder: Path, embedding: str) -> Fingerprint:
    """The fingerprint of all weights but the token embedding, from the safetensors files of a model's folder.

    `embedding` is the end of the name of the embedding's tensor.  Empty if there are no such files, or if the names in
    the files are not those of the model in transformers, whose structure then differs.
    """
    samples: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if not name.endswith(embedding):
                        samples[name], shapes[name] = _sample_of(tensors.get_slice(name))
        except (OSError, SafetensorError):
            return Fingerprint()
    if not samples or any(one.dtype not in (*_ROUNDED, torch.float64) for one in samples.values()):
        return Fingerprint()
    ordered = sorted(shapes.items())
    return Fingerprint(layers=_digests([samples[name] for name, _ in ordered]), structure=_structure(ordered))


def _sample_of(stored: Any) -> tuple[Tensor, list[int]]:
    """The elements of a stored tensor that a fingerprint contains, and its shape.  Reads little more than these."""
    shape = stored.get_shape()
    if len(shape) < 2:
        return stored[:][_spaced(shape[0] if shape else 1, VALUES)], shape
    row = torch.Size(shape[1:]).numel()
    index = _spaced(shape[0] * row, VALUES)
    elements = [stored[one // row : one // row + 1].flatten()[[one % row]] for one in index.tolist()]
    return torch.cat(elements), shape


def _structure(shapes: Sequence[tuple[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _digests(samples: list[Tensor] | None) -> dict[str, str]:
    """Digests of all samples together, in every dtype that the coarsest of them can be rounded to."""
    if not samples:
        return {}
    kinds = {torch.float32 if one.dtype == torch.float64 else one.dtype for one in samples}
    common = [kind for kind in _ROUNDED[torch.float32] if all(kind in _ROUNDED[one] for one in kinds)]
    found = {}
    for kind in common:
        values = torch.cat([one.float().to(kind).float() for one in samples])
        values = torch.where(values.abs() < SMALLEST, 0.0, values)
        found[str(kind).removeprefix("torch.")] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
    return found


def _inner(module: nn.Module) -> nn.Module:
    """The model's own module inside a wrapper of PEFT."""
    while True:
        for name in ("base_layer", "original_module"):
            if isinstance(inner := getattr(module, name, None), nn.Module):
                module = inner
                break
        else:
            return module


def _adapters(model: nn.Module) -> set[int]:
    """Parameters, by `id`, that PEFT added: those of its wrappers, but for what they wrap."""
    added: set[int] = set()
    kept: set[int] = set()
    for module in model.modules():
        if (inner := _inner(module)) is not module:
            added |= {id(one) for one in module.parameters()}
            kept |= {id(one) for one in inner.parameters()}
    return added - kept
