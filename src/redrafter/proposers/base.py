"""What a method of drafting must offer: to a caller a `Method`, to the decode step a `Proposer`.

A new method is a `Proposer` and the `Method` that makes it for a target; heads that live in folders are told from one
another by `redrafter.proposers.loading`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from redrafter.core.cache import SlotCache
from redrafter.core.rows import RowState, SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target


@runtime_checkable
class Proposer(Protocol):
    """Proposes trees of a fixed shape.  Decoding is exact whatever they hold.

    `propose` works on tensors of fixed shapes, asks the device nothing and draws no randomness of its own, so that a
    step can be captured as a CUDA graph, and it lets no row depend on another.  All that it knows between steps is the
    text and what it wrote into its memory.
    """

    @property
    def length(self) -> int:
        """L, the most drafted tokens on one path; the guaranteed token is not counted."""
        ...

    @property
    def size(self) -> int:
        """N, nodes of every tree, counting the root."""
        ...

    @property
    def positions(self) -> int:
        """Last positions whose hidden states a draft is made from."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Whose layers a draft runs, the target's aside."""
        ...

    def memory(self, *, batch: int, slots: int) -> SlotCache | None:
        """What is kept between steps for texts of `slots` positions, allocated once for a call.

        It may have more slots than asked for, where drafting runs more nodes than the tree has that it proposes.
        """
        ...

    def read(self, memory: SlotCache | None, place: RowState, states: Float[Tensor, "B P state"], start: int) -> None:
        """The target has taken in positions `start … start + P - 1` of the prompts in `place.text`, with these states.

        `place.length` is each prompt's last position; what follows it is padding.
        """
        ...

    def propose(
        self,
        memory: SlotCache | None,
        place: RowState,
        context: Float[Tensor, "B positions state"],
        draw: SamplingNoise,
    ) -> DraftTree:
        """Trees [B, N] below the guaranteed tokens, `place.root`.

        `context`: the target's states at the last positions before the root's, the last of which is where it chose it;
        zeros before a text begins.  `draw`: how the target will choose after nodes of depth 0 to L; a proposer may use
        it, or not.  Since the last draft up to L + 1 tokens have joined the text: a proposer with a memory runs the
        last L + 1 again, each into the slot of its position, and has nothing else to keep or to roll back.
        """
        ...

    def quickened(self) -> Proposer:
        """One that proposes the same, as fast as it can here, for as long as no weight changes."""
        ...


class Ready:
    """What a proposer says that has nothing to prepare."""

    def quickened(self) -> Proposer:
        """Itself."""
        return self  # type: ignore[return-value]


class Memoryless(Ready):
    """What a proposer says that keeps nothing between steps."""

    def memory(self, *, batch: int, slots: int) -> None:
        """Nothing."""

    def read(self, memory: SlotCache | None, place: RowState, states: Tensor, start: int) -> None:
        """Prompts leave nothing behind."""


@runtime_checkable
class Method(Protocol):
    """What a caller passes as `drafter`: a way to draft for a target."""

    @property
    def layers(self) -> Sequence[int]:
        """Numbers, from 1, of the target's layers whose states it reads beside the last."""
        ...

    def drafting(
        self, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
    ) -> tuple[int, int, int | None]:
        """Beam width, beam length and node budget for `batch` rows decoded together, as told or by default.

        `batch` 0 asks for what the method was made for, whatever it was tuned to.
        """
        ...

    def proposer(self, target: Target, width: int, length: int, budget: int | None) -> Proposer | None:
        """What drafts in that shape; None for a length of 0.  Raises RedrafterError where that cannot be."""
        ...


def draftable(method: Method, target: Target, shapes: Iterable[DraftShape]) -> tuple[list[DraftShape], list[str]]:
    """The shapes that a method can draft in, and sentences that say why not in the others."""
    found: list[DraftShape] = []
    refused: dict[str, list[str]] = {}
    for shape in shapes:
        try:
            method.proposer(target, shape.beam_width, shape.beam_length, shape.node_budget)
        except RedrafterError as error:
            refused.setdefault(str(error), []).append(shape.in_words)
        else:
            found.append(shape)
    return found, [f"{'; '.join(words)}: {error}" for error, words in refused.items()]


class ByText:
    """What a method says that reads the text alone, and drafts one beam unless told."""

    beam_length: ClassVar[int]
    """Tokens that it drafts unless told."""

    @property
    def layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    def drafting(
        self, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
    ) -> tuple[int, int, int | None]:
        """As told or by default, for any number of rows."""
        return 1 if width is None else width, self.beam_length if length is None else length, budget


def measured(
    method: Method, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
) -> dict[str, Any]:
    """What to tell `generate` so that it drafts: as told, but as made for where the method is tuned not to."""
    told = (width, length, budget)
    if length is None and method.drafting(batch, *told)[1] == 0:
        told = method.drafting(0)
    return dict(zip(("beam_width", "beam_length", "node_budget"), told, strict=True))
