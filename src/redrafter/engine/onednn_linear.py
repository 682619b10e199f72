"""Linear layers on a CPU, their weights laid out as the product reads them.

A product of a few rows in float32 first brings the whole weight into the order that its inner loops read, which takes
longer than the rest of it.  Here oneDNN does so once, and layers that read one input are one product, as in `merged`.
Promises the sums of the separate products, in another order at most.  Changes the modules that it is given, so it is
given copies (`redrafter.targets.isolation`); the weights are not touched.  Packed weights take the weights' memory once more,
so nothing is packed of what is larger than `LARGEST`, and are kept for the next call as long as the weights live and
hold what they held.  Leaves alone what is not a plain linear layer in float32 on an x86 CPU.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from redrafter.engine.fused_linear import Group, apart, merge, together

LARGEST = 2**30
"""Bytes of weights at most that are kept once more."""

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was packed, by the first of its weights."""


def pack(*models: nn.Module) -> int:
    """Makes the layers of these copies compute from packed weights; returns the number of products."""
    groups = [parts for model in models for parts in together(model) if all(map(_packable, parts))]
    groups += [[layer] for layer in apart(models, groups) if _packable(layer)]
    size = sum(part.weight.nbytes for parts in groups for part in parts)
    if size > LARGEST or not _works() or torch.is_autocast_enabled("cpu"):
        return 0
    for parts in groups:
        _Packed(parts).attach()
    return len(groups)


def optimize_linears(*models: nn.Module, captured: bool) -> int:
    """Merges the products of these copies where a step is captured in a CUDA graph, packs them where it is not."""
    return merge(*models) if captured else pack(*models)


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _works() -> bool:
    """Whether torch was built with oneDNN and has what is used of it, for the processors where this was measured."""
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class _Packed(Group):
    """Layers whose weights are packed into one."""

    def joined_weight(self) -> Tensor:
        """Packed weights from an earlier call, if the weights still hold what they held then; else packed now."""
        weights = [part.weight.detach() for part in self.parts]
        contents = [_Content.of(weight) for weight in weights]
        known = _kept.get(self.parts[0].weight)
        threads = torch.get_num_threads()  # the order suits their number
        if known is not None and (known.threads, known.contents) == (threads, contents) and None not in contents:
            return known.packed  # type: ignore[no-any-return]
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
        _kept[self.parts[0].weight] = _Kept(packed, threads, contents)
        return packed  # type: ignore[no-any-return]

    def output(self, place: int, input: Tensor) -> Tensor:
        """The output of the layer in this place; a single row is left to torch, so undrafted logits are the model's."""
        if input.numel() == input.shape[-1]:
            part = self.parts[place]
            return nn.functional.linear(input, part.weight, part.bias)
        return super().output(place, input)

    def product(self, input: Tensor) -> Tensor:
        """The outputs of all layers, one after another."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Kept:
    """Packed weights and what they were made from."""

    packed: Tensor
    threads: int
    contents: list[_Content | None]


@dataclass(frozen=True, eq=False)
class _Content:
    """Sums of a weight's bits over its rows and over its columns, as 64-bit integers that wrap.

    Every change of one element, and every permutation of rows or columns that changes anything, changes the sums;
    torch's own count of changes does not see those through `.data` or NumPy.  Costs two reads of the weight.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> _Content | None:
        """None for a weight whose bits cannot be read in pairs."""
        if not weight.is_contiguous() or weight.shape[-1] % 2:
            return None
        bits = weight.view(torch.int64)
        return cls(bits.sum(dim=1), bits.sum(dim=0))

    def __eq__(self, other: object) -> bool:
        """Whether all sums are equal."""
        if not isinstance(other, _Content):
            return False
        return torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)
