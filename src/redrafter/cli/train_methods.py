"""Options of each training method of `redrafter train`, and the heads that they describe.

A new method adds a dataclass and an entry of `METHODS`.  Imports nothing heavy; `build` does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typer import Option

from redrafter.errors import RedrafterError
from redrafter.training.objective import FEATURE_WEIGHT

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from redrafter.data.examples import Row
    from redrafter.heads.base import Head
    from redrafter.training.defaults import Default


TrainingMethod = Literal["recurrent", "medusa", "eagle"]


@dataclass(kw_only=True)
class HeadOptions:
    """The default shape of drafts, which all methods have."""

    PANEL: ClassVar[str] = "Drafter"
    feature_weight: ClassVar[float] = 0.0
    """Weight of the loss on the target's features."""

    beam_length: Annotated[int, Option(min=1, help="Tokens to draft after the guaranteed one.")] = 4
    beam_width: Annotated[
        int, Option(min=1, help="Default number of beams, also for measuring; medusa: maximum candidates per head.")
    ] = 10
    node_budget: Annotated[
        int | None, Option(min=2, help="Default number of nodes to draft.  \\[default: complete beams; medusa: 64]")
    ] = None

    def check(self) -> None:
        """Raises RedrafterError for options that contradict each other."""

    def build(self, model: PreTrainedModel, rows: list[Row]) -> tuple[Head, list[Default]]:
        """A new head for the model, and the values that were chosen for options that are None."""
        raise NotImplementedError


Blocks = Annotated[int | None, Option(min=0, help="Residual blocks.  \\[default: 2; medusa: 1 per head]")]
DraftVocabulary = Annotated[
    int | None,
    Option(
        min=0,
        help="Draft only the N most frequent tokens of the data; 0: all.  \\[default: all up to 2,048, else as many as "
        "cover 98 % of the tokens to learn on a CPU, 99.9 % on a GPU]",
    ),
]


@dataclass(kw_only=True)
class RecurrentOptions(HeadOptions):
    """The paper's recurrent head."""

    PANEL: ClassVar[str] = "Recurrent head (--method recurrent)"

    exit_dim: Annotated[
        int | None, Option(min=1, help="Width of the head.  \\[default: 2 x hidden size, or 1 x if large on a CPU]")
    ] = None
    blocks: Blocks = None
    rnn: Annotated[bool, Option(help="Use the recurrence, or a running sum of embeddings.")] = True
    gated: Annotated[bool, Option("--gated", help="Add a gate to the recurrence.")] = False
    context_layer: Annotated[
        list[int] | None,
        Option(help="Layer of the target, from 1, whose states the drafter also receives; may be repeated."),
    ] = None
    context_positions: Annotated[
        int, Option(min=1, help="Number of last positions whose states the drafter receives.")
    ] = 1
    draft_vocabulary: DraftVocabulary = None

    def check(self) -> None:
        """Raises RedrafterError for a gate without recurrence."""
        if self.gated and not self.rnn:
            raise RedrafterError("--gated needs the recurrence: leave out --no-rnn.")

    def build(self, model: PreTrainedModel, rows: list[Row]) -> tuple[Head, list[Default]]:
        """A recurrent head."""
        from redrafter.heads.recurrent import RecurrentDrafter
        from redrafter.targets.target import Target
        from redrafter.training.defaults import default_width

        vocabulary, chosen = _draft_vocabulary(self.draft_vocabulary, model, rows)
        target, exit_dim, blocks = Target(model), self.exit_dim, 2 if self.blocks is None else self.blocks
        if exit_dim is None:
            drafted = target.vocab_size if vocabulary is None else len(vocabulary)
            chosen.append(default_width(target, blocks, drafted, model.device))
            exit_dim = chosen[-1].value
        drafter = RecurrentDrafter.for_target(
            model,
            exit_dim=exit_dim,
            num_draft_layers=blocks,
            rnn=self.rnn,
            gated=self.gated,
            context_layers=sorted(self.context_layer or []),
            context_positions=self.context_positions,
            beam_length=self.beam_length,
            beam_width=self.beam_width,
            node_budget=self.node_budget,
            draft_vocabulary=vocabulary,
        )
        return drafter, chosen


@dataclass(kw_only=True)
class MedusaOptions(HeadOptions):
    """Medusa's parallel heads."""

    PANEL: ClassVar[str] = "Medusa heads (--method medusa)"

    blocks: Blocks = None
    cartesian: Annotated[
        str | None,
        Option(
            metavar="4,3,2,…", help="medusa: draft all combinations of this many tokens per head.  \\[default: fitted]"
        ),
    ] = None
    draft_vocabulary: DraftVocabulary = None

    @property
    def ranks(self) -> list[int] | None:
        """Tokens of each head in a Cartesian tree.  Raises RedrafterError for anything else than numbers."""
        words = [] if self.cartesian is None else self.cartesian.split(",")
        if not all(word.isascii() and word.isdigit() for word in words):
            raise RedrafterError(
                f"--cartesian takes a number of tokens for each head, as 4,3,2, not {self.cartesian!r}."
            )
        return [int(word) for word in words] or None

    def check(self) -> None:
        """Raises RedrafterError for a tree that does not fit the heads."""
        if self.ranks is not None:
            from redrafter.heads.medusa import cartesian_nodes

            cartesian_nodes(self.ranks, self.beam_length)

    def build(self, model: PreTrainedModel, rows: list[Row]) -> tuple[Head, list[Default]]:
        """Medusa heads; their tree is fitted after training."""
        from redrafter.heads.medusa import NODES, MedusaHeads

        vocabulary, chosen = _draft_vocabulary(self.draft_vocabulary, model, rows)
        drafter = MedusaHeads.fresh(
            model,
            heads=self.beam_length,
            blocks=1 if self.blocks is None else self.blocks,
            ranks=self.ranks,
            nodes=max(NODES, self.node_budget or 0),
            beam_width=self.beam_width,
            node_budget=self.node_budget,
            draft_vocabulary=vocabulary,
        )
        return drafter, chosen


@dataclass(kw_only=True)
class EagleOptions(HeadOptions):
    """An EAGLE head."""

    PANEL: ClassVar[str] = "EAGLE head (--method eagle)"

    features: Annotated[
        float | None,
        Option(help=f"eagle: weight of the distance from the target's features.  \\[default: {FEATURE_WEIGHT}]"),
    ] = None

    @property
    def feature_weight(self) -> float:  # type: ignore[override]
        """Weight of the loss on the target's features."""
        return FEATURE_WEIGHT if self.features is None else self.features

    def build(self, model: PreTrainedModel, rows: list[Row]) -> tuple[Head, list[Default]]:
        """An EAGLE head."""
        from redrafter.heads.eagle import EagleHead

        shape: dict[str, Any] = {"beam_width": self.beam_width, "node_budget": self.node_budget}
        return EagleHead.fresh(model, beam_length=self.beam_length, **shape), []


METHODS: dict[TrainingMethod, type[HeadOptions]] = {
    "recurrent": RecurrentOptions,
    "medusa": MedusaOptions,
    "eagle": EagleOptions,
}


def select_method(method: TrainingMethod, options: object) -> HeadOptions:
    """The options of a method, from the attributes of `options`.

    Raises RedrafterError for invalid ones, or if an option of other methods is not at its default.
    """
    names = {owner: {field.name for field in fields(kind)} for owner, kind in METHODS.items()}
    for field in (field for kind in METHODS.values() for field in fields(kind)):
        value = getattr(options, field.name)
        if field.name not in names[method] and value not in (field.default, None, []):
            owners = " and ".join(owner for owner in METHODS if field.name in names[owner])
            flag = f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
            raise RedrafterError(f"{flag} is an option of --method {owners}, not of {method}: leave it out.")
    selected = METHODS[method](**{name: getattr(options, name) for name in names[method]})
    selected.check()
    return selected


def _draft_vocabulary(
    count: int | None, model: PreTrainedModel, rows: list[Row]
) -> tuple[Tensor | None, list[Default]]:
    """The most frequent tokens of the rows, None for all tokens; and the choice of `count` if it is None."""
    from redrafter.data.examples import most_frequent
    from redrafter.targets.target import Target
    from redrafter.training.defaults import default_vocabulary

    chosen = []
    if count is None:
        chosen.append(default_vocabulary(rows, Target(model).vocab_size, model.device))
        count = chosen[-1].value
    return most_frequent(rows, count) if count else None, chosen
