"""A linear layer whose weights have 8 bits, for products that are bound by reading them.

Promises the product of weights each of which is within half a step, a 254th of the largest of its row, of the one that
it was rounded from; the bias is kept.  On a GPU half as many bytes are read, which pays for up to 16 rows; elsewhere
the weights are made floating-point again for every product, and there is nothing to gain but memory.  Differentiable in
its input alone.  Does not know drafters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from redrafter.kernels.product import product

LEVELS = 127
"""The largest weight of a row."""

ROWS = 8192
"""Of a weight, that are rounded at a time, so that no copy of all of it in float32 is made."""


class EightBit(nn.Module):
    """`x W' + b` with `W` = `weight` × `scale`; takes and gives any floating-point dtype."""

    weight: Int8[Tensor, "out in"]
    scale: Float[Tensor, " out"]
    """Of each row of the weight; float32, whatever the module is converted to."""
    bias: Float[Tensor, " out"] | None
    dtype_as: Float[Tensor, " 0"]
    """Empty; its dtype is the layer's, which a layer without a bias has nothing else to tell by."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None):
        """Rounds a weight, which is not changed; a row of zeros stays one."""
        super().__init__()
        weight = weight.detach()
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1).float()
        scale = torch.where(largest > 0, largest / LEVELS, 1)
        rounded = weight.new_empty(weight.shape, dtype=torch.int8)
        for begin in range(0, len(weight), ROWS):
            part = slice(begin, begin + ROWS)
            rounded[part] = (weight[part].float() / scale[part, None]).round_()
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("dtype_as", weight.new_empty(0), persistent=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> EightBit:
        """In place of a layer."""
        return cls(layer.weight, layer.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer that it stands for."""
        return self.dtype_as.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EightBit:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, in the dtype of `x`; by the kernel where nothing is to be differentiated."""
        return product(x, self.weight, self.bias, scale=self.scale)
