"""Values that `redrafter train` chooses if the user does not: epochs, draft vocabulary and width of the head.

Guarantees that a choice depends only on the data, the model and the kind of device, so that a command makes the same
choice with `--resume`, and that each has a reason.  Does not measure anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from redrafter.data.examples import Row, vocabulary_size_for
from redrafter.targets.target import Target
from redrafter.training.recipe import processes

MIN_STEPS = 600
"""Optimiser steps that a run should have: after that the curve of held-out acceptance is flat."""

MIN_EPOCHS, MAX_EPOCHS = 2, 20
"""Epochs: the released script's number, and the maximum for small data sets."""

SMALL_VOCABULARY = 2048
"""Vocabulary size up to which all tokens are drafted, because the output layer is cheap."""

COVERAGE = {"cpu": 0.98, "gpu": 0.999}
"""Fraction of the tokens to learn that a draft vocabulary must contain.  A CPU pays for each row of the output
layer."""

MIN_DRAFT_VOCABULARY = 256
"""Minimum size of a draft vocabulary: beams need candidates."""

MAX_VOCABULARY_SHARE = 0.75
"""Fraction of the vocabulary up to which a draft vocabulary saves time."""

HEAD_SHARE = 0.05
"""Parameters of the head relative to the target's, above which a narrower head is trained on a CPU."""


@dataclass(frozen=True)
class Default:
    """A value and the reason for it, which names the option that overrides it."""

    value: int | None
    reason: str


def default_epochs(groups: int, batch_size: int, accumulation: int) -> Default:
    """Epochs over a number of rows or groups of packed rows."""
    per_epoch = math.ceil(math.ceil(groups / (batch_size * processes())) / accumulation)
    epochs = min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(MIN_STEPS / per_epoch)))
    reason = f"{epochs} epochs of {per_epoch:,} steps"
    if epochs > MIN_EPOCHS:
        reason += f", because {groups:,} rows are few (the goal is {MIN_STEPS} steps in at most {MAX_EPOCHS} epochs)"
    return Default(epochs, f"{reason} (--epochs)")


def default_vocabulary(rows: list[Row], vocabulary: int, device: torch.device) -> Default:
    """Number of most frequent tokens to draft; None for all."""
    if vocabulary <= SMALL_VOCABULARY:
        return Default(
            None, f"all {vocabulary:,} tokens are drafted, because the vocabulary is small (--draft-vocabulary)"
        )
    share = COVERAGE["cpu" if device.type == "cpu" else "gpu"]
    count = max(vocabulary_size_for(rows, share), min(MIN_DRAFT_VOCABULARY, vocabulary_size_for(rows, 1.0)))
    if not MIN_DRAFT_VOCABULARY <= count <= MAX_VOCABULARY_SHARE * vocabulary:
        amount = "most" if count > MIN_DRAFT_VOCABULARY else "too few"
        reason = (
            f"all {vocabulary:,} tokens are drafted, because the data contains {amount} of them (--draft-vocabulary)"
        )
        return Default(None, reason)
    reason = f"{count:,} of {vocabulary:,} tokens are drafted, which are {share:.1%} of the tokens to learn"
    return Default(count, f"{reason} (--draft-vocabulary)")


def default_width(target: Target, blocks: int, drafted: int, device: torch.device) -> Default:
    """Width of the recurrent head; None for twice the target's hidden size."""
    hidden = target.hidden_size
    wide, narrow = (head_parameters(hidden, width, blocks, drafted) for width in (2 * hidden, hidden))
    small = wide <= max(2**20, HEAD_SHARE * sum(parameter.numel() for parameter in target.model.parameters()))
    if device.type != "cpu" or small:
        return Default(None, f"the head is {2 * hidden:,} wide, twice the model's hidden size (--exit-dim)")
    reason = f"the head is {hidden:,} wide, like the model's hidden size: {narrow / 1e6:.1f} M parameters instead of "
    return Default(hidden, f"{reason}{wide / 1e6:.1f} M, because this runs on a CPU (--exit-dim)")


def head_parameters(hidden: int, width: int, blocks: int, drafted: int) -> int:
    """Parameters of a recurrent drafter without biases: recurrence, projection, blocks and output layer."""
    projection = 0 if width == 2 * hidden else 2 * hidden * width
    return 2 * hidden**2 + projection + blocks * width**2 + drafted * width
