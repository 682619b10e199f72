"""Tells local paths of models and drafters from possible Hub ids.

Imports nothing heavy, so that commands report a missing folder at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from redrafter.errors import RedrafterError

PROMPT_LOOKUP = "prompt-lookup"
"""The name to give instead of a drafter folder, for prompt lookup."""

AUTO = "auto"
"""The name to give instead of a drafter folder, for the drafter of the model if one is known, else prompt lookup."""

GGUF = ".gguf"
"""Ending of model files that llama.cpp reads, usually quantised."""

_REPO_ID = re.compile(r"(?=.{1,96}$)[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""Hub ids with or without a namespace, as in `huggingface_hub.utils.validate_repo_id`."""


def may_be_on_the_hub(path: str | Path) -> bool:
    """Whether `path` does not exist locally and has the form of a Hub id: `OWNER/NAME` or `NAME`."""
    name = str(path)
    if name in (PROMPT_LOOKUP, AUTO):
        return False
    well_formed = _REPO_ID.fullmatch(name) and "--" not in name and ".." not in name
    return bool(well_formed) and name[-1] not in ".-" and not name.endswith(".git") and not Path(path).exists()


def split_gguf(path: str) -> tuple[str, str | None]:
    """The folder or Hub id in the path of a GGUF file, and the file's name; other paths as they are, and None."""
    if not path.endswith(GGUF):
        return path, None
    folder, _, name = path.rpartition("/")
    return folder or ".", name


def check_model_path(path: str | Path | None) -> None:
    """Raises RedrafterError if `path` is neither None, a folder, a possible Hub id nor a GGUF file in one of them."""
    if path is None:
        return
    folder, name = split_gguf(str(path))
    if Path(folder).is_dir() if name is None else Path(path).is_file():
        return
    if may_be_on_the_hub(folder):
        return
    if Path(path).is_file():
        raise RedrafterError(f"{path} is a file, neither a model folder nor a {GGUF} file.")
    raise RedrafterError(f"There is no model {'folder' if name is None else 'file'} at {path}.")


def check_drafter_path(path: str | Path | None) -> None:
    """Raises RedrafterError if `path` is neither None, a folder, a possible Hub id nor one of the two names."""
    if path is None or str(path) in (PROMPT_LOOKUP, AUTO) or Path(path).is_dir() or may_be_on_the_hub(path):
        return
    raise RedrafterError(f"There is no drafter folder at {path}.")
