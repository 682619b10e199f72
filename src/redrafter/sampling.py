"""From logits to the token that is written: greedy, or sampled by known noise.

Sampling takes the largest of `logits + Gumbel noise`, which follows the softmax's law (the Gumbel-max trick), and the
noise is a function of a row's seed, the position and the token alone.  So a draw does not depend on how it was come by:
drafted text equals undrafted text token for token, in any batch.  Promises the law of transformers' own logits
processors for temperature, top-k, top-p and min-p, in its order.  Does not know trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from redrafter.errors import RedrafterError

SEEDS = 2**63
"""Seeds are below this."""


@dataclass(frozen=True)
class Draw:
    """How the tokens at `depths` successive positions of every row are chosen."""

    warpers: tuple[LogitsProcessor, ...]
    noise: Float[Tensor, "B depths V"] | None
    """None chooses greedily."""

    def choose(
        self, logits: Float[Tensor, "B N V"], depth: Int[Tensor, "B N"]
    ) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
        """The token after each node, which lies at `depth` of its tree, and its score.

        The score is not finite where the logits hold NaN or +inf, or nothing else than -inf.
        """
        scores, choice = self.scores(logits, depth).max(dim=-1)
        return choice, scores

    def scores(self, logits: Float[Tensor, "B N V"], depth: Int[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
        """What `choose` takes the largest of: logits, warped and with the noise of the node's depth added."""
        if self.noise is None:
            return logits
        rows = torch.arange(len(depth), device=depth.device)[:, None]
        return self.warp(logits) + self.noise[rows, depth]

    def warp(self, logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
        """Logits after temperature and truncation, in float32 at least."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.view(logits.shape)


@dataclass(frozen=True)
class Sampler:
    """The law of the draws.  Raises RedrafterError for impossible values, and for any that would go unheeded."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.do_sample:
            told = {"temperature": self.temperature != 1}
            told |= {name: getattr(self, name) is not None for name in ("top_k", "top_p", "min_p")}
            if any(told.values()):
                name = next(name for name, is_set in told.items() if is_set)
                raise RedrafterError(f"{name} means nothing in greedy decoding: ask for do_sample, or leave it out.")
            return
        if not self.temperature > 0:
            raise RedrafterError(f"The temperature must be positive to sample, not {self.temperature:g}.")
        if self.top_k is not None and self.top_k < 1:
            raise RedrafterError(f"top_k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RedrafterError(f"top_p must lie in (0, 1], not be {self.top_p:g}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise RedrafterError(f"min_p must lie in [0, 1], not be {self.min_p:g}.")

    def draw(self, seed: Int[Tensor, " B"], position: Int[Tensor, " B"], *, depths: int, vocabulary: int) -> Draw:
        """The draws at `position`, counted from the row's first token, and the `depths - 1` that follow."""
        if not self.do_sample:
            return Draw((), None)
        warpers: list[LogitsProcessor] = []  # the order is transformers'
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(float(self.min_p)))
        positions = position[:, None] + torch.arange(depths, device=position.device)
        return Draw(tuple(warpers), gumbel(seed, positions, vocabulary))


def gumbel(seed: Int[Tensor, " B"], position: Int[Tensor, "B D"], vocabulary: int) -> Float[Tensor, "B D V"]:
    """Standard Gumbel noise, a function of seed, position and token alone; float32, between -2.9 and 16.7.

    The 23 bits behind each value are the same on every device; the logarithms may differ in their last place.
    """
    first, second = _keys(seed, position)
    token = torch.arange(vocabulary, dtype=torch.int32, device=position.device)
    bits = token * _GOLDEN + first[..., None]
    _mix(bits, 16).mul_(-0x7A143595).add_(second[..., None])  # 0x85EBCA6B, murmur3's finalizer with a key in between
    _mix(bits, 13).mul_(-0x3D4D51CB)  # 0xC2B2AE35
    _mix(bits, 16).bitwise_right_shift_(9).bitwise_and_(0x7FFFFF)
    uniform = bits.float().add_(0.5).mul_(2**-23)  # exact, so never 0 nor 1
    return uniform.log_().neg_().log_().neg_()


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for every row: as told; from one seed by the row's number; or at random, by torch's own generator.

    Raises RedrafterError for negative seeds, too large ones and a wrong number of them.
    """
    if seed is None:
        seed = int(torch.randint(SEEDS - 1, ()))
    told = [seed] if isinstance(seed, int) else list(seed)
    if not all(0 <= one < SEEDS for one in told):
        raise RedrafterError(
            f"Seeds lie between 0 and 2**63 - 1; {next(s for s in told if not 0 <= s < SEEDS)} does not."
        )
    if not isinstance(seed, int):
        if len(told) != rows:
            raise RedrafterError(f"There are {rows} rows and {len(told)} seeds; give one seed, or one for each row.")
        return told
    high, low = _keys(torch.tensor([seed]), torch.arange(rows)[None])
    return [
        (h & 0x7FFFFFFF) << 32 | (one & 0xFFFFFFFF) for h, one in zip(high[0].tolist(), low[0].tolist(), strict=True)
    ]


_GOLDEN = -0x61C88647
"""0x9E3779B9, 2**32 over the golden ratio, as a signed number."""


def _mix(bits: Int[Tensor, "*batch"], shift: int) -> Int[Tensor, "*batch"]:
    """`bits ^= bits >> shift`, in place, without the sign."""
    high = bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)
    return bits.bitwise_xor_(high)


def _keys(seed: Int[Tensor, " B"], position: Int[Tensor, "B D"]) -> tuple[Int[Tensor, "B D"], Int[Tensor, "B D"]]:
    """Two 32-bit keys from 64 bits of seed and position."""
    z = _splitmix(_splitmix(seed)[:, None] + position)
    fold = 1 << 31  # the low 32 bits as a signed number
    high, low = (((half & 0xFFFFFFFF) ^ fold).sub(fold).int() for half in (z >> 32, z))
    return high, low


def _splitmix(z: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The finalizer of splitmix64 on 64-bit integers that wrap."""
    z = z - 0x61C8864680B583EB
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & 0x1FFFFFFFF)
