"""From logits to the target's tokens: processors, then the largest score, plus seeded noise when sampling.

Sampling takes the largest of `scores + Gumbel noise`, which has the softmax distribution (the Gumbel-max trick).  The
noise is a function of a row's seed, the position and the token alone, so a sample does not depend on how it was
computed: drafted text equals undrafted text token by token, in any batch.  Common settings are tensors with one entry
per row, applied to all nodes of all trees at once (`core.warping`).  Other settings are transformers' own processors:
those that look at scores alone run over all nodes of their rows; any other requires a walk, node by node along the
accepted path, so that it sees the true text.  Does not know how trees are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import transformers as hf
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from redrafter.core.noise import gumbel
from redrafter.core.rows import NO_FEATURES, Features, RowSettings, RowState, SamplingNoise, precise
from redrafter.core.tree import DraftTree
from redrafter.core.warping import with_occurrence_penalty, with_repetition_penalty

WARPERS = (
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
)
"""Processors that treat all tokens alike, so that a drafter can apply them to its own vocabulary."""

OF_SCORES = (
    *WARPERS,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)
"""Processors that look at scores alone."""


@dataclass(eq=False)
class RowProcessors:
    """All of a row's processors, if some of its settings are not tensors.  Rows may share one object."""

    processors: tuple[LogitsProcessor, ...]
    ends: frozenset[int] = frozenset()
    """End tokens, where the walk stops."""
    limit: int | None = None
    """Number of tokens of the longest possible text, where the walk stops too."""
    error: Exception | None = None
    """What a processor raised in the walk.  The row has no valid token from then on."""

    @property
    def lazy(self) -> bool:
        """Whether some processor needs the true text, node by node."""
        return not all(type(processor) in OF_SCORES for processor in self.processors)


@dataclass(frozen=True)
class TargetTokens:
    """The target's token after each node of a tree."""

    tokens: Int[Tensor, "B N"]
    """-1 after nodes that the walk did not visit."""
    is_finite: Int[Tensor, "B N"]
    """1 if the largest score is finite."""
    scores: Float[Tensor, "B N V"]
    """Logits after the processors, without noise; undefined after nodes that the walk did not visit."""


@dataclass(frozen=True)
class Sampler:
    """How the rows of one step are sampled: by their `RowSettings`, or by processors."""

    features: Features = NO_FEATURES
    shared: RowProcessors | None = None
    """Processors of all rows, which look at scores alone."""
    own: Mapping[int, RowProcessors] = field(default_factory=dict)
    """Processors of single rows, by slot."""

    @property
    def synchronizes(self) -> bool:
        """Whether a step cannot be captured: rows differ in ways that only the host knows, or are walked."""
        return bool(self.own)

    def noise(self, rows: RowState, *, depths: int, vocabulary: int) -> SamplingNoise:
        """The noise after nodes of depth 0 to `depths - 1`."""
        if not self.features.sampling or rows.settings is None:
            return SamplingNoise(None, self.features, rows.settings)
        positions = rows.length[:, None] + 1 + torch.arange(depths, device=rows.length.device)
        noise = gumbel(rows.seed, positions, vocabulary).mul_(rows.settings.sampled[:, None, None])
        shared = () if self.shared is None else self.shared.processors
        warpers = tuple(processor for processor in shared if type(processor) in WARPERS)
        return SamplingNoise(noise, self.features, rows.settings, warpers)

    def choose(
        self, noise: SamplingNoise, tree: DraftTree, logits: Float[Tensor, "B N V"], rows: RowState
    ) -> TargetTokens:
        """The target's token after each node; for rows that are walked, after each node of the accepted path."""
        scores = self._scores(tree, logits, rows)
        noisy = scores
        if noise.gumbel is not None:
            index = torch.arange(len(scores), device=scores.device)[:, None]
            noisy = precise(scores) + noise.gumbel[index, tree.depth]
        best, tokens = noisy.max(dim=-1)
        choice = TargetTokens(tokens, best.isfinite().long(), scores)
        lazy = {slot: one for slot, one in self.own.items() if one.lazy and slot < len(scores)}
        if lazy:
            lengths, consistent = rows.length.tolist(), tree.consistent().tolist()
            parents, drafted = tree.parents.tolist(), tree.tokens.tolist()
            for slot, processors in lazy.items():
                children: dict[tuple[int, int], list[int]] = defaultdict(list)
                for n in range(1, tree.size):
                    if consistent[slot][n]:
                        children[parents[slot][n], drafted[slot][n]].append(n)
                text = rows.text[slot, : lengths[slot] + 1]
                _walk(slot, processors, noise, precise(logits[slot]), text, children, choice)
        return choice

    def _scores(self, tree: DraftTree, logits: Float[Tensor, "B N V"], rows: RowState) -> Float[Tensor, "B N V"]:
        """The logits after the processors of all rows that are not walked."""
        if self.shared is not None:
            return _processed(self.shared, logits)
        scores = logits
        if rows.settings is not None and self.features != NO_FEATURES:
            scores = _with_settings(self.features, rows.settings, tree, precise(logits), rows)
        if self.own:
            scores = precise(scores).clone()
        for slot, processors in self.own.items():
            if not processors.lazy and slot < len(scores):
                scores[slot] = _processed(processors, logits[slot : slot + 1])[0]
        return scores


def _processed(processors: RowProcessors, logits: Float[Tensor, "B N V"]) -> Float[Tensor, "B N V"]:
    scores = precise(logits).flatten(0, 1)
    for processor in processors.processors:
        scores = processor(None, scores)
    return scores.view(logits.shape)


def _with_settings(
    features: Features, settings: RowSettings, tree: DraftTree, scores: Float[Tensor, "B N V"], rows: RowState
) -> Float[Tensor, "B N V"]:
    """Bias, penalties, temperature and truncation, in transformers' order."""
    if features.bias and settings.bias is not None:
        scores = scores + settings.bias[:, None].to(scores.dtype)
    if features.penalties:
        seen, count = occurrences(tree, rows, settings.prompt, scores)
        scores = with_repetition_penalty(scores, seen, settings.repetition)
        scores = with_occurrence_penalty(scores, count, settings.presence, settings.frequency)
    return features.warp(scores, settings)


def _walk(
    slot: int,
    processors: RowProcessors,
    noise: SamplingNoise,
    scores: Float[Tensor, "N V"],
    text: Int[Tensor, " T"],
    children: Mapping[tuple[int, int], list[int]],
    choice: TargetTokens,
) -> None:
    """Chooses a row's tokens along the accepted path, calling processors with the true text [1, T], once per position.

    Synchronizes with the device at each node.  `children` maps a node and a token to the nodes that hold it.
    """
    choice.tokens[slot] = -1
    nodes, depth = [0], 0  # equal siblings, and their children, represent one path
    while nodes:
        score = scores[nodes[:1]]
        try:
            for processor in processors.processors:
                score = processor(text[None], score)
        except Exception as error:  # of any kind: it ends this row alone
            processors.error = error
            return
        choice.scores[slot, nodes] = score[0].to(choice.scores.dtype)
        noisy = score[0] if noise.gumbel is None else score[0] + noise.gumbel[slot, depth]
        best, token = noisy.max(dim=-1)
        choice.tokens[slot, nodes], choice.is_finite[slot, nodes] = token, best.isfinite().long()
        text = torch.cat((text, token[None]))
        if int(token) in processors.ends or (processors.limit is not None and len(text) >= processors.limit):
            return
        nodes, depth = [n for node in nodes for n in children.get((node, int(token)), ())], depth + 1


def occurrences(
    tree: DraftTree, rows: RowState, prompt: Int[Tensor, " B"], like: Float[Tensor, "B N V"]
) -> tuple[Bool[Tensor, "B N V"], Float[Tensor, "B N V"]]:
    """Whether each token occurs in a row's text up to and including a node, and how often among its new tokens."""
    index = torch.arange(rows.text.shape[1], device=rows.text.device)
    written = index <= rows.length[:, None]
    text = torch.where(written, rows.text, 0)
    new = like.new_zeros((len(like), like.shape[-1]))
    old = new.scatter_add(1, text, (written & (index < prompt[:, None])).to(like.dtype))
    new = new.scatter_add(1, text, (written & (index >= prompt[:, None])).to(like.dtype))
    below_root = tree.ancestors.to(like.dtype)
    below_root = torch.cat((torch.zeros_like(below_root[..., :1]), below_root[..., 1:]), dim=2)
    drafted = tree.tokens[:, None].expand(-1, tree.size, -1)
    count = new[:, None].expand(-1, tree.size, -1).scatter_add(2, drafted, below_root)
    return (count > 0) | (old > 0)[:, None], count
