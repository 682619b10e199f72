"""Products of a few rows and what follows them: where weights were read faster so, one launch of a kernel.

A product of a few rows is bound by reading its weights and by its launches.  Promises the sums of torch's product, in
another order and rounded once, after what follows; by torch's own wherever nothing was measured to gain.  Does not know
layers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.kernels import has_kernels

FEW = 16
"""Rows of a draft's product in 16 bits, at most, that the kernel computes; with 0 it computes none.

For 10 and 16 rows an H100 took 0.92 to 1.05 of the library's time for the product alone, and what follows it is one
launch less; for 50 rows and more the library is as fast.
"""

CAPABILITY = 9
"""Of the GPUs, H100 and H200, on which weights in 16 bits were measured."""


def activated(x: Tensor, more: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """`onto + SiLU(x + more)`, of equal shapes; where nothing is to be differentiated, in one launch on a GPU."""
    if not torch.is_grad_enabled() and has_kernels(x.device, x.dtype):
        given = [one for one in (x, more, onto) if one is not None]
        if all((one.shape, one.dtype, one.device) == (x.shape, x.dtype, x.device) for one in given):
            from redrafter.kernels.triton import drafting

            with torch.cuda.device_of(x):
                return drafting.activated(x, more, onto)
    silu = nn.functional.silu(x if more is None else x + more)
    return silu if onto is None else onto + silu


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    onto: Tensor | None = None,
    silu: bool = False,
    begin: int = 0,
    few: int | None = None,
) -> Tensor:
    """`x W' + b` [*batch, out] of `x` [*batch, in], in its dtype, then SiLU where asked, then `onto` added.

    `weight` [out, in] is in the dtype of `x`, or in int8 with a `scale` [out] in float32.  `bias` is [out], or
    [B, 1, out] for `x` [B, rows, in]; `onto` is [*batch, out].  The columns before `begin` are the product alone, and
    `bias` and `onto` have so many less.
    `few`: rows, at most, that the kernel computes; it is asked for by a caller who knows that the kernel runs, and
    torch.compile then takes it for one operator.
    """
    if not (fused(x, weight, scale) if few is None else _taken(x, weight, few)):
        return plain(x, weight, bias, scale=scale, onto=onto, silu=silu, begin=begin)
    compute = _operator if torch.compiler.is_compiling() else _launched
    return compute(x, weight, bias, scale, onto, silu, begin)  # type: ignore[no-any-return]


def fused(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> bool:
    """Whether `product` is one launch of the kernel; where something is to be differentiated it never is."""
    if scale is not None:
        return not torch.is_grad_enabled() and has_kernels(x.device, x.dtype)
    return _taken(x, weight, FEW) and measured(weight)


def measured(weight: Tensor) -> bool:
    """Whether it is a weight, in 16 bits and on a GPU, of a kind that the kernel was measured to read faster."""
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    return _known(weight.device) and has_kernels(weight.device, weight.dtype)


@cache
def _known(device: torch.device) -> bool:
    """Whether it was measured; AMD's GPUs have capabilities of their own under the same name."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == CAPABILITY


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    onto: Tensor | None = None,
    silu: bool = False,
    begin: int = 0,
) -> Tensor:
    """As `product`, by torch's product; differentiable.

    Weights in 8 bits are scaled before it: sums of unscaled ones exceed what float16 can hold.
    """
    if scale is not None:
        precise = torch.promote_types(x.dtype, scale.dtype)
        weight = (weight * scale[:, None].to(precise)).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    if begin:
        alone = nn.functional.linear(x, weight[:begin])
        rest = plain(x, weight[begin:], bias, onto=onto, silu=silu)
        return torch.cat((alone, rest), dim=-1)
    if bias is None or bias.numel() == len(weight):  # added by the product itself
        made = nn.functional.linear(x, weight, None if bias is None else bias.flatten())
    else:
        made = nn.functional.linear(x, weight) + bias
    if silu:
        return activated(made, onto=onto)
    return made if onto is None else onto + made


def _taken(x: Tensor, weight: Tensor, few: int) -> bool:
    some = 0 < x.numel() <= few * x.shape[-1]
    return some and x.dtype == weight.dtype and not torch.is_grad_enabled()


@torch.library.custom_op(
    "redrafter::product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? onto, bool silu, int begin) -> Tensor",
)
def _operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    onto: Tensor | None,
    silu: bool,
    begin: int,
) -> Tensor:
    """One opaque operator to torch.compile."""
    return _launched(x, weight, bias, scale, onto, silu, begin)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _launched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    onto: Tensor | None,
    silu: bool,
    begin: int,
) -> Tensor:
    from redrafter.kernels.triton import product as kernel

    with torch.cuda.device_of(x):  # a model may be spread over several
        return kernel.product(x, weight, bias, scale=scale, onto=onto, silu=silu, begin=begin)
