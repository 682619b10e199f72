"""A method of drafting from where it lies: its kind is told by the folder's `config.json`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from redrafter.drafter import RecurrentDrafter
from redrafter.proposers.base import Method


def load_method(path: str | Path, model: PreTrainedModel) -> Method:
    """What lies at a folder or hub id, to draft for `model` on its device.  Raises RedrafterError."""
    return RecurrentDrafter.from_pretrained(path, target=model)
