"""A method of drafting from where it lies: what kind it is, the folder's `config.json` tells.

A method with weights of its own is added here, by the `model_type` that its folders bear.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from redrafter.errors import RedrafterError, reason
from redrafter.heads.base import Head
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.proposers.base import Method
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.proposers.two_model import TwoModel
from redrafter.targets.target import Target
from redrafter.utils import hub
from redrafter.utils.paths import PROMPT_LOOKUP

KINDS: dict[str, type[Head]] = {
    kind.config_type.model_fields["model_type"].default: kind for kind in (RecurrentDrafter, MedusaHeads, EagleHead)
}
"""Heads by the `model_type` in their folders."""


def load_method(path: str | Path, model: PreTrainedModel, bits: int = 16, *, any_target: bool = False) -> Method:
    """What drafts for `model`, on its device and in its dtype.

    `path`: a drafter's folder or hub id, that of a causal language model, which then drafts, or `prompt-lookup`.
    `bits`: of a weight of a recurrent drafter's head, 16 or 8.  Raises RedrafterError if there is no such thing, or if
    it was made for another model and `any_target` does not allow that.
    """
    kind = kind_of(path)
    if kind is RecurrentDrafter:
        return RecurrentDrafter.from_pretrained(path, target=model, any_target=any_target, bits=bits)
    if bits != 16:
        raise RedrafterError(f"Only a recurrent drafter's head can have {bits} bits, and {path} is none.")
    if str(path) == PROMPT_LOOKUP:
        return PromptLookup()
    if kind is None:
        return TwoModel(_draft_model(path, Target(model)))
    return kind.from_pretrained(path, target=model, any_target=any_target)


_loaded: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[object, Method]]] = weakref.WeakKeyDictionary()
"""What `named` has loaded for each model, by name, with all that it depends on."""


def named(path: str | Path, model: PreTrainedModel) -> Method:
    """What `load_method` loads, kept from call to call.

    It is loaded again where the model has moved or changed its dtype, and where the files of a local folder have
    changed.  Raises RedrafterError as `load_method` does.
    """
    folder, known, name = Path(path), _loaded.setdefault(model, {}), str(path)
    files = [one.stat() for one in sorted(folder.iterdir()) if one.is_file()] if folder.is_dir() else []
    state = (model.device, model.dtype, [(one.st_ino, one.st_mtime_ns, one.st_size) for one in files])
    if name not in known or known[name][0] != state:
        known[name] = state, load_method(path, model)
    return known[name][1]


def load_head(path: str | Path) -> Head:
    """A head from its folder or hub id, of the kind that it says.  Raises RedrafterError for what is no head's."""
    kind = kind_of(path)
    if kind is None:
        raise RedrafterError(f"{path} is a model or {PROMPT_LOOKUP}, not the folder of a drafter.")
    return kind.from_pretrained(path)


def kind_of(path: str | Path) -> type[Head] | None:
    """Of the head that lies there; None for prompt lookup and for a causal language model.

    What is neither is taken for a recurrent drafter, which says what it lacks.
    """
    if str(path) == PROMPT_LOOKUP:
        return None
    told = hub.config_of(path)
    found = KINDS.get(str(told.get("model_type")))
    return RecurrentDrafter if found is None and "architectures" not in told else found


def _draft_model(path: str | Path, target: Target) -> PreTrainedModel:
    try:
        with hub.reading(path):
            draft: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=target.dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RedrafterError(f"The draft model {path} cannot be loaded: {reason(error)}.") from error
    return draft.to(torch.device(target.device)).eval()
