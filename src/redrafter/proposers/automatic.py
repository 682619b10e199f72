"""Chooses a drafter for a model: its own, if there is one, else prompt lookup where it is likely to pay.

Guarantees that nothing is downloaded to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from redrafter.core.shapes import DraftShape
from redrafter.proposers.base import Proposer
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.targets.structure import base_name
from redrafter.targets.target import Target
from redrafter.utils.outputs import CONFIG

BESIDE = "drafter"
"""Folder in a model's folder that holds its drafter."""

PUBLISHED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "drafters/smollm2-135m-instruct"}
"""Folders of published drafters in a checkout of this repository, by the Hub ids of their models."""

LEAST = 0.3
"""Least probability of a drafted token if nothing but the text drafts.

In greedy decoding two matching tokens reach it, one does not."""

LENGTH, NODES = 7, 32
"""Drafted tokens of a row, and nodes of all rows together including the roots, if nothing but the text drafts."""


class Choice(NamedTuple):
    """The drafter for a model."""

    path: Path | None
    """Its folder; None for `LikelyLookup`."""
    reason: str
    """A sentence for the user."""


def automatic(model: PreTrainedModel) -> Choice:
    """The folder `drafter` in the model's folder, else a published drafter in the current folder, else none."""
    name = str(getattr(model.config, "_name_or_path", None) or "")
    beside = Path(name) / BESIDE
    if name and (beside / CONFIG).is_file():
        return Choice(beside, f"Drafter: {beside}, which lies in the model's folder.")
    for published, folder in PUBLISHED.items():
        if name and base_name(name) == base_name(published) and (Path(folder) / CONFIG).is_file():
            return Choice(Path(folder), f"Drafter: {folder}, published for {published}.")
    return Choice(None, "Drafter: none is known for this model; what repeats in the text is drafted (prompt lookup).")


@dataclass(frozen=True)
class LikelyLookup:
    """Prompt lookup for models without a drafter: drafts little, and nothing where it is unlikely to be accepted.

    A row drafts only tokens with a probability of at least `LEAST`.  Large batches draft less, or nothing.
    """

    layers: tuple[int, ...] = ()

    def shape(self, batch: int) -> DraftShape:
        """One beam of up to `LENGTH` tokens; in all rows together, at most `NODES` nodes."""
        length = min(LENGTH, NODES // max(1, batch) - 1)
        return DraftShape(beam_width=1, beam_length=max(0, length))

    def proposer(self, target: Target, shape: DraftShape) -> Proposer | None:
        """A proposer of that shape; None for a length of 0.  `shape.lookup` makes no difference."""
        return PromptLookup(least=LEAST).proposer(target, shape.with_lookup(False))
