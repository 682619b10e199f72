"""From logits to the target's tokens: processors, then the largest score, plus seeded noise when sampling.

Sampling takes the largest of `scores + Gumbel noise`, which has the softmax distribution (the Gumbel-max trick).  The
noise is a function of a row's seed, the position and the token alone, so a sample does not depend on how it was
computed: drafted text equals undrafted text token by token, in any batch.  Processors are transformers' own objects in
its order. Those that only look at scores, and the repetition penalty, run over all nodes of the trees at once; any
other requires a lazy walk, node by node along the accepted path, so that it sees the true text.  Does not know how
trees are made.
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
"""Processors that treat all tokens alike, so that a drafter can apply them to its own vocabulary."""

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
    """The target's token after each node of a tree."""

    tokens: Int[Tensor, "B N"]
    """-1 after nodes that the lazy walk did not visit."""
    is_finite: Int[Tensor, "B N"]
    """1 if the largest score is finite."""
    scores: Float[Tensor, "B N V"]
    """Logits after the processors, without noise; undefined after nodes that the lazy walk did not visit."""


@dataclass(frozen=True)
class Sampler:
    """How the rows of one call are sampled.

    `processors` holds one list per row, or one list for all rows.  `ends` are the end tokens, `limits` the maximum text
    length of each row; the lazy walk stops at both.
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

    def noise(self, rows: RowState, *, depths: int, vocabulary: int) -> SamplingNoise:
        """The noise after nodes of depth 0 to `depths - 1`."""
        if not self.do_sample:
            return SamplingNoise((), None)
        positions = rows.length[:, None] + 1 + torch.arange(depths, device=rows.length.device)
        warpers = tuple(processor for processor in self.processors[0] if type(processor) in WARPERS)
        return SamplingNoise(warpers, gumbel(rows.seed, positions, vocabulary))

    def choose(
        self, noise: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], rows: RowState
    ) -> TargetTokens:
        """The target's token after each node; with a lazy walk, after each node of the accepted path."""
        choose = self._walk if self.lazy else self._vectorised
        return choose(noise, tree, logits, rows)

    def _vectorised(
        self, noise: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], rows: RowState
    ) -> TargetTokens:
        scores = logits
        for processor in self.processors[0]:
            scores = precise(scores)
            if type(processor) is hf.RepetitionPenaltyLogitsProcessor:
                scores = penalised(scores, written(tree, rows, scores.shape[-1]), processor.penalty)
            else:
                scores = processor(None, scores.flatten(0, 1)).view(logits.shape)
        noisy = scores
        if noise.gumbel is not None:
            index = torch.arange(len(scores), device=scores.device)[:, None]
            noisy = precise(scores) + noise.gumbel[index, tree.depth]
        best, tokens = noisy.max(dim=-1)
        return TargetTokens(tokens, best.isfinite().long(), scores)

    def _walk(
        self, noise: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], rows: RowState
    ) -> TargetTokens:
        """Calls processors with the true text [1, T], once per position.  Synchronizes with the device at each node."""
        scores = precise(logits).clone()
        alive = rows.alive.tolist()
        tokens = torch.where(rows.alive[:, None] == 1, -1, 0).expand(tree.tokens.shape).clone()
        is_finite = torch.ones_like(tokens)
        lengths, numbers, consistent = rows.length.tolist(), rows.row.tolist(), tree.consistent().tolist()
        parents, drafted = tree.parents.tolist(), tree.tokens.tolist()
        for slot in (slot for slot in range(len(numbers)) if alive[slot]):
            text = rows.text[slot, : lengths[slot] + 1]
            children: dict[tuple[int, int], list[int]] = defaultdict(list)
            for n in range(1, tree.size):
                if consistent[slot][n]:
                    children[parents[slot][n], drafted[slot][n]].append(n)
            processors = self.processors[numbers[slot] if len(self.processors) > 1 else 0]
            nodes, depth = [0], 0  # equal siblings, and their children, represent one path
            while nodes:
                score = scores[slot, nodes[:1]]
                for processor in processors:
                    score = processor(text[None], score)
                scores[slot, nodes] = score[0]
                noisy = score[0] if noise.gumbel is None else score[0] + noise.gumbel[slot, depth]
                best, token = noisy.max(dim=-1)
                tokens[slot, nodes], is_finite[slot, nodes] = token, best.isfinite().long()
                text = torch.cat((text, token[None]))
                if int(token) in self.ends or (self.limits and len(text) >= self.limits[numbers[slot]]):
                    break
                nodes, depth = [n for node in nodes for n in children[node, int(token)]], depth + 1
        return TargetTokens(tokens, is_finite, scores)


def written(tree: DraftTree, rows: RowState, vocabulary: int) -> Bool[Tensor, "B N V"]:
    """Marks the tokens that occur in a row's text up to and including a node."""
    index = torch.arange(rows.text.shape[1], device=rows.text.device)
    root = tree.tokens[:, :1]
    text = torch.where(index <= rows.length[:, None], rows.text, root)  # the root always occurs
    seen = torch.zeros((len(text), vocabulary), dtype=torch.bool, device=text.device).scatter_(1, text, True)
    path = torch.where(tree.ancestors, tree.tokens[:, None], root[..., None])
    return seen[:, None].expand(-1, tree.size, -1).clone().scatter_(2, path, True)


def penalised(scores: Float[Tensor, "B N V"], seen: Bool[Tensor, "B N V"], penalty: float) -> Float[Tensor, "B N V"]:
    """The repetition penalty of arXiv 1909.05858, section 4.1, as transformers defines it."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
