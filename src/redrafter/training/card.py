"""The model card of a trained drafter.

Guarantees that it states only what the training run measured or was given.  Does not know the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from transformers import __version__ as TRANSFORMERS

from redrafter import __version__
from redrafter.data.examples import Row, coverage
from redrafter.evaluation.acceptance import Acceptance
from redrafter.heads.base import Head
from redrafter.training.outcome import Measurement
from redrafter.training.recipe import Recipe
from redrafter.utils import hub


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training run."""

    rows: list[Row]
    recipe: Recipe
    loss: float
    """The last logged loss, summed over draft positions; `Objective.describe_loss` gives the unit."""
    steps: int
    acceptance: Acceptance | None
    """On held-out rows, if there were any."""
    sources: list[str]
    """Names of files, or ids of data sets on the hub."""
    licence: str | None
    epochs: float
    seconds: float
    """Wall-clock time of training, with measurements and checkpoints; for a resumed run, since then."""
    measured: list[Measurement] = field(default_factory=list)
    """All measurements on held-out rows."""

    @property
    def tokens(self) -> int:
        """Approximate number of tokens read, prompts included."""
        return round(self.epochs * sum(len(row.input_ids) for row in self.rows))


def card(drafter: Head, result: TrainingResult) -> str:
    """The text of `README.md`."""
    config, recipe = drafter.config, result.recipe
    name = config.target or "an unnamed model"
    revision = f", revision {config.target_revision}" if config.target_revision else ""
    learned = sum(sum(row.trained) for row in result.rows)
    data = f" of {', '.join(result.sources)}" if result.sources else ""
    continued = any(row.continuations for row in result.rows)
    teacher = "the target's own continuations" if continued else "the tokens of the rows"
    objective = ", ".join(
        f"{part.name.replace('_', '-')} {value:g}"
        for part in fields(recipe.objective)
        if (value := getattr(recipe.objective, part.name)) and (part.name, value) != ("decay", 1.0)
    )
    covered = ""
    if drafter.draft_vocabulary is not None:
        covered = f", which are {coverage(result.rows, drafter.draft_vocabulary):.2%} of those to learn"
    clock = "" if recipe.seconds is None else f", in {recipe.seconds:g} s"
    share = f", with {recipe.window_share:.0%} of the windows" if recipe.window_share < 1 else ""
    steps = f"{result.steps:,} of {recipe.batch_size} x {recipe.accumulation}{share}{clock}"
    entries = {
        "target": f"{name}{revision}",
        "parameters": f"{hub.count_parameters(drafter):,}",
        "head": f"{config.head_description}{covered}",
        "context": config.context_description,
        "data": f"{len(result.rows):,} rows with {learned:,} tokens to learn{data}",
        "license of the data": result.licence or "not given",
        "labels": f"{teacher}, teacher-forced over {config.beam_length} draft positions",
        "objective": objective,
        "steps": f"{steps}, learning rate {recipe.learning_rate:g}",
        "last loss": recipe.objective.describe_loss(result.loss, config.beam_length),
        **_acceptance(result.acceptance, drafter),
        "versions": f"redrafter {__version__}, torch {torch.__version__}, transformers {TRANSFORMERS}",
    }
    usage = (
        "Use it with `redrafter generate --model MODEL --drafter THIS_FOLDER --prompt TEXT`, or in transformers with"
    )
    lines = [
        *_front_matter(result, config.target),
        "",
        f"# {config.kind[0].upper()}{config.kind[1:]} for {name}",
        "",
        usage,
        "`model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {entry} | {value} |" for entry, value in entries.items()),
        "",
    ]
    return "\n".join(lines)


def _front_matter(result: TrainingResult, target: str | None) -> list[str]:
    lines = ["---", "library_name: redrafter"]
    lines += [f"base_model: {target}"] if target else []
    lines += [f"license: {result.licence}"] if result.licence else []
    datasets = [source.partition(":")[0] for source in result.sources if "/" in source]
    lines += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    return [*lines, "tags:", "- speculative-decoding", "- custom_generate", "---"]


def _acceptance(acceptance: Acceptance | None, drafter: Head) -> dict[str, str]:
    if acceptance is None:
        return {"acceptance": "not measured: no rows were held out"}
    length, shape = acceptance.mean_acceptance_length, drafter.config.shape_description
    return {
        "mean acceptance length": f"{length:.2f} tokens per step ({shape}), at every position of held-out rows",
        "accepted by position": ", ".join(f"{rate:.0%}" for rate in acceptance.rates),
    }
