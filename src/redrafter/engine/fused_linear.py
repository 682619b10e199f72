"""Linear layers that read one input, computed as one product; large ones by a kernel of ours.

A product of a few rows is bound by reading its weights, and a large matrix is read nearer to the memory's bandwidth
than three small ones; where that was measured the kernel of `redrafter.kernels.product` reads it nearer still.  Promises
the sums of the separate products, in another order at most.  Changes the modules that it is given, so it is given
copies (`redrafter.targets.isolation`).  Their weights, which the caller's model shares, keep their values and lie in one piece
of memory from then on.  Leaves alone what is not a plain linear layer: quantised, adapted and offloaded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from redrafter.kernels.product import measured, product

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, within one module, of layers that read one input in every family that has them, in order of their call."""

FEW = 16
"""Rows of a layer's product, at most, that the kernel computes; with 0 it computes none.

With it an H100 took 0.92 of the time for a step of a 7B shape with 1 row and 0.97 with 8 and 16; with 32 and 64 an H200
lost by it.
"""

LONG = 2
"""Times a weight's columns, beyond which its sums are long: those of an MLP's last layer are."""

LARGE = 4_000_000
"""Numbers of a weight, at least, for the kernel; measured were 2 and 12 million, and more."""


def merge(*models: nn.Module) -> int:
    """Makes the layers of these copies compute by groups; returns the number of products that are changed."""
    groups = [parts for model in models for parts in together(model)]
    groups += [[layer] for layer in apart(models, groups) if few(layer.weight)]
    for parts in groups:
        Group(parts).attach()
    return len(groups)


def few(weight: Tensor) -> int:
    """Rows, at most, whose product with a layer's weight is the kernel's.

    One where the sums are long and few: of more rows torch splits them, and the kernel took an H100 1.05 of its time.
    """
    if weight.numel() < LARGE or torch.is_autocast_enabled("cuda") or not measured(weight):
        return 0
    columns, inner = weight.shape
    return min(FEW, 1) if inner > LONG * columns else FEW


def together(model: nn.Module) -> list[list[nn.Linear]]:
    """The model's layers that read one input."""
    found = (_parts(module, names) for module in list(model.modules()) for names in GROUPS)
    return [parts for parts in found if parts]


def apart(models: Sequence[nn.Module], groups: Sequence[Sequence[nn.Linear]]) -> list[nn.Linear]:
    """The models' plain linear layers that are in no group, each once."""
    grouped = {part for parts in groups for part in parts}
    layers = dict.fromkeys(layer for model in models for layer in model.modules() if plain(layer))
    return [layer for layer in layers if layer not in grouped]


def _parts(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The named layers of the module, or none where they are not all plain ones of one kind."""
    parts = [child for name in names if plain(child := getattr(module, name, None))]
    kinds = {(p.in_features, p.weight.dtype, p.weight.device, p.bias is None) for p in parts}
    return parts if len(parts) == len(names) and len(kinds) == 1 else []


def plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer that nobody has changed: neither quantised nor adapted nor offloaded."""
    return type(layer) is nn.Linear and unchanged(layer) and layer.weight.device.type != "meta"


def unchanged(layer: object) -> bool:
    """Whether its product is that of its own weight and bias, also while a group computes it."""
    return type(layer) in (nn.Linear, _Part) and "forward" not in vars(layer)


class Group:
    """Layers whose products are computed as one, from weights that lie one after another."""

    def __init__(self, parts: list[nn.Linear]):
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        self.bias = joined_bias(parts)
        self.weight = self.joined_weight()
        self.few = few(self.weight)
        self.read: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def joined_weight(self) -> Tensor:
        """What `product` multiplies by."""
        return _joined([part.weight for part in self.parts])

    def attach(self) -> None:
        """From now on the layers return what `output` computes."""
        for place, part in enumerate(self.parts):
            part.__class__ = _Part
            vars(part).update(group=self, place=place)

    def product(self, input: Tensor) -> Tensor:
        """The outputs of all layers, one after another."""
        return product(input, self.weight, self.bias, few=self.few)

    def output(self, place: int, input: Tensor) -> Tensor:
        """The output of the layer in this place; the first call with an input computes those of all layers."""
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
    """The layers' biases, one after another; of one layer its own."""
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    return torch.cat(biases)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows, which the parameters become views of, unless they are so already."""
    first, size = weights[0], weights[0].element_size()
    ends = [weight.data_ptr() + weight.numel() * size for weight in weights]
    adjacent = all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    rows = sum(len(weight) for weight in weights)
    if adjacent and one_storage and all(weight.is_contiguous() for weight in weights):
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    with torch.inference_mode(False):  # or the parameters could not be trained any more
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    return whole
