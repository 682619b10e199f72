"""What a drafter is: the record that is saved beside its weights.

Promises: a configuration that exists is valid.  Keys that Apple's released code writes keep their names
(https://github.com/apple/ml-recurrent-drafter), so folders travel both ways; keys it does not know are ours.
Does not know torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from redrafter.errors import RedrafterError

MOST_NODES = 1024
"""Of a tree that is kept in a config, the root counted."""


def counted(number: int, noun: str) -> str:
    """So many of what a noun names."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class DecodingShape(BaseModel):
    """How to draft where `batch` rows or more are decoded together.

    `beam_length` counts drafted tokens only; 0 decodes without drafting.  With a `node_budget` the so many most
    probable nodes are drafted, the root counted, not whole beams.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    batch: PositiveInt = 1
    beam_width: PositiveInt
    beam_length: NonNegativeInt
    node_budget: PositiveInt | None = None

    @property
    def in_words(self) -> str:
        """Beams and budget."""
        if not self.beam_length:
            return "without drafting"
        budget = f", the {self.node_budget} most probable nodes" if self.node_budget else ""
        beams = "one beam" if self.beam_width == 1 else f"{self.beam_width} beams"
        return f"{beams} of {counted(self.beam_length, 'token')}{budget}"


DTYPES = ("float32", "float16", "bfloat16")
"""In which weights are compared, finest first."""


class Fingerprint(BaseModel):
    """Digests of a model's weights, by the dtypes that they were rounded to (`redrafter.fingerprint`).

    Empty for what could not be read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    embedding: dict[str, str] = {}
    layers: dict[str, str] = {}
    """Of all other parameters."""
    structure: str = ""
    """Of the names and shapes of those; digests of `layers` are compared only where it is the same."""

    def __bool__(self) -> bool:
        """Whether there is any digest."""
        return bool(self.embedding or self.layers)

    def matches(self, other: Fingerprint) -> bool | None:
        """Whether both are of one model; None if that cannot be known."""
        found = [_equal(self.embedding, other.embedding)]
        if self.structure == other.structure:
            found.append(_equal(self.layers, other.layers))
        if False in found:
            return False
        return True if True in found else None


def _equal(one: dict[str, str], other: dict[str, str]) -> bool | None:
    """Whether digests are equal in the finest dtype that both have; None if they have none, or if that proves nothing.

    Weights of float32 that were rounded to bfloat16 on one side and to float16 on the other may differ in bfloat16.
    """
    shared = [kind for kind in DTYPES if kind in one and kind in other]
    if not shared:
        return None
    if one[shared[0]] == other[shared[0]]:
        return True
    finest = {next(kind for kind in DTYPES if kind in digests) for digests in (one, other)}
    return None if finest == {"bfloat16", "float16"} else False


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
    shapes: tuple[DecodingShape, ...] = ()
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
    def default_shape(self) -> DecodingShape:
        """What it was made for."""
        return DecodingShape(beam_width=self.beam_width, beam_length=self.beam_length, node_budget=self.node_budget)

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


class EagleConfig(HeadConfig):
    """Shape, origin and decoding defaults of an EAGLE head.

    Its one layer is as wide as the target: `intermediate_size`, the numbers of heads, `rms_norm_eps` and `rope_theta`
    are that layer's.  With a `node_budget` drafts are the so many most probable nodes (EAGLE-2), not whole beams.
    `coupled`: when sampling, drafts are ranked by the noise that the target is about to draw with too, as all methods
    do here; without it, as published, by the head's probabilities alone.
    """

    kind: ClassVar[str] = "an EAGLE head"

    model_type: Literal["redrafter_eagle"] = "redrafter_eagle"
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10_000.0
    draft_vocab_size: None = None
    coupled: bool = True

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be an even multiple of num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self

    @property
    def weights_in_words(self) -> str:
        """The layer."""
        heads = f"{self.num_attention_heads} heads of {self.hidden_size // self.num_attention_heads}"
        return f"one transformer layer, {heads}, {self.intermediate_size:,} wide inside"

    @property
    def context_in_words(self) -> str:
        """What the head sees of the target."""
        return f"{super().context_in_words}, at every position"


class DrafterConfig(HeadConfig):
    """Shape, origin and decoding defaults of a recurrent drafter.

    `exit_dim` is the width of the head's blocks (paper: 2 × hidden size, the default).  `num_draft_layers` counts its
    residual blocks.  `rnn=False` replaces the recurrence by a running sum of embeddings, `gated` adds a gate to it.
    `context_layers` are numbers of target layers, from 1, whose outputs the drafter sees beside the last hidden state,
    `context_positions` the last positions at which it sees them.  With a `node_budget` drafts are the so many most
    probable nodes, not whole beams.
    """

    kind: ClassVar[str] = "a recurrent drafter"

    model_type: Literal["recurrent_drafting_drafter"] = "recurrent_drafting_drafter"
    exit_dim: PositiveInt
    num_draft_layers: int
    rnn: bool = True
    gated: bool = False
    context_layers: tuple[PositiveInt, ...] = ()
    context_positions: PositiveInt = 1

    @model_validator(mode="before")
    @classmethod
    def _released_defaults(cls, values: Any) -> Any:
        """Fills in what the released training script takes when not told: exit_dim 2H, two blocks."""
        if isinstance(values, dict):
            values = {"num_draft_layers": 2, **values}
            if values.get("exit_dim") is None and isinstance(values.get("hidden_size"), int):
                values["exit_dim"] = 2 * values["hidden_size"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_draft_layers < 0:
            raise ValueError("num_draft_layers cannot be negative")
        if self.gated and not self.rnn:
            raise ValueError("a gate needs the recurrence")
        return self

    @property
    def context_size(self) -> int:
        """Numbers that the target hands over for a draft: hidden states of layers and positions."""
        return self.context_positions * (1 + len(self.context_layers)) * self.hidden_size

    @property
    def weights_in_words(self) -> str:
        """The recurrence and the blocks."""
        step = "one recurrent step" if self.rnn else "a running sum of embeddings"
        gate = ", gated" if self.gated else ""
        return f"{step}{gate}, {self.num_draft_layers} blocks of width {self.exit_dim:,}"

    @property
    def context_in_words(self) -> str:
        """What the drafter sees of the target."""
        seen = ", ".join([super().context_in_words, *(f"layer {number}" for number in self.context_layers)])
        return f"{seen}, at {self.context_positions} positions" if self.context_positions > 1 else seen

    def to_json(self) -> str:
        """The text of `config.json`; what is not set is left out."""
        published = {"gated": False, "context_layers": (), "context_positions": 1, "shapes": ()}  # the paper's form
        unset = {name for name, value in published.items() if getattr(self, name) == value}
        return self.model_dump_json(indent=2, exclude_none=True, exclude=unset) + "\n"


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


def flat(text: str) -> str:
    """JSON with every list of whole numbers on one line."""
    return re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def drawn_from(
    tree: tuple[tuple[int, ...], ...], width: int, length: int, budget: int | None
) -> tuple[tuple[int, ...], ...]:
    """The paths of a tree that are drafted in some shape, in their order."""
    kept = tuple(path for path in tree if len(path) <= length and max(path) < width)
    return kept if budget is None else kept[: budget - 1]
