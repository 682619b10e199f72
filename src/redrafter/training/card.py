"""The model card of a trained drafter, filled from its run.

Promises that nothing stands in it that the run did not see.  Does not know the trainer.
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
class Run:
    """What the card tells of a training run that has ended."""

    rows: list[Row]
    recipe: Recipe
    loss: float
    """The last one logged, summed over draft positions; `Objective.description` says its unit."""
    steps: int
    found: Acceptance | None
    """On held-out rows, where there were any."""
    sources: list[str]
    """Names of files, or ids of data sets on the hub."""
    licence: str | None
    epochs: float
    """Times that the rows were seen."""
    seconds: float
    """Of training by the clock, held-out rows and checkpoints counted; of a run that was resumed, since then."""
    measured: list[Measurement] = field(default_factory=list)
    """On held-out rows, in the course of the run."""

    @property
    def tokens(self) -> int:
        """About how many were read, those of prompts counted."""
        return round(self.epochs * sum(len(row.input_ids) for row in self.rows))


def card(drafter: Head, run: Run) -> str:
    """The text of `README.md`."""
    config, recipe = drafter.config, run.recipe
    name = config.target or "an unnamed model"
    learnt = sum(sum(row.trained) for row in run.rows)
    data = f" of {', '.join(run.sources)}" if run.sources else ""
    teacher = "the target's own continuations" if any(row.continuations for row in run.rows) else "the rows' own tokens"
    objective = ", ".join(
        f"{part.name.replace('_', '-')} {value:g}"
        for part in fields(recipe.objective)
        if (value := getattr(recipe.objective, part.name)) and (part.name, value) != ("decay", 1.0)
    )
    covered = ""
    if drafter.draft_vocabulary is not None:
        covered = f", which are {coverage(run.rows, drafter.draft_vocabulary):.2%} of those to learn"
    clock = "" if recipe.seconds is None else f", which took {recipe.seconds:g} s"
    share = f", a share of {recipe.window_share:g} of the places" if recipe.window_share < 1 else ""
    return "\n".join(
        [
            *_front_matter(run, config.target),
            "",
            f"# {config.kind[0].upper()}{config.kind[1:]} for {name}",
            "",
            "Use it with `redrafter generate --model MODEL --drafter THIS_FOLDER --prompt TEXT`, or in transformers by",
            "`model.generate(**inputs, custom_generate=THIS_FOLDER, trust_remote_code=True)`.",
            "",
            "| | |",
            "|---|---|",
            f"| target | {name}{f', revision {config.target_revision}' if config.target_revision else ''} |",
            f"| parameters | {hub.count_parameters(drafter):,} |",
            f"| head | {config.head_description}{covered} |",
            f"| context | {config.context_description} |",
            f"| data | {len(run.rows):,} rows with {learnt:,} tokens to learn{data} |",
            f"| licence of the data | {run.licence or 'not told'} |",
            f"| learnt from | {teacher}, teacher-forced over {config.beam_length} draft positions |",
            f"| objective | {objective} |",
            f"| steps | {run.steps:,} of {recipe.batch_size} x {recipe.accumulation}{share}{clock}, rate "
            f"{recipe.learning_rate:g} |",
            f"| last loss | {recipe.objective.in_words(run.loss, config.beam_length)} |",
            *_acceptance(run.found, drafter),
            f"| versions | redrafter {__version__}, torch {torch.__version__}, transformers {TRANSFORMERS} |",
            "",
        ]
    )


def _front_matter(run: Run, target: str | None) -> list[str]:
    lines = ["---", "library_name: redrafter"]
    lines += [f"base_model: {target}"] if target else []
    lines += [f"license: {run.licence}"] if run.licence else []
    known = [source.partition(":")[0] for source in run.sources if "/" in source]
    lines += ["datasets:", *(f"- {name}" for name in known)] if known else []
    return [*lines, "tags:", "- speculative-decoding", "- custom_generate", "---"]


def _acceptance(found: Acceptance | None, drafter: Head) -> list[str]:
    if found is None:
        return ["| acceptance | not measured: no rows were held out |"]
    rates = ", ".join(f"{rate:.0%}" for rate in found.rates)
    return [
        f"| mean acceptance length | {found.mean_acceptance_length:.2f} tokens a step "
        f"({drafter.config.shape_description}), at every place of held-out rows |",
        f"| accepted by position | {rates} |",
    ]
