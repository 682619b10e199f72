"""The ways to train a drafter that are compared.

Promises that all of them stand in order of importance, so that a run cut short has the ones that matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PretrainedConfig

from redrafter.training.loss import Objective


@dataclass(frozen=True)
class Variant:
    """One drafter: what it learns from, by which loss, and the shape of its head."""

    name: str
    data: Literal["text", "continuations", "greedy", "mixed"]
    """As people wrote it; what the target adds at each place of that; its own answers, all greedy or half sampled."""
    objective: Objective = Objective()  # noqa: RUF009
    head: dict[str, Any] = field(default_factory=dict)
    """Arguments of `RecurrentDrafter.for_target`; none is the released head: exit width 2 H, two blocks."""
    vocabulary: int = 1
    """The head scores one token in so many of the target's vocabulary."""


TOKENS, KL = Objective(), Objective(0.0, kl=1.0)
COUPLED = Objective(0.0, kl=0.5, coupled=1.0)


def variants(target: PretrainedConfig) -> list[Variant]:
    """All of them, for a target of this shape."""
    hidden, depth = target.hidden_size, target.num_hidden_layers
    layers = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})

    def head(name: str, vocabulary: int = 1, **shape: Any) -> Variant:
        return Variant(name, "mixed", COUPLED, shape, vocabulary)

    return [
        Variant("released: the text's own tokens", "text"),
        Variant("answers, KL and coupled", "mixed", COUPLED),
        Variant("answers, KL", "mixed", KL),
        Variant("paper: the target's continuations", "continuations"),
        Variant("answers, half sampled", "mixed"),
        head("exit width 4 H, V/4", 4, exit_dim=4 * hidden),
        Variant("answers, 0.1 CE and 0.9 TV", "mixed", Objective(0.1, total_variation=0.9)),
        head("gated cell", gated=True),
        head("states of three layers more", context_layers=layers),
        head("states of the last four positions", context_positions=4),
        Variant("answers, greedy", "greedy"),
        head("exit width 3 H, three blocks, V/4", 4, exit_dim=3 * hidden, num_draft_layers=3),
        head("three layers, exit width 4 H, V/4", 4, exit_dim=4 * hidden, context_layers=layers),
        head(
            "gated, three layers, four positions, exit width 4 H, V/4",
            4,
            exit_dim=4 * hidden,
            gated=True,
            context_layers=layers,
            context_positions=4,
        ),
        head("exit width H", exit_dim=hidden),
        Variant("answers, KL, V/4", "mixed", KL, vocabulary=4),
        Variant("answers, KL, V/16", "mixed", KL, vocabulary=16),
        head("gated, three layers, four positions", gated=True, context_layers=layers, context_positions=4),
        head("exit width H, three blocks", exit_dim=hidden, num_draft_layers=3),
        Variant("answers, KL, decay 0.8", "mixed", replace(KL, decay=0.8)),
        Variant("answers, KL and coupled, decay 0.8", "mixed", replace(COUPLED, decay=0.8)),
        Variant("answers, 0.5 KL and 0.5 TV", "mixed", Objective(0.0, kl=0.5, total_variation=0.5)),
        head("one block", num_draft_layers=1),
        head("three blocks", num_draft_layers=3),
    ]
