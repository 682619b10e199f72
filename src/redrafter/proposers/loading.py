"""Loads a drafting method from a folder, a hub id or a name.  The folder's `config.json` says which kind it is."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from redrafter.errors import RedrafterError, reason
from redrafter.heads.base import Head
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.proposers.automatic import LikelyLookup, automatic
from redrafter.proposers.methods import HEADS, Drafter
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.proposers.two_model import TwoModel
from redrafter.targets.target import Target
from redrafter.utils import hub
from redrafter.utils.paths import AUTO, PROMPT_LOOKUP


def load_drafter(path: str | Path, model: PreTrainedModel, *, any_target: bool = False) -> Drafter:
    """A drafter for `model`, on its device and in its dtype.

    `path` is the folder or hub id of a head or of a causal language model (which then drafts), "prompt-lookup", or
    "auto" for what `automatic` chooses.
    Raises RedrafterError if nothing is there, or if a head was trained for another model and `any_target` is false.
    """
    if str(path) == PROMPT_LOOKUP:
        return PromptLookup()
    if str(path) == AUTO:
        chosen = automatic(model).path
        if chosen is None:
            return LikelyLookup()
        path = chosen
    kind = kind_of(path)
    if kind is None:
        return TwoModel(_draft_model(path, Target(model)))
    return kind.from_pretrained(path, target=model, any_target=any_target)


_loaded: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[object, Drafter]]]
_loaded = weakref.WeakKeyDictionary()
"""The results of `cached_drafter` for each model, by path, with the state that they depend on."""


def cached_drafter(path: str | Path, model: PreTrainedModel) -> Drafter:
    """The result of `load_drafter`, kept between calls.

    It is loaded again after the model was moved or converted, and after files of a local folder changed.  Raises
    RedrafterError as `load_drafter` does.
    """
    if str(path) == AUTO:
        path = automatic(model).path or AUTO
    folder, known, name = Path(path), _loaded.setdefault(model, {}), str(path)
    files = [file.stat() for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
    state = (model.device, model.dtype, [(file.st_ino, file.st_mtime_ns, file.st_size) for file in files])
    if name not in known or known[name][0] != state:
        known[name] = state, load_drafter(path, model)
    return known[name][1]


def load_head(path: str | Path) -> Head:
    """A head from its folder or hub id.  Raises RedrafterError if it is not a head."""
    kind = kind_of(path)
    if kind is None:
        raise RedrafterError(f"{path} is a model, {PROMPT_LOOKUP} or {AUTO}, not the folder of a drafter.")
    return kind.from_pretrained(path)


def kind_of(path: str | Path) -> type[Head] | None:
    """The class of the head in a folder; None for prompt lookup, for "auto" and for a causal language model.

    Unknown folders count as RecurrentDrafter, whose loader reports missing files.
    """
    if str(path) in (PROMPT_LOOKUP, AUTO):
        return None
    config = hub.config_of(path)
    kind = HEADS.get(str(config.get("model_type")))
    return RecurrentDrafter if kind is None and "architectures" not in config else kind


def _draft_model(path: str | Path, target: Target) -> PreTrainedModel:
    try:
        with hub.reading(path):
            draft: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=target.dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RedrafterError(f"The draft model {path} cannot be loaded: {reason(error)}.") from error
    return draft.to(torch.device(target.device)).eval()
