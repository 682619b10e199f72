"""Trained heads as drafting methods.

A new kind of head is added here by one row of `PROPOSERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redrafter.core.shapes import DraftShape
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.proposers.base import Method, Proposer
from redrafter.proposers.eagle import EagleProposer
from redrafter.proposers.medusa import MedusaProposer
from redrafter.proposers.prompt_lookup import with_lookup
from redrafter.proposers.recurrent import RecurrentProposer
from redrafter.targets.isolation import isolated
from redrafter.targets.target import Target

PROPOSERS: dict[type[Head], Callable[[Head, Target, DraftShape], Proposer]] = {
    RecurrentDrafter: RecurrentProposer,  # type: ignore[dict-item]
    MedusaHeads: MedusaProposer,  # type: ignore[dict-item]
    EagleHead: EagleProposer,  # type: ignore[dict-item]
}
"""The proposer of each kind of head."""

HEADS: dict[str, type[Head]] = {kind.config_type.model_fields["model_type"].default: kind for kind in PROPOSERS}
"""Kinds of heads by the `model_type` in their `config.json`."""


@dataclass(frozen=True)
class HeadMethod:
    """A head as a `Method`."""

    head: Head

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of the target's layers that the head reads."""
        return self.head.layers

    def shape(self, batch: int) -> DraftShape:
        """The tuned or default shape, from the head's config, with lookup."""
        return self.head.config.shape(batch, on_cpu=self.head.device.type == "cpu").with_lookup()

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """A proposer that runs a copy of the head's modules; None for a length of 0.

        Raises RedrafterError if the head was trained for another model, is on another device or cannot draft so.
        """
        head = self.head
        head.check_target(target)
        shape.check(vocabulary=head.config.head_size)
        if head.device != target.device:
            raise RedrafterError(f"The drafter is on {head.device}, the model on {target.device}; move one of them.")
        if not shape.beam_length:
            return None
        make = next(make for kind, make in PROPOSERS.items() if isinstance(head, kind))
        return with_lookup(make(isolated(head), target, shape), shape)


Drafter = Head | Method
"""What a caller passes as `drafter`: a loaded head or another method."""


def method_of(drafter: Drafter) -> Method:
    """What a caller passed as `drafter`, as a `Method`.  Raises RedrafterError for anything else.

    Removes a wrapper of `torch.compile`; code that it compiled is not used.
    """
    drafter = getattr(drafter, "_orig_mod", drafter)
    if isinstance(drafter, Head):
        return HeadMethod(drafter)
    if isinstance(drafter, Method):
        return drafter
    raise RedrafterError(
        f"{type(drafter).__name__} is not a supported drafter: pass a loaded drafter, its folder or hub id, "
        'TwoModel(model) or "prompt-lookup".'
    )
