"""What `redrafter train` chooses where the user does not: epochs, draft vocabulary and width of the head.

Promises that a choice depends on the data, the model and the kind of device alone, so that the same command, also with
`--resume`, makes the same one, and that each is explained.  Does not measure anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from redrafter.data.examples import Row, kinds_for
from redrafter.targets.target import Target
from redrafter.training.recipe import processes

STEPS = 600
"""Optimiser steps that a run should have at least: by then the curve of held-out acceptance has flattened."""

FEWEST, MOST = 2, 20
"""Epochs: the released script's, and how often a small set of rows is repeated at most."""

SMALL_VOCABULARY = 2048
"""Tokens of a vocabulary that is drafted whole: its output layer costs little."""

COVERAGE = {"cpu": 0.98, "gpu": 0.999}
"""Share of the tokens to learn that a draft vocabulary must hold.  A CPU pays for each row of the output layer."""

FEWEST_TOKENS = 256
"""Tokens of a part of a vocabulary, at least: beams need candidates."""

WORTH_IT = 0.75
"""Share of the vocabulary below which drafting a part of it pays."""

HEAD_SHARE = 0.05
"""Parameters of the head, as a share of the target's, from which a CPU trains and drafts with a narrower one."""


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it, which names the option that overrides it."""

    value: int | None
    reason: str


def epochs_for(groups: int, batch_size: int, accumulation: int) -> Choice:
    """Epochs over so many rows, or groups of packed ones."""
    per_epoch = math.ceil(math.ceil(groups / (batch_size * processes())) / accumulation)
    epochs = min(MOST, max(FEWEST, math.ceil(STEPS / per_epoch)))
    why = f"{epochs} epochs of {per_epoch:,} steps"
    if epochs > FEWEST:
        why += f", because {groups:,} rows are few: about {STEPS} steps are needed, and {MOST} epochs are the most"
    return Choice(epochs, f"{why} (--epochs)")


def vocabulary_for(rows: list[Row], vocabulary: int, device: torch.device) -> Choice:
    """Tokens to draft, the most frequent ones of the data; None for all."""
    if vocabulary <= SMALL_VOCABULARY:
        return Choice(None, f"all {vocabulary:,} tokens are drafted, which is a small vocabulary (--draft-vocabulary)")
    share = COVERAGE["cpu" if device.type == "cpu" else "gpu"]
    count = max(kinds_for(rows, share), min(FEWEST_TOKENS, kinds_for(rows, 1.0)))
    if not FEWEST_TOKENS <= count <= WORTH_IT * vocabulary:
        why = "most" if count > FEWEST_TOKENS else "too few"
        return Choice(None, f"all {vocabulary:,} tokens are drafted: the data has {why} of them (--draft-vocabulary)")
    why = f"{count:,} of {vocabulary:,} tokens are drafted, which are {share:.1%} of the tokens to learn"
    return Choice(count, f"{why} (--draft-vocabulary)")


def width_for(target: Target, blocks: int, drafted: int, device: torch.device) -> Choice:
    """Width of the recurrent head; None for twice the target's hidden size."""
    hidden = target.hidden_size
    whole = sum(parameter.numel() for parameter in target.model.parameters())
    wide, narrow = (_parameters(hidden, width, blocks, drafted) for width in (2 * hidden, hidden))
    if device.type != "cpu" or wide <= HEAD_SHARE * whole or wide <= 2**20:
        return Choice(None, f"the head is {2 * hidden:,} wide, twice the model's hidden size (--exit-dim)")
    why = f"the head is {hidden:,} wide, as the model's hidden size: {narrow / 1e6:.1f} M parameters instead of "
    return Choice(hidden, f"{why}{wide / 1e6:.1f} M, since this runs on a CPU (--exit-dim)")


def _parameters(hidden: int, width: int, blocks: int, drafted: int) -> int:
    """Of a recurrent drafter: recurrence, projection, blocks and output layer, without biases."""
    projection = 0 if width == 2 * hidden else 2 * hidden * width
    return 2 * hidden**2 + projection + blocks * width**2 + drafted * width
