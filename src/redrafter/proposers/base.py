"""The two interfaces of a drafting method: `Method` for callers, `Proposer` for the decode step.

A new method is a subclass of `Proposer` and, unless it is a trained head, a class with the members of `Method`.
Trained heads become methods through one row of `redrafter.proposers.methods.PROPOSERS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import PromptChunk, RowState, SamplingNoise
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.core.tree import DraftTree
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target


class Proposer:
    """Base class of what proposes trees of a fixed size.  Decoding is exact for every tree that it returns.

    `propose` works on tensors of fixed shapes, does not synchronize with the device and draws no random numbers, so
    that a step can be captured as a CUDA graph.  Rows are independent.  Between steps, a proposer knows only the text
    and what it wrote into its memory.
    """

    length: int
    """L, the largest number of drafted tokens on one path.  The guaranteed token is not counted."""
    size: int
    """N, the number of nodes of every tree, including the root and padding."""
    positions: int = 1
    """Number of last positions whose hidden states a draft reads."""
    modules: Sequence[nn.Module] = ()
    """Modules that run in a draft, without those of the target."""

    def memory(self, *, batch: int, slots: int) -> SlotCache | None:
        """State kept between steps for texts of `slots` positions, allocated once for a runner.  None by default.

        It may have more slots than requested, for drafts that run more nodes than the tree contains.
        """
        return None

    def read(self, memory: SlotCache | None, chunk: PromptChunk, states: Float[Tensor, "V N state"]) -> None:
        """Receives the target's hidden states of prompt tokens.  Ignored by default.

        Chunks cover a prompt without its last token, which is the first root, in order.
        """

    def propose(
        self,
        memory: SlotCache | None,
        rows: RowState,
        context: Float[Tensor, "B positions state"],
        noise: SamplingNoise,
    ) -> DraftTree:
        """Returns trees [B, N] below the guaranteed tokens, `rows.root`.

        `context` holds the target's hidden states at the last positions before the root; the target chose the root from
        the last of them.  It is zero before a text begins.  `noise` describes how the target will sample after nodes of
        depth 0 to L; a proposer may use or ignore it.  Up to L + 1 tokens have joined the text since the last draft: a
        proposer with a memory runs the last L + 1 tokens again, each into the slot of its position, and needs no other
        bookkeeping.
        """
        raise NotImplementedError

    def prepare(self) -> Proposer:
        """Returns an equivalent proposer that is as fast as possible here, valid until a weight changes."""
        return self


@runtime_checkable
class Method(Protocol):
    """A drafting method, as a caller passes it."""

    @property
    def layers(self) -> Sequence[int]:
        """Numbers, from 1, of the target's layers whose outputs it reads in addition to the last hidden state."""
        ...

    def shape(self, batch: int) -> DraftShape:
        """The default shape for `batch` rows decoded together.

        `batch` 0 asks for the shape that the method was trained for, regardless of tuning.
        """
        ...

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """A proposer of that shape; None for a length of 0.  Raises RedrafterError if that is impossible."""
        ...


def resolved_shape(method: Method, batch: int, overrides: ShapeOverrides) -> DraftShape:
    """The shape for `batch` rows decoded together.

    Without overrides it is the method's tuned or default shape; otherwise they replace parts of the shape that the
    method was trained for.  Raises RedrafterError for impossible values.
    """
    shape = overrides.applied_to(method.shape(0)) if overrides else method.shape(batch)
    return shape if overrides.lookup is None else shape.with_lookup(overrides.lookup)


def measured_shape(method: Method, batch: int, overrides: ShapeOverrides) -> DraftShape:
    """As `resolved_shape`, but never without drafting unless the caller asks for it.

    Tuning may switch drafting off; a measurement of the drafter then uses the shape that it was trained for.
    """
    shape = resolved_shape(method, batch, overrides)
    if overrides.beam_length is not None or shape.beam_length:
        return shape
    default = method.shape(0)
    return default if overrides.lookup is None else default.with_lookup(overrides.lookup)


def draftable(method: Method, target: Target, shapes: Iterable[DraftShape]) -> tuple[list[DraftShape], list[str]]:
    """The shapes that a method supports, and sentences that explain why it does not support the others."""
    supported: list[DraftShape] = []
    refused: dict[str, list[str]] = {}
    for shape in shapes:
        try:
            method.proposer(target, shape)
        except RedrafterError as error:
            refused.setdefault(str(error), []).append(shape.description)
        else:
            supported.append(shape)
    return supported, [f"{'; '.join(shapes)}: {error}" for error, shapes in refused.items()]


def describe_drafts(proposer: Proposer, shape: DraftShape) -> str:
    """A shape as the proposer drafts it, which need not use beams."""
    uses_beams = all(getattr(module, "by_beams", True) for module in proposer.modules)
    if uses_beams and proposer.size == shape.max_nodes:
        return shape.description
    return f"a tree of {proposer.size} nodes, {proposer.length} deep{', with lookup' if shape.lookup else ''}"
