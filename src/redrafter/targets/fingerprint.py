"""What identifies a model: digests of a sample of its weights, whatever its folder is called.

The sample is a few numbers of every parameter, so that it is cheap for a large model, and a fine-tuned variant has
another digest.  Digests are kept for each dtype that the weights can be rounded to, so that one model loaded in
float32, bfloat16 or float16 is recognised.  A part that cannot be read (offloaded, sharded or quantised weights) has no
digest and is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

DTYPES = ("float32", "float16", "bfloat16")
"""In which weights are compared, finest first."""


class Fingerprint(BaseModel):
    """Digests of a model's weights, by the dtypes that they were rounded to (`redrafter.targets.fingerprint`).

    Empty for what could not be read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    embedding: dict[str, str] = {}
    layers: dict[str, str] = {}
    """Of all other parameters."""
    structure: str = ""
    """Of the names and shapes of those; digests of `layers` are compared only where it is the same."""

    def __bool__(self) -> bool:
        """Whether there is any digest."""
        return bool(self.embedding or self.layers)

    def matches(self, other: Fingerprint) -> bool | None:
        """Whether both are of one model; None if that cannot be known."""
        found = [_equal(self.embedding, other.embedding)]
        if self.structure == other.structure:
            found.append(_equal(self.layers, other.layers))
        if False in found:
            return False
        return True if True in found else None


def _equal(one: dict[str, str], other: dict[str, str]) -> bool | None:
    """Whether digests are equal in the finest dtype that both have; None if they have none, or if that proves nothing.

    Weights of float32 that were rounded to bfloat16 on one side and to float16 on the other may differ in bfloat16.
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
"""Numbers that are sampled of a row of the embedding, and of every other parameter."""

SMALLEST = 2.0**-14
"""Smaller numbers count as zero: float16 holds them less precisely than bfloat16."""

_ROUNDED = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16,),
}
"""The dtypes that weights of a dtype are compared in, finest first."""


@torch.no_grad()
def fingerprint(model: nn.Module, embedding: nn.Module, vocab_size: int) -> Fingerprint:
    """Of a model of transformers, without adapters around it.  `embedding` is its token embedding's module."""
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
    structure = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16] if layers else ""
    return Fingerprint(embedding=_digests(rows), layers=_digests(layers), structure=structure)


def _samples(parameters: Iterable[Any], rows: int, values: int, limit: int | None = None) -> list[Tensor] | None:
    """Numbers of each parameter at places that depend on its shape alone; None if any of them cannot be read.

    `limit`: rows that count, for a table may be padded.
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
        count = min(size, rows * values)
        places = torch.arange(count) * size // count  # evenly spread, in whole numbers
        index = torch.unravel_index(places.to(data.device), shape) if shape else ()
        found.append(data[index].reshape(-1).cpu())
    return found


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
