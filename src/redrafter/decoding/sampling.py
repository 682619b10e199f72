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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers as hf
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from redrafter.core.noise import gumbel
from redrafter.core.rows import RowState, SamplingNoise, precise
from redrafter.core.tree import DraftTree
from redrafter.decoding.processors import Nucleus

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
class TargetTokens:
    """What the target writes after each node of a tree."""

    tokens: Int[Tensor, "B N"]
    """-1 after a node that the lazy walk did not come to."""
    is_finite: Int[Tensor, "B N"]
    """1 where the score that won is a number."""
    scores: Float[Tensor, "B N V"]
    """Logits after the processors, without noise; not defined after nodes that the lazy walk did not come to."""


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

    def draw(self, place: RowState, *, depths: int, vocabulary: int) -> SamplingNoise:
        """The draws after nodes of depth 0 to `depths - 1`."""
        if not self.do_sample:
            return SamplingNoise((), None)
        positions = place.length[:, None] + 1 + torch.arange(depths, device=place.length.device)
        warpers = tuple(p for p in self.processors[0] if type(p) in WARPERS)
        return SamplingNoise(warpers, gumbel(place.seed, positions, vocabulary))

    def choose(
        self, draw: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], place: RowState
    ) -> TargetTokens:
        """The token after each node, or after each node of the path where the walk is lazy."""
        return (
            self._along_paths(draw, tree, logits, place) if self.lazy else self._everywhere(draw, tree, logits, place)
        )

    def _everywhere(
        self, draw: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], place: RowState
    ) -> TargetTokens:
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
        return TargetTokens(tokens, best.isfinite().long(), scores)

    def _along_paths(
        self, draw: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], place: RowState
    ) -> TargetTokens:
        """Asks the device at every node: processors are called with the true text [1, T], once for each position."""
        scores = precise(logits).clone()
        alive = place.alive.tolist()
        tokens = torch.where(place.alive[:, None] == 1, -1, 0).expand(tree.tokens.shape).clone()
        is_finite = torch.ones_like(tokens)
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
                tokens[slot, nodes], is_finite[slot, nodes] = token, best.isfinite().long()
                text = torch.cat((text, token[None]))
                if int(token) in self.ends or (self.limits and len(text) >= self.limits[rows[slot]]):
                    break
                nodes, depth = [n for node in nodes for n in children[node, int(token)]], depth + 1
        return TargetTokens(tokens, is_finite, scores)


def written(tree: DraftTree, place: RowState, vocabulary: int) -> Bool[Tensor, "B N V"]:
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
