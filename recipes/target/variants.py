"""The training recipes for a drafter that are compared.

Guarantees an order by importance, so that an interrupted run has the most important ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recipes.common.answers import draft_vocabulary
from recipes.common.methods import COUPLED, KL
from torch import Tensor
from transformers import PretrainedConfig

from redrafter.data.examples import Row
from redrafter.training.objective import Objective


@dataclass(frozen=True)
class Variant:
    """One drafter: its training data, loss and head shape."""

    name: str
    data: Literal["text", "continuations", "greedy", "sampled", "both"]
    """As people wrote it; what the target adds at each place of that; its own answers, greedy, sampled or all."""
    objective: Objective = Objective()  # noqa: RUF009
    head: dict[str, Any] = field(default_factory=dict)
    """Arguments of `RecurrentDrafter.for_target`; none is the released head: exit width 2 H, two blocks."""
    vocabulary: int = 1
    """The head scores one token in so many of the target's vocabulary."""

    def scored(self, rows: list[Row], vocabulary: int) -> Tensor | None:
        """Ids of the draft vocabulary, chosen by frequency in the rows; None for the target's complete vocabulary."""
        return None if self.vocabulary == 1 else draft_vocabulary(rows, vocabulary // self.vocabulary)


def variants(target: PretrainedConfig) -> list[Variant]:
    """All variants, for a target of this config."""
    hidden, depth = target.hidden_size, target.num_hidden_layers
    layers = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})

    def head(name: str, vocabulary: int = 1, **shape: Any) -> Variant:
        return Variant(name, "both", KL, shape, vocabulary)

    return [
        Variant("released: the text's own tokens", "text"),
        Variant("answers, KL, decay 0.8", "both", KL),
        head("exit width 4 H, three blocks, V/4", 4, exit_dim=4 * hidden, num_draft_layers=3),
        Variant("answers, KL and coupled, decay 0.8", "both", COUPLED),
        Variant("paper: the target's continuations", "continuations"),
        head(
            "exit width 4 H, three blocks, three layers, four positions, V/4",
            4,
            exit_dim=4 * hidden,
            num_draft_layers=3,
            context_layers=layers,
            context_positions=4,
        ),
        head("exit width 4 H, V/4", 4, exit_dim=4 * hidden),
        Variant("text, KL, decay 0.8", "text", KL),
        head("gated cell", gated=True),
        Variant("answers, KL, decay 0.8, V/4", "both", KL, vocabulary=4),
        Variant("answers, KL and coupled, decay 0.8, V/4", "both", COUPLED, vocabulary=4),
        Variant("answers, tokens", "both"),
        head("states of three layers more", context_layers=layers),
        head("exit width 6 H, three blocks, V/4", 4, exit_dim=6 * hidden, num_draft_layers=3),
        head("states of the last four positions", context_positions=4),
        Variant("answers, greedy, KL, decay 0.8", "greedy", KL),
        Variant("answers, KL, decay 0.8, V/16", "both", KL, vocabulary=16),
        Variant("answers, 0.1 CE and 0.9 TV", "both", Objective(0.1, total_variation=0.9)),
        Variant("answers, KL", "both", replace(KL, decay=1.0)),
        head("exit width H, three blocks", exit_dim=hidden, num_draft_layers=3),
        Variant("answers, 0.5 KL and 0.5 TV", "both", Objective(0.0, kl=0.5, total_variation=0.5)),
        head("exit width H", exit_dim=hidden),
        head("three blocks", num_draft_layers=3),
        head("one block", num_draft_layers=1),
        Variant("answers, greedy, tokens", "greedy"),
        Variant("answers, sampled, tokens", "sampled"),
    ]
