"""Medusa heads: each reads the target's last hidden state and scores one token ahead, whatever comes between.

Paper: arXiv 2401.10774, section 2.1; its trees, section 2.3.3.  The guaranteed token is the target's own choice, so
head k scores the k-th token after it, from the state that chose it.  Promises one definition of the scores (`logits`),
which training and drafting both call.  Does not know the target's forward pass.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from redrafter.core.shapes import MOST_NODES, counted
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.heads.config import HeadConfig, flat
from redrafter.heads.recurrent import ResidualBlock
from redrafter.targets.isolation import isolated

if TYPE_CHECKING:
    from redrafter.proposers.medusa import MedusaProposer
    from redrafter.targets.target import Target

NODES = 64
"""Of a fitted tree, as published."""


class MedusaConfig(HeadConfig):
    """Shape, origin and decoding defaults of Medusa heads.

    Head k of `heads` scores the k-th token after the guaranteed one, through `blocks` residual blocks.  `tree` holds
    the paths that are drafted, each node by its path from the root: at depth k the rank of a token among those that
    head k scores, 0 the best.  Paths stand in the order of their worth, so that the first N - 1 of them are the tree of
    N nodes.  `ranks` says how many of each head's best tokens may be in it, and `fitted_on` what it was fitted on.  Of
    the tree are drafted the paths of at most `beam_length` tokens, all of them of a rank below `beam_width`, and with a
    `node_budget` the first of those.
    """

    kind: ClassVar[str] = "Medusa heads"

    model_type: Literal["medusa_heads"] = "medusa_heads"
    heads: PositiveInt
    blocks: NonNegativeInt = 1
    ranks: tuple[PositiveInt, ...]
    tree: tuple[tuple[NonNegativeInt, ...], ...]
    fitted_on: str | None = None

    @model_validator(mode="after")
    def _is_a_tree(self) -> Self:
        if self.beam_length > self.heads or any(shape.beam_length > self.heads for shape in self.shapes):
            raise ValueError(f"{self.heads} heads cannot draft more tokens than they are")
        if len(self.ranks) != self.heads or max(self.ranks) > self.head_size:
            raise ValueError(f"ranks must say for each of {self.heads} heads how many tokens it may draft")
        if not 0 < len(self.tree) < MOST_NODES:
            raise ValueError(f"a tree must have from 2 to {MOST_NODES:,} nodes")
        known: set[tuple[int, ...]] = {()}
        for path in self.tree:
            if path in known or path[:-1] not in known:
                raise ValueError(f"path {list(path)} must stand once, and after the path that it continues")
            if len(path) > self.heads or any(rank >= most for rank, most in zip(path, self.ranks, strict=False)):
                raise ValueError(f"path {list(path)} asks for a rank that its head does not draft")
            known.add(path)
        return self

    @property
    def weights_in_words(self) -> str:
        """Heads and blocks."""
        return f"{self.heads} heads of {counted(self.blocks, 'block')}"

    @property
    def head_in_words(self) -> str:
        """Heads, blocks and what is drafted."""
        return f"{self.weights_in_words}, draft {self.drafted_in_words}"

    @property
    def shape_in_words(self) -> str:
        """Nodes, depth, and whence."""
        fitted = f", fitted on {self.fitted_on}" if self.fitted_on else ", not fitted"
        nodes = 1 + len(drawn_from(self.tree, self.beam_width, self.beam_length, self.node_budget))
        return f"a tree of {nodes} nodes, {self.beam_length} deep{fitted}"

    def to_json(self) -> str:
        """The text of `config.json`, each path of the tree on one line."""
        return flat(super().to_json())


def drawn_from(
    tree: tuple[tuple[int, ...], ...], width: int, length: int, budget: int | None
) -> tuple[tuple[int, ...], ...]:
    """The paths of a tree that are drafted in some shape, in their order."""
    kept = tuple(path for path in tree if len(path) <= length and max(path) < width)
    return kept if budget is None else kept[: budget - 1]


class MedusaHeads(Head):
    """The heads' weights and the tree that is drafted with them."""

    by_beams = False
    config: MedusaConfig
    config_type = MedusaConfig

    def __init__(self, config: MedusaConfig):
        """Blocks that change nothing yet, and random output layers, of the shape that `config` says."""
        super().__init__(config)
        size = config.hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(ResidualBlock(size) for _ in range(config.blocks)), nn.Linear(size, config.head_size, bias=False)
            )
            for _ in range(config.heads)
        )
        for block in (module for module in self.modules() if isinstance(module, ResidualBlock)):
            for parameter in block.linear.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def fresh(
        cls,
        model: nn.Module,
        *,
        heads: int = 4,
        blocks: int = 1,
        draft_vocabulary: Int[Tensor, " draft"] | None = None,
        nodes: int = NODES,
        ranks: Sequence[int] | None = None,
        beam_width: int = 10,
        node_budget: int | None = None,
    ) -> MedusaHeads:
        """Heads for a target that all score as the target itself does, on its device, in float32.

        Their tree is for accuracies that are guessed until it is fitted (`redrafter.training.fitting.fit`): `nodes` of
        it, of each head's `beam_width` best tokens; or with `ranks`, one for each head, the Cartesian product of so
        many best tokens of each.  `draft_vocabulary`: ids of the target's vocabulary that may be drafted, all of them
        by default.  Raises RedrafterError where that cannot be.
        """
        from redrafter.targets.target import Target

        target = Target(model)
        size = target.vocab_size if draft_vocabulary is None else len(draft_vocabulary)
        if ranks is not None:
            nodes = cartesian_nodes(ranks, heads)
        _check_size(nodes)
        most = tuple(min(size, rank) for rank in ranks or [beam_width] * heads)
        made = cls(
            MedusaConfig(
                vocab_size=target.vocab_size,
                hidden_size=target.hidden_size,
                draft_vocab_size=None if draft_vocabulary is None else size,
                target=target.name,
                target_revision=target.revision,
                target_fingerprint=target.fingerprint() or None,
                beam_width=max(most),
                beam_length=heads,
                node_budget=node_budget,
                heads=heads,
                blocks=blocks,
                ranks=most,
                tree=fit_tree([[0.6 ** (k + 1) / (r + 1) ** 2 for r in range(m)] for k, m in enumerate(most)], nodes),
            )
        ).to(target.device)
        if draft_vocabulary is not None:
            made.draft_only(draft_vocabulary, target)
        with torch.no_grad():  # by columns, so that it holds for any layer that is linear
            basis = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
            weight = (target.logits(basis) - target.logits(torch.zeros_like(basis[:1]))).T
            weight = weight if made.draft_vocabulary is None else weight[made.draft_vocabulary]
            for head in made.heads:
                head[-1].weight.copy_(weight)  # type: ignore[index]
        return made

    def logits(
        self, hidden: Float[Tensor, "*batch hidden"], heads: int | None = None
    ) -> Float[Tensor, "*batch heads head"]:
        """Scores over the draft vocabulary of the first, second, … token after the guaranteed one, by so many heads.

        `hidden` is what the target's output head read where it chose the guaranteed token.
        """
        return torch.stack([head(hidden) for head in self.heads[:heads]], dim=-2)

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """As `Head.unrolled`; no head hears of the tokens before its own."""
        return self.logits(features, embeddings.shape[1])

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> MedusaProposer | None:
        """What drafts so for a target; None for a length of 0.

        Raises RedrafterError where the heads were made for another model, are elsewhere or cannot draft so.
        """
        from redrafter.proposers.medusa import MedusaProposer

        self.check(target, width, length, budget)
        if length > self.config.heads:
            raise RedrafterError(f"beam_length must be at most {self.config.heads}, as there are heads, not {length}.")
        return MedusaProposer(isolated(self), width, length, budget) if length else None


def cartesian_nodes(ranks: Sequence[int], heads: int) -> int:
    """Nodes of the tree of all paths of so many ranks at each depth, the root counted.  Raises RedrafterError."""
    if len(ranks) != heads or min(ranks, default=0) < 1:
        raise RedrafterError(f"A Cartesian tree needs a number of tokens, from 1, for each of {heads} heads.")
    nodes = 1 + sum(math.prod(ranks[: depth + 1]) for depth in range(heads))
    _check_size(nodes)
    return nodes


def _check_size(nodes: int) -> None:
    if not 2 <= nodes <= MOST_NODES:
        raise RedrafterError(f"A tree may have from 2 to {MOST_NODES:,} nodes, not {nodes:,}.")


def fit_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> tuple[tuple[int, ...], ...]:
    """The paths of the tree of so many nodes, the root counted, with the most tokens to expect, most probable first.

    `accuracies[k][r]` is how often the token that head k + 1 ranks r-th is right; as published, a path is as probable
    as the product of those along it.  A path is at most as probable as the one that it continues, so taking the most
    probable that continues the tree, one at a time, gives the best tree of every size.  There may be fewer paths.
    """
    taken: list[tuple[int, ...]] = []
    waiting: list[tuple[float, int, tuple[int, ...]]] = []

    def offer(path: tuple[int, ...], probability: float) -> None:
        if len(path) < len(accuracies):
            for rank, accuracy in enumerate(accuracies[len(path)]):
                heapq.heappush(waiting, (-probability * accuracy, len(path), (*path, rank)))

    offer((), 1.0)
    while waiting and len(taken) < nodes - 1:
        negative, _, path = heapq.heappop(waiting)
        taken.append(path)
        offer(path, -negative)
    return tuple(taken)
