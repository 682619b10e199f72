"""From logits to the token that is written: processors, then the largest, with known noise where sampled.

Sampling takes the largest of `scores + Gumbel noise`, which follows the softmax's law (the Gumbel-max trick), and the
noise is a function of a row's seed, the position and the token alone.  So a draw does not depend on how it was come by:
drafted text equals undrafted text token for token, in any batch.  Processors are transformers' own objects, in its
order: those that heed nothing but the scores, and the repetition penalty, run over all nodes of the trees at once; any
other makes the walk lazy, node by node along the path, and sees the true text each time.  Does not know how trees are
made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import transformers as hf
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from redrafter.noise import gumbel
from redrafter.processors import Nucleus
from redrafter.tree import DraftTree

WARPERS = (
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    Nucleus,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
)
"""Processors that treat all tokens alike, so that a drafter can apply them to a vocabulary of its own."""

VECTORISED = (
    *WARPERS,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.RepetitionPenaltyLogitsProcessor,
)
"""Processors that run over all nodes at once."""


@dataclass(frozen=True)
class Draw:
    """What is known of the choices at successive positions before the target runs."""

    warpers: tuple[LogitsProcessor, ...]
    noise: Float[Tensor, "B depths V"] | None
    """None where decoding is greedy."""

    def warp(self, logits: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
        """Logits over any vocabulary after temperature and truncation, in float32 at least."""
        scores = precise(logits).flatten(0, -2)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.view(logits.shape)

    def ranking(
        self, coupled: bool = True, names: Int[Tensor, " head"] | None = None
    ) -> Callable[[Tensor, int], Tensor] | None:
        """How a drafter's logits after nodes of a depth become what it ranks by; None for as they are.

        Where the target samples, `coupled` to its noise or by the warpers alone; `names` as for `coupled`.
        """
        if self.noise is None:
            return None
        return partial(self.coupled, names=names) if coupled else lambda logits, _: self.warp(logits)

    def coupled(
        self, logits: Float[Tensor, "B beams head"], position: int, names: Int[Tensor, " head"] | None = None
    ) -> Float[Tensor, "B beams head"]:
        """A drafter's logits after nodes of depth `position`, with the warpers and the noise that the target will draw.

        So they rank first what it is about to draw.  `names`: the target's ids of the draft vocabulary, where it has
        its own.
        """
        assert self.noise is not None
        noise = self.noise[:, position]
        return self.warp(logits) + (noise if names is None else noise[:, names])[:, None]


@dataclass(frozen=True)
class Choice:
    """What the target writes after each node of a tree."""

    tokens: Int[Tensor, "B N"]
    """-1 after a node that the lazy walk did not come to."""
    sound: Int[Tensor, "B N"]
    """1 where the score that won is a number."""
    scores: Float[Tensor, "B N V"]
    """Logits after the processors, without noise; not defined after nodes that the lazy walk did not come to."""


@dataclass(frozen=True)
class Place:
    """Where trees stand: their rows' texts so far."""

    row: Int[Tensor, " B"]
    """The number of each row in its call."""
    seed: Int[Tensor, " B"]
    text: Int[Tensor, "B S"]
    """Tokens by position, the root of the tree included; what follows is not defined."""
    length: Int[Tensor, " B"]
    """Position of the root."""
    alive: Int[Tensor, " B"]

    @property
    def root(self) -> Int[Tensor, " B"]:
        """The last token, which the target chose and has not yet taken in."""
        return self.text.gather(1, self.length[:, None])[:, 0]


@dataclass(frozen=True)
class Sampler:
    """How the rows of one call are drawn; `processors` holds a list for each of them, or one for all.

    `ends` are the tokens after which, and `limits` the lengths of each row's text at which, nothing is chosen any more.
    """

    do_sample: bool = False
    processors: Sequence[Sequence[LogitsProcessor]] = ((),)
    ends: frozenset[int] = frozenset()
    limits: Sequence[int] = ()

    @property
    def lazy(self) -> bool:
        """Whether some processor needs the true text, node by node."""
        return not all(
            type(processor) in VECTORISED and getattr(processor, "prompt_ignore_length", None) is None
            for processor in self.processors[0]
        )

    def draw(self, place: Place, *, depths: int, vocabulary: int) -> Draw:
        """The draws after nodes of depth 0 to `depths - 1`."""
        if not self.do_sample:
            return Draw((), None)
        positions = place.length[:, None] + 1 + torch.arange(depths, device=place.length.device)
        warpers = tuple(p for p in self.processors[0] if type(p) in WARPERS)
        return Draw(warpers, gumbel(place.seed, positions, vocabulary))

    def choose(self, draw: Draw, tree: DraftTree, logits: Float[Tensor, "B N V"], place: Place) -> Choice:
        """The token after each node, or after each node of the path where the walk is lazy."""
        return (
            self._along_paths(draw, tree, logits, place) if self.lazy else self._everywhere(draw, tree, logits, place)
        )

    def _everywhere(self, draw: Draw, tree: DraftTree, logits: Float[Tensor, "B N V"], place: Place) -> Choice:
        scores = logits
        for processor in self.processors[0]:
            scores = precise(scores)
            if type(processor) is hf.RepetitionPenaltyLogitsProcessor:
                scores = penalised(scores, written(tree, place, scores.shape[-1]), processor.penalty)
            else:
                scores = processor(None, scores.flatten(0, 1)).view(logits.shape)
        drawn = scores
        if draw.noise is not None:
            rows = torch.arange(len(scores), device=scores.device)[:, None]
            drawn = precise(scores) + draw.noise[rows, tree.depth]
        best, tokens = drawn.max(dim=-1)
        return Choice(tokens, best.isfinite().long(), scores)

    def _along_paths(self, draw: Draw, tree: DraftTree, logits: Float[Tensor, "B N V"], place: Place) -> Choice:
        """Asks the device at every node: processors are called with the true text [1, T], once for each position."""
        scores = precise(logits).clone()
        alive = place.alive.tolist()
        tokens = torch.where(place.alive[:, None] == 1, -1, 0).expand(tree.tokens.shape).clone()
        sound = torch.ones_like(tokens)
        lengths, rows, consistent = place.length.tolist(), place.row.tolist(), tree.consistent().tolist()
        parents, drafted = tree.parents.tolist(), tree.tokens.tolist()
        for slot in (slot for slot in range(len(rows)) if alive[slot]):
            text = place.text[slot, : lengths[slot] + 1]
            children: dict[tuple[int, int], list[int]] = defaultdict(list)
            for n in range(1, tree.size):
                if consistent[slot][n]:
                    children[parents[slot][n], drafted[slot][n]].append(n)
            processors = self.processors[rows[slot] if len(self.processors) > 1 else 0]
            nodes, depth = [0], 0  # equal siblings, and below them their children, stand for one path
            while nodes:
                score = scores[slot, nodes[:1]]
                for processor in processors:
                    score = processor(text[None], score)
                scores[slot, nodes] = score[0]
                drawn = score[0] if draw.noise is None else score[0] + draw.noise[slot, depth]
                best, token = drawn.max(dim=-1)
                tokens[slot, nodes], sound[slot, nodes] = token, best.isfinite().long()
                text = torch.cat((text, token[None]))
                if int(token) in self.ends or (self.limits and len(text) >= self.limits[rows[slot]]):
                    break
                nodes, depth = [n for node in nodes for n in children[node, int(token)]], depth + 1
        return Choice(tokens, sound, scores)


def written(tree: DraftTree, place: Place, vocabulary: int) -> Bool[Tensor, "B N V"]:
    """True where a token stands in a row's text up to a node, the node itself included."""
    index = torch.arange(place.text.shape[1], device=place.text.device)
    root = tree.tokens[:, :1]
    text = torch.where(index <= place.length[:, None], place.text, root)  # the root always stands there
    seen = torch.zeros((len(text), vocabulary), dtype=torch.bool, device=text.device).scatter_(1, text, True)
    above = torch.where(tree.ancestors, tree.tokens[:, None], root[..., None])
    return seen[:, None].expand(-1, tree.size, -1).clone().scatter_(2, above, True)


def penalised(scores: Float[Tensor, "B N V"], seen: Bool[Tensor, "B N V"], penalty: float) -> Float[Tensor, "B N V"]:
    """The repetition penalty of arXiv 1909.05858, section 4.1, in the form that transformers gives it."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def precise(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 at least, as transformers has scores."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
