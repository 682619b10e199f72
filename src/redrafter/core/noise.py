"""Seeded noise: a function of a row's seed, a position and a token.

Guarantees standard Gumbel noise from a counter-based hash in integer operations, with the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.errors import RedrafterError

SEEDS = 2**63
"""Seeds are below this."""


def gumbel(
    seed: Int[Tensor, " B"],
    position: Int[Tensor, "B D"],
    vocabulary: int,
    tokens: Int[Tensor, " V"] | None = None,
) -> Float[Tensor, "B D V"]:
    """Standard Gumbel noise in float32, between -2.8 and 22.2, for all tokens of a vocabulary or only for `tokens`.

    The value is `-log(E)` of an exponential variable `E = -log(1 - v)`, where `v` is a multiple of 2**-32 in (0, 1].
    The largest noise comes from the smallest `v`, which have full resolution: `v` is split into 23 high bits, whose
    logarithm is exact if they are 0, and 9 low bits, which are added to `E` (`log1p` takes three times as long on a
    CPU).  The 32 bits are the same on every device; the logarithms may differ in their last place.  `docs/exactness.md`
    bounds the distance from the softmax distribution.
    """
    first, second = _keys(seed, position)
    token = torch.arange(vocabulary, dtype=torch.int32, device=position.device) if tokens is None else tokens.int()
    bits = token * _GOLDEN + first[..., None]
    _mix(bits, 16).mul_(-0x7A143595).add_(second[..., None])  # 0x85EBCA6B, murmur3's finalizer with a key in between
    _mix(bits, 13).mul_(-0x3D4D51CB)  # 0xC2B2AE35
    _mix(bits, 16)
    high = bits.bitwise_right_shift(9).float()  # integers from -2**22 to 2**22 - 1
    exponential = torch.rsub(high, 0.5, alpha=2**-23).log_().neg_()  # -log(1 - h / 2**23), exact before the logarithm
    exponential.add_(bits.bitwise_or_(-512).float(), alpha=-(2**-32))  # 1 to 512 times 2**-32
    return exponential.log_().neg_()


def row_seeds(seed: SupportsIndex | Sequence[int] | None, rows: int) -> list[int]:
    """One seed per row: as given, derived from one seed and the row's number, or from torch's generator.

    Raises RedrafterError for seeds out of range and for a wrong number of seeds.
    """
    if seed is None:
        seed = int(torch.randint(SEEDS - 1, ()))
    try:
        seeds = [index(one) for one in (seed if isinstance(seed, Sequence) else [seed])]
    except TypeError:
        raise RedrafterError(f"Seeds are integers, one or a list with one for each row, not {seed!r}.") from None
    if not all(0 <= one < SEEDS for one in seeds):
        raise RedrafterError(
            f"Seeds lie between 0 and 2**63 - 1; {next(s for s in seeds if not 0 <= s < SEEDS)} does not."
        )
    if isinstance(seed, Sequence):
        if len(seeds) != rows:
            raise RedrafterError(f"There are {rows} rows and {len(seeds)} seeds; pass one seed, or one for each row.")
        return seeds
    high, low = _keys(torch.tensor(seeds), torch.arange(rows)[None])
    return [
        (h & 0x7FFFFFFF) << 32 | (one & 0xFFFFFFFF) for h, one in zip(high[0].tolist(), low[0].tolist(), strict=True)
    ]


_GOLDEN = -0x61C88647
"""0x9E3779B9, 2**32 divided by the golden ratio, as a signed integer."""


def _mix(bits: Int[Tensor, "*batch"], shift: int) -> Int[Tensor, "*batch"]:
    """`bits ^= bits >> shift` in place, with a logical shift."""
    high = bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
    return bits.bitwise_xor_(high)


def _keys(seed: Int[Tensor, " B"], position: Int[Tensor, "B D"]) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """Two 32-bit keys from 64 bits of seed and position."""
    z = _splitmix(_splitmix(seed)[:, None] + position)
    sign = 1 << 31  # to convert the low 32 bits to a signed integer
    high, low = (((half & 0xFFFFFFFF) ^ sign).sub(sign).int() for half in (z >> 32, z))
    return high, low


def _splitmix(z: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The finalizer of splitmix64 on 64-bit integers that wrap."""
    z = z - 0x61C8864680B583EB
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 0x1FFFFFFFF)
