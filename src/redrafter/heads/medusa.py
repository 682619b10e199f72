"""Medusa heads: each reads the target's last hidden state and scores the token at one distance.

Paper: arXiv 2401.10774, section 2.1; trees: section 2.3.3.  The guaranteed token is the target's own choice, so head k
scores the k-th token after it, from the state that chose it.  Guarantees one definition of the scores (`logits`), which
training and drafting share.  Does not know the target's forward pass.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from redrafter.core.shapes import MAX_NODES, DraftShape, counted
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.heads.config import HeadConfig, flat
from redrafter.heads.recurrent import ResidualBlock
from redrafter.targets.target import Target

NODES = 64
"""Nodes of a fitted tree, as published."""


class MedusaConfig(HeadConfig):
    """Shape, origin and decoding defaults of Medusa heads.

    Head k of `heads` scores the k-th token after the guaranteed one, through `blocks` residual blocks.  `tree` lists
    the nodes that are drafted, each as the path from the root: at depth k, the rank (0 is best) of a token among those
    that head k scores.  Paths are sorted by value, so that the first N - 1 of them are the best tree of N nodes.
     `ranks` is the number of tokens of each head that may be in the tree; `fitted_on` names the data of the fit.  A
    draft contains the paths of at most `beam_length` tokens whose ranks are all below `beam_width`; with a
    `node_budget`, the first of these.
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
            raise ValueError(f"{self.heads} heads cannot draft more tokens than there are heads")
        if len(self.ranks) != self.heads or max(self.ranks) > self.head_size:
            raise ValueError(f"ranks must hold the number of tokens of each of {self.heads} heads")
        if not 0 < len(self.tree) < MAX_NODES:
            raise ValueError(f"a tree must have from 2 to {MAX_NODES:,} nodes")
        known: set[tuple[int, ...]] = {()}
        for path in self.tree:
            if path in known or path[:-1] not in known:
                raise ValueError(f"path {list(path)} must be listed once, after the path that it continues")
            if len(path) > self.heads or any(rank >= most for rank, most in zip(path, self.ranks, strict=False)):
                raise ValueError(f"path {list(path)} has a rank that its head does not draft")
            known.add(path)
        return self

    @property
    def weights_description(self) -> str:
        """Heads and blocks."""
        return f"{self.heads} heads of {counted(self.blocks, 'block')}"

    @property
    def head_description(self) -> str:
        """Heads, blocks and the tokens that are drafted."""
        return f"{self.weights_description}, draft {self.vocabulary_description}"

    @property
    def shape_description(self) -> str:
        """The size, depth and origin of the default tree."""
        fitted = f", fitted on {self.fitted_on}" if self.fitted_on else ", not fitted"
        nodes = 1 + len(drafted_paths(self.tree, self.default_shape))
        return f"a tree of {nodes} nodes, {self.beam_length} deep{fitted}"

    def to_json(self) -> str:
        """The text of `config.json`, each path of the tree on one line."""
        return flat(super().to_json())


def drafted_paths(tree: tuple[tuple[int, ...], ...], shape: DraftShape) -> tuple[tuple[int, ...], ...]:
    """The paths of a tree that a shape drafts, in order."""
    kept = tuple(path for path in tree if len(path) <= shape.beam_length and max(path) < shape.beam_width)
    return kept if shape.node_budget is None else kept[: shape.node_budget - 1]


class MedusaHeads(Head):
    """The weights of the heads; their tree is in the config."""

    by_beams = False
    config: MedusaConfig
    config_type = MedusaConfig

    def __init__(self, config: MedusaConfig):
        """Residual blocks start as the identity, output layers at random."""
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
        draft_vocabulary: Int[Tensor, " draft"] | None = None,
        nodes: int = NODES,
        ranks: Sequence[int] | None = None,
        beam_width: int = 10,
        **config: Any,
    ) -> MedusaHeads:
        """Untrained heads for a target, on its device, in float32.  All of them score as the target's output head.

        Until it is fitted (`redrafter.training.fitting.fit`), the tree assumes typical accuracies: `nodes` nodes from
        each head's `beam_width` best tokens, or with `ranks` the Cartesian product of that many best tokens of each
        head.  `draft_vocabulary` holds the ids of the target's vocabulary that may be drafted; default: all.  `config`
        holds further fields of `MedusaConfig`.  Raises RedrafterError for an impossible tree.
        """
        target = Target(model)
        size = target.vocab_size if draft_vocabulary is None else len(draft_vocabulary)
        if ranks is not None:
            nodes = cartesian_nodes(ranks, heads)
        _check_size(nodes)
        limits = tuple(min(size, rank) for rank in ranks or [beam_width] * heads)
        guess = [[0.6 ** (k + 1) / (r + 1) ** 2 for r in range(limit)] for k, limit in enumerate(limits)]
        made = cls(
            MedusaConfig(
                **cls.fields_of(target),
                draft_vocab_size=None if draft_vocabulary is None else size,
                beam_width=max(limits),
                beam_length=heads,
                heads=heads,
                ranks=limits,
                tree=fit_tree(guess, nodes),
                **config,
            )
        ).to(target.device)
        if draft_vocabulary is not None:
            made.draft_only(draft_vocabulary, target)
        with torch.no_grad():  # column by column, which works for every linear output head
            basis = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
            weight = (target.logits(basis) - target.logits(torch.zeros_like(basis[:1]))).T
            weight = weight if made.draft_vocabulary is None else weight[made.draft_vocabulary]
            for head in made.heads:
                head[-1].weight.copy_(weight)  # type: ignore[index]
        return made

    def logits(
        self, hidden: Float[Tensor, "*batch hidden"], heads: int | None = None
    ) -> Float[Tensor, "*batch heads head"]:
        """Scores over the draft vocabulary of the first, second, … token after the guaranteed one.

        `hidden` is the output head's input from which the target chose the guaranteed token.  `heads` limits the number
        of heads that run.
        """
        return torch.stack([head(hidden) for head in self.heads[:heads]], dim=-2)

    def unrolled(
        self, features: Float[Tensor, "C features"], embeddings: Float[Tensor, "C length hidden"]
    ) -> Float[Tensor, "C length head"]:
        """See `Head.unrolled`; heads ignore preceding tokens."""
        return self.logits(features, embeddings.shape[1])


def cartesian_nodes(ranks: Sequence[int], heads: int) -> int:
    """Nodes of the Cartesian tree with that many tokens at each depth, including the root.  Raises RedrafterError."""
    if len(ranks) != heads or min(ranks, default=0) < 1:
        raise RedrafterError(f"A Cartesian tree needs a positive number of tokens for each of {heads} heads.")
    nodes = 1 + sum(math.prod(ranks[: depth + 1]) for depth in range(heads))
    _check_size(nodes)
    return nodes


def _check_size(nodes: int) -> None:
    if not 2 <= nodes <= MAX_NODES:
        raise RedrafterError(f"A tree may have from 2 to {MAX_NODES:,} nodes, not {nodes:,}.")


def fit_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> tuple[tuple[int, ...], ...]:
    """The paths of the tree of `nodes` nodes, including the root, with the largest expected acceptance length.

    `accuracies[k][r]` is the frequency with which the token that head k + 1 ranks r-th is correct.  As published, the
    probability of a path is the product along it.  It is at most that of the path it continues, so greedily adding the
    most probable path that continues the tree gives the best tree of every size.  There may be fewer paths.
    """
    taken: list[tuple[int, ...]] = []
    candidates: list[tuple[float, int, tuple[int, ...]]] = []

    def add_children(path: tuple[int, ...], probability: float) -> None:
        if len(path) < len(accuracies):
            for rank, accuracy in enumerate(accuracies[len(path)]):
                heapq.heappush(candidates, (-probability * accuracy, len(path), (*path, rank)))

    add_children((), 1.0)
    while candidates and len(taken) < nodes - 1:
        negative, _, path = heapq.heappop(candidates)
        taken.append(path)
        add_children(path, -negative)
    return tuple(taken)
