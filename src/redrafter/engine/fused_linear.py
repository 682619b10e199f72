"""Linear layers that read the same input, computed as one product.

A product of few rows is bound by reading its weights, and one large matrix is read closer to the memory bandwidth than
several small ones.  Guarantees the sums of the separate products, possibly in another order.  Changes the modules that
it receives, so it receives copies (`redrafter.targets.isolation`).  Their weights, which the caller's model shares,
keep their values and move into one storage.  Skips everything that is not a plain linear layer: quantised, adapted and
offloaded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that read the same input in every family that has them, in call order."""


def fuse_linears(*models: nn.Module) -> int:
    """Makes the layers of these copies compute as groups.  Returns the number of groups."""
    groups = [layers for model in models for layers in groups_of(model)]
    for layers in groups:
        LinearGroup(layers).attach()
    return len(groups)


def is_grouped(model: nn.Module) -> bool:
    """Whether layers of this copy compute as groups already."""
    return any(isinstance(module, _GroupedLinear) for module in model.modules())


def groups_of(model: nn.Module) -> list[list[nn.Linear]]:
    """The model's groups of layers that read the same input."""
    groups = (_named_layers(module, names) for module in list(model.modules()) for names in GROUPS)
    return [layers for layers in groups if layers]


def _named_layers(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The named layers of a module; none if they are not all plain layers of one kind."""
    layers = [child for name in names if is_plain(child := getattr(module, name, None))]
    kinds = {(one.in_features, one.weight.dtype, one.weight.device, one.bias is None) for one in layers}
    return layers if len(layers) == len(names) and len(kinds) == 1 else []


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """Whether it is an ordinary linear layer: neither quantised nor adapted nor offloaded."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.device.type != "meta"


class LinearGroup:
    """Layers whose products are computed as one."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.weight = self.combined_weight()
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def combined_weight(self) -> Tensor:
        """The weight that `product` multiplies by."""
        return _combined([layer.weight for layer in self.layers])

    def attach(self) -> None:
        """From now on the layers return the results of `output`."""
        for index, layer in enumerate(self.layers):
            layer.__class__ = _GroupedLinear
            vars(layer).update(group=self, index=index)

    def product(self, input: Tensor) -> Tensor:
        """The outputs of all layers, concatenated."""
        return nn.functional.linear(input, self.weight, self.bias)

    def output(self, index: int, input: Tensor) -> Tensor:
        """The output of one layer.  The first call with an input computes the outputs of all layers."""
        if self._input is not input:
            self._input = input
            self._outputs = self.product(input).split(self.sizes, dim=-1)
        output = self._outputs[index]
        if index == len(self.layers) - 1:
            self._input, self._outputs = None, ()
        return output


class _GroupedLinear(nn.Linear):
    """A layer of a group.  It is a class because torch.compile specialises on functions set on instances."""

    group: LinearGroup
    index: int

    def forward(self, input: Tensor) -> Tensor:
        return self.group.output(self.index, input)


def _combined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows.  The parameters become views of it, unless they are adjacent already."""
    first, size = weights[0], weights[0].element_size()
    ends = [weight.data_ptr() + weight.numel() * size for weight in weights]
    adjacent = all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    rows = sum(len(weight) for weight in weights)
    if adjacent and one_storage and all(weight.is_contiguous() for weight in weights):
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    with torch.inference_mode(False):  # inference tensors could not be trained any more
        matrix = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, matrix.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    return matrix
