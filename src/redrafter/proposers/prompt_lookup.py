"""Prompt lookup: drafts what followed earlier occurrences of the text's last tokens (Saxena 2023).

After https://github.com/apoorvumang/prompt-lookup-decoding (`prompt_lookup_num_tokens` in transformers), alone or
merged into the trees of another proposer.  Several earlier places are used, those that match most tokens first.  All
rows are searched at once, without synchronizing with the device.  Needs no model, memory or training.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redrafter.core.cache import SlotCache
from redrafter.core.continuations import NGRAM, Continuations, continuations
from redrafter.core.merging import merged
from redrafter.core.rows import PromptChunk, RowState, SamplingNoise
from redrafter.core.shapes import LOOKUP_CHAINS, LOOKUP_LENGTH, DraftShape
from redrafter.core.tree import DraftTree, chain
from redrafter.errors import RedrafterError
from redrafter.proposers.base import Proposer
from redrafter.targets.target import Target

LEAST_ON_CPU = 0.05
"""Least probability of a found node on a CPU, where every node costs time.  `docs/log.md` has the measurement."""


@dataclass(frozen=True)
class PromptLookup:
    """Looks up the last `ngram` tokens, or fewer, in the text before them.  Drafts a chain of ten tokens by default.

    A `beam_width` above 1 drafts the tree of that many continuations; a `node_budget` keeps the most probable nodes.
    """

    ngram: int = NGRAM
    layers: tuple[int, ...] = ()
    least: float = 0.0
    """Tokens with a smaller estimated probability are not drafted."""

    def shape(self, batch: int) -> DraftShape:
        """One beam, for every batch size."""
        return DraftShape(beam_width=1, beam_length=LOOKUP_LENGTH)

    def proposer(self, target: Target, shape: DraftShape) -> LookupProposer | None:
        """A proposer of that shape; None for a length of 0.  Raises RedrafterError for a bad `ngram` or shape."""
        if not 1 <= self.ngram <= NGRAM:
            raise RedrafterError(f"ngram must lie between 1 and {NGRAM}, not {self.ngram}.")
        if shape.lookup:
            raise RedrafterError("Prompt lookup drafts what it finds in the text already: leave out lookup.")
        if not shape.beam_length:
            return None
        size = 1 + shape.beam_width * shape.beam_length
        return LookupProposer(
            None,
            length=shape.beam_length,
            size=min(size, shape.node_budget or size),
            chains=shape.beam_width,
            ngram=self.ngram,
            least=self.least,
        )


class LookupProposer(Proposer):
    """Drafts continuations found in the text, merged into the trees of another proposer if there is one.

    The tree holds the most probable nodes of both.  The other proposer must return `log_probs` and expect texts to grow
    by up to `length + 1` tokens in a step.
    """

    def __init__(
        self,
        inner: Proposer | None,
        *,
        length: int,
        size: int,
        lookup: int | None = None,
        chains: int = LOOKUP_CHAINS,
        ngram: int = NGRAM,
        least: float = 0.0,
    ):
        """`lookup`: tokens of each of the `chains` continuations; default `length`.

        Found nodes with a probability below `least` are left out.
        """
        self.inner, self.length, self.size = inner, length, size
        self.lookup, self.chains, self.ngram, self.least = lookup or length, chains, ngram, least
        if inner is not None:
            self.positions, self.modules = inner.positions, inner.modules

    def memory(self, *, batch: int, slots: int) -> SlotCache | None:
        """That of the other proposer."""
        return None if self.inner is None else self.inner.memory(batch=batch, slots=slots)

    def read(self, memory: SlotCache | None, chunk: PromptChunk, states: Float[Tensor, "V N state"]) -> None:
        """As the other proposer."""
        if self.inner is not None:
            self.inner.read(memory, chunk, states)

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Trees of the most probable nodes.  Raises RedrafterError if the other proposer's have no `log_probs`.

        On a CPU, where trees are trimmed, found nodes with a probability below LEAST_ON_CPU are left out.
        """
        on_cpu = rows.text.device.type == "cpu"
        least = max(self.least, LEAST_ON_CPU) if on_cpu else self.least
        sampled = None if rows.settings is None else rows.settings.sampled
        found = continuations(
            rows.text, rows.length, count=self.chains, length=self.lookup, ngram=self.ngram, sampled=sampled
        )
        if self.inner is None and self.chains == 1:
            return _chain(rows.root, found, size=self.size, least=least)
        if self.inner is None:
            tree = chain(rows.root[:, None])
            tree = replace(tree, log_probs=torch.zeros_like(tree.tokens, dtype=torch.float32))
        else:
            tree = self.inner.propose(memory, rows, context, noise)
            if tree.log_probs is None:
                raise RedrafterError(
                    f"{type(self.inner).__name__} returns trees without log_probs, which lookup needs: switch it off."
                )
        return merged(tree, found, size=self.size, max_depth=self.length, least=least)

    def prepare(self) -> Proposer:
        """With the other proposer prepared."""
        prepared = None if self.inner is None else self.inner.prepare()
        if prepared is self.inner:
            return self
        changed = copy(self)
        changed.inner, changed.modules = prepared, () if prepared is None else prepared.modules
        return changed


def _chain(root: Int[Tensor, " B"], found: Continuations, *, size: int, least: float) -> DraftTree:
    """The best continuation up to `size - 1` tokens, as far as its probability is at least `least`.

    The same as `merged` with the root alone, in fewer operations.
    """
    tokens = torch.cat((root[:, None], found.tokens[:, 0, : size - 1]), dim=1)
    probable = found.log_probs[:, 0, : size - 1]
    valid = probable >= math.log(least) if least else probable > -math.inf
    return chain(tokens, torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1))


def with_lookup(proposer: Proposer, shape: DraftShape) -> Proposer:
    """A proposer that also drafts `shape.lookup` tokens of continuations; the same one if that is 0.

    `proposer` drafts in this shape and returns trees with `log_probs`.
    """
    if not shape.lookup:
        return proposer
    size = proposer.size + shape.lookup
    if shape.node_budget:
        size = min(shape.node_budget, proposer.size + LOOKUP_CHAINS * shape.lookup)
    lookup = min(shape.lookup, size - 1)
    return LookupProposer(proposer, length=max(shape.beam_length, lookup), size=size, lookup=lookup)
