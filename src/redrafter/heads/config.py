"""The part of the config that all draft heads share: the record that is saved beside the weights.

Guarantees that a config that exists is valid.  Keys that Apple's released code writes keep their names
(https://github.com/apple/ml-recurrent-drafter), so folders can be exchanged in both directions; other keys are ours.
Does not know any head.
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
    """Shape, origin and decoding defaults of a draft head.

    `vocab_size` and `hidden_size` are those of the target.  `draft_vocab_size` is set if only part of the vocabulary is
    scored.  `target` and `target_revision` name the model that the head was trained for; `target_fingerprint`
    identifies its weights.  `beam_length` is the draft length in training (the guaranteed token is not counted);
    `beam_width` and `node_budget` complete the default draft shape; `cpu_shape` replaces it on a CPU, where every node
    costs time.  `shapes`, sorted by batch size, are the fastest shapes that `redrafter tune` measured on the machine
    `tuned_on`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: ClassVar[str]
    """A noun with its article, for error messages."""

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    draft_vocab_size: PositiveInt | None = None
    target: str | None = None
    target_revision: str | None = None
    beam_width: PositiveInt = 10
    beam_length: PositiveInt = 4
    node_budget: PositiveInt | None = None
    cpu_shape: DraftShape | None = None
    shapes: tuple[DraftShape, ...] = ()
    tuned_on: str | None = None
    target_fingerprint: Fingerprint | None = None

    @model_validator(mode="after")
    def _can_draft(self) -> Self:
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError("draft_vocab_size cannot exceed vocab_size")
        batches = [shape.batch for shape in self.shapes]
        if batches != sorted(set(batches)):
            raise ValueError("shapes must be sorted by batch, without duplicates")
        for shape in (*self.shapes, *([self.cpu_shape] if self.cpu_shape else [])):
            if shape.beam_width > self.head_size or (shape.node_budget or shape.beam_length + 1) <= shape.beam_length:
                raise ValueError(f"the shape of batch {shape.batch} cannot be drafted")
        return self

    @property
    def head_size(self) -> int:
        """Number of tokens that the head scores."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def default_shape(self) -> DraftShape:
        """The draft shape that the head was trained for."""
        return DraftShape(beam_width=self.beam_width, beam_length=self.beam_length, node_budget=self.node_budget)

    def shape(self, batch: int, *, on_cpu: bool = False) -> DraftShape:
        """The shape tuned for the largest batch size that is not above `batch`; the default shape if there is none."""
        default = self.cpu_shape if on_cpu and self.cpu_shape else self.default_shape
        return next((shape for shape in reversed(self.shapes) if shape.batch <= batch), default)

    @property
    def vocabulary_description(self) -> str:
        """The tokens that are drafted."""
        return f"{self.head_size:,} of {self.vocab_size:,} tokens" if self.draft_vocab_size else "all tokens"

    @property
    def weights_description(self) -> str:
        """The form of the weights."""
        raise NotImplementedError

    @property
    def head_description(self) -> str:
        """The form of the weights and the tokens that are drafted."""
        return f"{self.weights_description}, drafts {self.vocabulary_description}"

    @property
    def context_description(self) -> str:
        """What a draft reads of the target."""
        return "the output head's input"

    @property
    def shape_description(self) -> str:
        """The default draft shape."""
        return self.default_shape.description

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a `config.json`.  Raises RedrafterError if it is not JSON or describes another kind of head."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RedrafterError(f"{path} does not describe {cls.kind}: {where}: {first['msg']}.") from None

    def to_json(self) -> str:
        """The text of `config.json`, without unset fields."""
        return self.model_dump_json(indent=2, exclude_none=True, exclude={} if self.shapes else {"shapes"}) + "\n"


def flat(text: str) -> str:
    """JSON with every list of integers on one line."""
    return re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
