"""Linear layers on x86 CPUs with weights in oneDNN's packed layout.

A float32 product of several rows first reorders the whole weight, which takes longer than the rest of it.  Here oneDNN
reorders it once, and layers that read the same input are one product (`redrafter.engine.fused_linear`).  Guarantees the
sums of the separate products, possibly in another order.  Single-row products are unaffected.  Changes the modules that
it receives, so it receives copies; the weights are not changed.  Packed weights need the memory of the weights once
more; models above MAX_BYTES are not packed.  They are kept between calls as long as the weights are alive and
unchanged.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from redrafter.engine.fused_linear import LinearGroup, groups_of, is_plain

MAX_BYTES = 2**30
"""Limit on the weights that are packed."""

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed weights by the first weight of their group."""


def why_not_packed(*models: nn.Module) -> str | None:
    """The reason why nothing would be packed; None if something would."""
    return _refusal(_groups(models))


def pack_linears(*models: nn.Module) -> int:
    """Makes the layers of these copies compute from packed weights.  Returns the number of products."""
    groups = _groups(models)
    if _refusal(groups) is not None:
        return 0
    for layers in groups:
        _PackedGroup(layers).attach()
    return len(groups)


def _refusal(groups: list[list[nn.Linear]]) -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the CPU is not x86"
    operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    if not operators or not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    size = sum(layer.weight.nbytes for layers in groups for layer in layers)
    if size > MAX_BYTES:
        return f"{size / 2**30:.1f} GiB of weights are more than {MAX_BYTES / 2**30:.0f} GiB"
    return None if size else "no plain float32 layers"


def _groups(models: tuple[nn.Module, ...]) -> list[list[nn.Linear]]:
    """Groups of layers that can be packed; layers that are in no group are groups of one."""
    groups = [layers for model in models for layers in groups_of(model) if all(map(_packable, layers))]
    grouped = {layer for layers in groups for layer in layers}
    single = dict.fromkeys(layer for model in models for layer in model.modules() if is_plain(layer))
    return groups + [[layer] for layer in single if layer not in grouped and _packable(layer)]


def _packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


class _PackedGroup(LinearGroup):
    """Layers whose weights are packed as one."""

    def combined_weight(self) -> Tensor:
        """The packed weights of an earlier call if the weights have not changed; otherwise packs them."""
        weights = [layer.weight.detach() for layer in self.layers]
        checksums = [_Checksum.of(weight) for weight in weights]
        known = _packed.get(self.layers[0].weight)
        threads = torch.get_num_threads()  # the layout depends on it
        if known is not None and (known.threads, known.checksums) == (threads, checksums) and None not in checksums:
            return known.packed  # type: ignore[no-any-return]
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
        _packed[self.layers[0].weight] = _Packed(packed, threads, checksums)
        return packed  # type: ignore[no-any-return]

    def output(self, index: int, input: Tensor) -> Tensor:
        """The output of one layer.  PyTorch computes single rows, so undrafted logits are exactly the model's."""
        if input.numel() == input.shape[-1]:
            layer = self.layers[index]
            return nn.functional.linear(input, layer.weight, layer.bias)
        return super().output(index, input)

    def product(self, input: Tensor) -> Tensor:
        """The outputs of all layers, concatenated."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Packed:
    """Packed weights and the state that they were made from."""

    packed: Tensor
    threads: int
    checksums: list[_Checksum | None]


@dataclass(frozen=True, eq=False)
class _Checksum:
    """Sums of a weight's bits over its rows and its columns, as 64-bit integers that wrap.

    Every change of one element, and every effective permutation of rows or columns, changes the sums.  PyTorch's
    version counter does not see changes through `.data` or NumPy.  Costs two reads of the weight.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> _Checksum | None:
        """None for a weight whose elements cannot be read in pairs."""
        if not weight.is_contiguous() or weight.shape[-1] % 2:
            return None
        bits = weight.view(torch.int64)
        return cls(bits.sum(dim=1), bits.sum(dim=0))

    def __eq__(self, other: object) -> bool:
        """Whether all sums are equal."""
        if not isinstance(other, _Checksum):
            return False
        return torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)
