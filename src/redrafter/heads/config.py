"""What the configs of all draft heads have in common: the record that is saved beside the weights.

Promises that a config that exists is valid.  Keys that Apple's released code writes keep their names
(https://github.com/apple/ml-recurrent-drafter), so folders travel both ways; keys it does not know are ours.  Does not
know any head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from redrafter.core.shapes import DraftShape
from redrafter.errors import RedrafterError
from redrafter.targets.fingerprint import Fingerprint


class HeadConfig(BaseModel):
    """What the configs of all heads say that draft for a target: its shape and name, and decoding defaults.

    `vocab_size` and `hidden_size` are the target's.  `draft_vocab_size` is set when only part of the vocabulary is
    scored.  `target` and `target_revision` name the model it was made for, `target_fingerprint` identifies its weights
    whatever it is called, `beam_length` is the draft length it was
    trained for (drafted tokens only, the guaranteed token not counted), and `beam_width` the width to decode with
    unless told otherwise; with a `node_budget` drafts are so many nodes, the root counted.  `shapes`, by rising batch,
    are what `redrafter tune` found to be fastest instead, and `tuned_on` says where.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: ClassVar[str]
    """What the weights are, with its article."""

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    draft_vocab_size: PositiveInt | None = None
    target: str | None = None
    target_revision: str | None = None
    beam_width: PositiveInt = 10
    beam_length: PositiveInt = 4
    node_budget: PositiveInt | None = None
    shapes: tuple[DraftShape, ...] = ()
    tuned_on: str | None = None
    target_fingerprint: Fingerprint | None = None

    @model_validator(mode="after")
    def _can_be_drafted(self) -> Self:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError("draft_vocab_size cannot exceed vocab_size")
        batches = [shape.batch for shape in self.shapes]
        if batches != sorted(set(batches)):
            raise ValueError("shapes must be of different batches, rising")
        for shape in self.shapes:
            if shape.beam_width > self.head_size or (shape.node_budget or shape.beam_length + 1) <= shape.beam_length:
                raise ValueError(f"the shape of batch {shape.batch} cannot be drafted")
        return self

    @property
    def head_size(self) -> int:
        """Number of tokens that are scored."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def default_shape(self) -> DraftShape:
        """What it was made for."""
        return DraftShape(beam_width=self.beam_width, beam_length=self.beam_length, node_budget=self.node_budget)

    def drafting(
        self, batch: int, width: int | None = None, length: int | None = None, budget: int | None = None
    ) -> tuple[int, int, int | None]:
        """Beam width, beam length and node budget for `batch` rows decoded together.

        Told none of them, as tuned: by the largest batch that is not above this one.  Told some, or where nothing was
        tuned, the others are what it was made for.
        """
        shape = self.default_shape
        if width is None and length is None and budget is None:
            shape = next((one for one in reversed(self.shapes) if one.batch <= batch), shape)
        return (
            shape.beam_width if width is None else width,
            shape.beam_length if length is None else length,
            shape.node_budget if budget is None else budget,
        )

    @property
    def drafted_in_words(self) -> str:
        """What is drafted."""
        return f"{self.head_size:,} of {self.vocab_size:,} tokens" if self.draft_vocab_size else "all tokens"

    @property
    def weights_in_words(self) -> str:
        """The weights' form."""
        raise NotImplementedError

    @property
    def head_in_words(self) -> str:
        """The weights' form, and what is drafted."""
        return f"{self.weights_in_words}, drafts {self.drafted_in_words}"

    @property
    def context_in_words(self) -> str:
        """What is seen of the target."""
        return "the output head's input"

    @property
    def shape_in_words(self) -> str:
        """How it drafts by default."""
        return self.default_shape.in_words

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a `config.json`.  Raises RedrafterError where it is not JSON or of another kind."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RedrafterError(f"{path} does not describe {cls.kind}: {where}: {first['msg']}.") from None

    def to_json(self) -> str:
        """The text of `config.json`; what is not set is left out."""
        return self.model_dump_json(indent=2, exclude_none=True, exclude={} if self.shapes else {"shapes"}) + "\n"


def flat(text: str) -> str:
    """JSON with every list of whole numbers on one line."""
    return re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
