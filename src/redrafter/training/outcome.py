"""Held-out acceptance during a training run, and whether it was still rising at the end.

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

LITTLE = 1.1
"""Tokens per step below which little has been learned; 1 means that nothing is accepted."""


@dataclass(frozen=True)
class Measurement:
    """Acceptance on held-out rows after a step."""

    step: int
    acceptance: Acceptance

    @property
    def length(self) -> float:
        """Tokens per step."""
        return self.acceptance.mean_acceptance_length

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Metrics in the form that a Trainer logs."""
        counts = self.acceptance
        metrics = {"acceptance_length": self.length, "drafts": counts.drafts}
        metrics |= {"draft_tokens": counts.draft_tokens, "accepted": counts.accepted}
        metrics |= {f"accepted_{i}": rate for i, rate in enumerate(counts.rates, start=1)}
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    @classmethod
    def from_log(cls, history: Sequence[dict[str, Any]]) -> list[Measurement]:
        """All measurements in a Trainer's log, in order."""
        measurements = []
        for entry in history:
            if "eval_drafts" not in entry:
                continue
            drafts = int(entry["eval_drafts"])
            length = sum(name.startswith("eval_accepted_") for name in entry)
            by_position = [round(entry[f"eval_accepted_{i}"] * drafts) for i in range(1, length + 1)]
            counts = Acceptance(drafts, int(entry["eval_draft_tokens"]), int(entry["eval_accepted"]), by_position)
            measurements.append(cls(int(entry["step"]), counts))
        return measurements


def advice(measured: Sequence[Measurement], recipe: Recipe) -> str:
    """Whether held-out acceptance was still rising when the run ended, and which option to raise."""
    option = f"--epochs (now {recipe.epochs:g})"
    if recipe.max_steps > 0:
        option = f"--max-steps (now {recipe.max_steps})"
    if recipe.seconds is not None:
        option = f"--minutes (now {recipe.seconds / 60:g})"
    if not measured:
        return (
            f"No rows were held out, so it is unknown whether more training helps: use --held-out, or raise {option}."
        )
    history = f"Held-out tokens per step: {', '.join(f'{one.length:.2f}' for one in measured)}"
    if len(measured) == 1:
        return (
            f"{history}; measured once, so it is unknown whether it was still rising. To train longer, raise {option}."
        )
    *before, last = [one.length for one in measured]
    if max(*before, last) < LITTLE:
        return f"{history}; little was learned: raise {option} to train longer."
    middle = next((one for one in reversed(measured) if 2 * one.step <= measured[-1].step), measured[0])
    if last >= RISING * middle.length and last >= max(before):
        return f"{history}; still rising in the second half: raise {option} to train longer."
    best = max(measured, key=lambda one: one.length)
    return f"{history}; no longer rising (best after step {best.step:,}): more or other rows help more than more steps."
