"""Held-out acceptance in the course of a training run, and whether it was still rising at the end.

Does not know the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redrafter.evaluation.acceptance import Acceptance
from redrafter.training.recipe import Recipe

RISING = 1.03
"""Growth of the tokens per step in the second half of a run from which acceptance counts as rising.

The last measurements alone would not show it: the learning rate falls to zero, so every curve is flat at its end.
"""

BEGUN = 1.1
"""Tokens per step below which a run has hardly begun; 1 is a drafter of which nothing is accepted."""


@dataclass(frozen=True)
class Measurement:
    """Acceptance on held-out rows after a step."""

    step: int
    found: Acceptance

    @property
    def length(self) -> float:
        """Tokens per step."""
        return self.found.mean_acceptance_length

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """As a Trainer logs it: numbers by name."""
        found = self.found
        counts = {"drafts": found.drafts, "draft_tokens": found.draft_tokens, "accepted": found.accepted}
        named = {"acceptance_length": self.length, **counts}
        named |= {f"accepted_{i}": rate for i, rate in enumerate(found.rates, start=1)}
        return {f"{prefix}_{name}": value for name, value in named.items()}

    @classmethod
    def of_log(cls, history: Sequence[dict[str, Any]]) -> list[Measurement]:
        """Those in a Trainer's log, in order."""
        found = []
        for entry in history:
            if "eval_drafts" not in entry:
                continue
            drafts = int(entry["eval_drafts"])
            length = sum(name.startswith("eval_accepted_") for name in entry)
            by_position = [round(entry[f"eval_accepted_{i}"] * drafts) for i in range(1, length + 1)]
            counts = Acceptance(drafts, int(entry["eval_draft_tokens"]), int(entry["eval_accepted"]), by_position)
            found.append(cls(int(entry["step"]), counts))
        return found


def advice(measured: Sequence[Measurement], recipe: Recipe) -> str:
    """Whether held-out acceptance was still rising when the run ended, and which option to raise."""
    option = f"--epochs (now {recipe.epochs:g})"
    if recipe.max_steps > 0:
        option = f"--max-steps (now {recipe.max_steps})"
    if recipe.seconds is not None:
        option = f"--minutes (now {recipe.seconds / 60:g})"
    if not measured:
        return (
            f"No rows were held out, so it is not known whether more training helps: see --held-out, or raise {option}."
        )
    course = ", ".join(f"{one.length:.2f}" for one in measured)
    words = f"Held-out tokens per step: {course}"
    if len(measured) == 1:
        return (
            f"{words}; measured once, so it is not known whether it was still rising. To train longer raise {option}."
        )
    *before, last = [one.length for one in measured]
    if max(*before, last) < BEGUN:
        return f"{words}; little is learnt yet: raise {option} to train longer."
    middle = next((one for one in reversed(measured) if 2 * one.step <= measured[-1].step), measured[0])
    if last >= RISING * middle.length and last >= max(before):
        return f"{words}; still rising in the second half: raise {option} to train longer."
    best = max(measured, key=lambda one: one.length)
    return f"{words}; no longer rising (best after step {best.step:,}): more or other rows help more than more steps."
