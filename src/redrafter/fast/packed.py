"""Linear layers on a CPU, their weights laid out as the product reads them, while decoding lasts.

A product of a few rows in float32 first brings the whole weight into the order that its inner loops read, which takes
longer than the rest of it.  Here oneDNN does so once, and layers that read one input are one product, as in `merged`.
Promises the sums of the separate products, in another order at most, and the model's modules and parameters untouched.
What is packed takes the weights' memory once more, so nothing is packed of what is larger than `LARGEST`.  Leaves alone
what is not a plain linear layer in float32 on an x86 CPU.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from redrafter.fast.merged import Group, apart, entered, joined_bias, merged, together

LARGEST = 2**30
"""Bytes of weights at most that are kept once more."""


@contextmanager
def packed(*models: nn.Module) -> Iterator[int]:
    """Yields the number of products that are computed from packed weights until it is left."""
    groups = [parts for model in models for parts in together(model) if all(map(_packable, parts))]
    groups += [[layer] for layer in apart(models, groups) if _packable(layer)]
    size = sum(part.weight.nbytes for parts in groups for part in parts)
    if size > LARGEST or not _works() or torch.is_autocast_enabled("cpu"):
        groups = []
    with entered([_Packed.of(parts) for parts in groups]) as count:
        yield count


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _works() -> bool:
    """Whether torch was built with oneDNN and has what is used of it, for the processors where this was measured."""
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def quicker(*models: nn.Module, captured: bool) -> AbstractContextManager[int]:
    """The products of a call: merged where its step is captured, packed where it is called."""
    return merged(*models) if captured else packed(*models)


class _Packed(Group):
    """Layers whose weights are packed into one."""

    known: ClassVar[weakref.WeakKeyDictionary[nn.Module, Self]] = weakref.WeakKeyDictionary()
    seen: tuple[object, ...] = ()

    def join(self, parts: list[nn.Linear]) -> None:
        """Packs the weights where they are not what they were."""
        seen = (torch.get_num_threads(), *(_trace(part.weight) for part in parts))  # the order suits the threads
        if seen != self.seen:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([part.weight.detach() for part in parts]))
            self.seen = seen
        self.bias = joined_bias(parts)

    def release(self) -> None:
        """What is packed serves the next call."""

    def output(self, place: int, input: Tensor) -> Tensor:
        """What the layer in this place gives; a lone row is left to torch, so that undrafted logits are the model's."""
        part = self.parts[place]()
        if input.numel() == input.shape[-1] and part is not None:
            return nn.functional.linear(input, part.weight, part.bias)
        return super().output(place, input)

    def product(self, input: Tensor) -> Tensor:
        """What all layers give, one after another."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def _trace(weight: Tensor) -> tuple[int, int, float]:
    """What tells that a weight was changed: where it lies, torch's count of changes, and, for what goes past that
    count as `weight.data += …` does, its sum."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.detach().sum().item()
