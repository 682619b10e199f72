"""Linear layers that read one input, computed as one product while decoding lasts.

A product of a few rows is bound by reading its weights, and a large matrix is read nearer to the memory's bandwidth
than three small ones.  Promises the sums of the separate products, in another order at most, and the model's modules
and parameters as they were; the merged weights share one piece of memory from then on.  Leaves alone what is not a
plain linear layer: quantised, adapted and offloaded ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, within one module, of layers that read one input in every family that has them, in order of their call."""


@contextmanager
def merged(*models: nn.Module) -> Iterator[int]:
    """Yields the number of groups that are computed as one until it is left."""
    with entered([Group.of(parts) for model in models for parts in together(model)]) as count:
        yield count


@contextmanager
def entered(groups: Sequence[Group]) -> Iterator[int]:
    """The groups compute for their layers until it is left; yields their number."""
    for group in groups:
        group.enter()
    try:
        yield len(groups)
    finally:
        for group in groups:
            group.leave()


def together(model: nn.Module) -> list[list[nn.Linear]]:
    """The model's layers that read one input."""
    found = (_parts(module, names) for module in list(model.modules()) for names in GROUPS)
    return [parts for parts in found if parts]


def _parts(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The named layers of the module, or none where they are not all plain ones of one kind."""
    parts = [child for name in names if plain(child := getattr(module, name, None))]
    kinds = {(p.in_features, p.weight.dtype, p.weight.device, p.bias is None) for p in parts}
    return parts if len(parts) == len(names) and len(kinds) == 1 else []


def plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that nobody has changed: neither quantised nor adapted nor offloaded."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.device.type != "meta"


class Group:
    """Layers whose weights lie one after another.  Does not keep them alive."""

    known: ClassVar[weakref.WeakKeyDictionary[nn.Module, Self]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, parts: list[nn.Linear]) -> Self:
        """The layers' group; the same one each time, so that a CUDA graph or compiled code finds its weights again."""
        group = cls.known.get(parts[0])
        if group is None or [one() for one in group.parts] != parts:
            group = cls.known[parts[0]] = cls(parts)
        group.join(parts)
        return group

    def __init__(self, parts: list[nn.Linear]):
        self.parts = [weakref.ref(part) for part in parts]
        self.sizes = [part.out_features for part in parts]
        self.weight: Tensor
        self.bias: Tensor | None = None
        self.read: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def join(self, parts: list[nn.Linear]) -> None:
        """Takes the weights as they are now."""
        self.weight = _joined([part.weight for part in parts])
        self.bias = joined_bias(parts)

    def enter(self) -> None:
        """The layers give what `output` says."""
        for place, one in enumerate(self.parts):
            if (part := one()) is not None:
                part.__class__ = _Part
                vars(part).update(group=self, place=place)

    def leave(self) -> None:
        """The layers compute by themselves again."""
        self.read, self.outputs = None, ()
        for one in self.parts:
            if (part := one()) is not None:
                part.__class__ = nn.Linear
                del part.group, part.place

    def product(self, input: Tensor) -> Tensor:
        """What all layers give, one after another."""
        return nn.functional.linear(input, self.weight, self.bias)

    def output(self, place: int, input: Tensor) -> Tensor:
        """What the layer in this place gives; the first one that is asked computes for all."""
        if self.read is not input:
            self.read = input
            self.outputs = self.product(input).split(self.sizes, dim=-1)
        found = self.outputs[place]
        if place == len(self.parts) - 1:
            self.read, self.outputs = None, ()
        return found


class _Part(nn.Linear):
    """A layer in its group.  A class, for torch.compile takes layers with functions of their own for different code."""

    group: Group
    place: int

    def forward(self, input: Tensor) -> Tensor:
        return self.group.output(self.place, input)


def joined_bias(parts: Sequence[nn.Linear]) -> Tensor | None:
    """The layers' biases, one after another."""
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    return torch.cat(biases) if biases else None


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows, which the parameters become views of, unless they are so already."""
    first, size = weights[0], weights[0].element_size()
    ends = [weight.data_ptr() + weight.numel() * size for weight in weights]
    adjacent = all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    rows = sum(len(weight) for weight in weights)
    if adjacent and one_storage and all(weight.is_contiguous() for weight in weights):
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return whole
