"""Names of models and drafters: which are local paths and which may be repositories on the hub.

Imports nothing heavy, so that commands can report a missing folder at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from redrafter.errors import RedrafterError

PROMPT_LOOKUP = "prompt-lookup"
"""Stands for a drafter that needs no folder."""

_REPO_ID = re.compile(r"(?=.{1,96}$)[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""The form of a hub id, with or without a namespace (as `huggingface_hub.utils.validate_repo_id` has it)."""


def may_be_on_the_hub(path: str | Path) -> bool:
    """Whether there is no such path and it has the form of a hub id: `OWNER/NAME`, or `NAME` as in `distilgpt2`."""
    name = str(path)
    if name == PROMPT_LOOKUP:
        return False
    well_formed = _REPO_ID.fullmatch(name) and "--" not in name and ".." not in name
    return bool(well_formed) and name[-1] not in ".-" and not name.endswith(".git") and not Path(path).exists()


def check_model_path(path: str | Path | None) -> None:
    """Raises RedrafterError if `path` is neither a folder nor a possible hub id.  None is accepted."""
    if path is None or Path(path).is_dir() or may_be_on_the_hub(path):
        return
    if Path(path).exists():
        raise RedrafterError(f"{path} is a file, not a model folder.")
    raise RedrafterError(f"There is no model folder at {path}.")


def check_drafter_path(path: str | Path | None) -> None:
    """Raises RedrafterError if `path` is neither a folder, a possible hub id nor prompt lookup.  None is accepted."""
    if path is None or str(path) == PROMPT_LOOKUP or Path(path).is_dir() or may_be_on_the_hub(path):
        return
    raise RedrafterError(f"There is no drafter folder at {path}.")
