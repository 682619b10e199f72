"""A method of drafting from where it lies: what kind it is, the folder's `config.json` tells.

A method with weights of its own is added here, by the `model_type` that its folders bear.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from redrafter import hub
from redrafter.drafter import RecurrentDrafter
from redrafter.eagle import EagleHead
from redrafter.errors import RedrafterError
from redrafter.head import Head
from redrafter.medusa import MedusaHeads
from redrafter.proposers.base import Method
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.proposers.two_model import TwoModel
from redrafter.target import Target

KINDS: dict[str, type[Head]] = {
    kind.config_type.model_fields["model_type"].default: kind for kind in (RecurrentDrafter, MedusaHeads, EagleHead)
}
"""Heads by the `model_type` in their folders."""

PROMPT_LOOKUP = "prompt-lookup"
"""What stands for a path where nothing is loaded."""


def load_method(path: str | Path, model: PreTrainedModel, bits: int = 16) -> Method:
    """What drafts for `model`, on its device and in its dtype.

    `path`: a drafter's folder or hub id, that of a causal language model, which then drafts, or `prompt-lookup`.
    `bits`: of a weight of a recurrent drafter's head, 16 or 8.  Raises RedrafterError where there is no such thing or
    it was made for another model.
    """
    looked_up = str(path) == PROMPT_LOOKUP
    told = {} if looked_up else hub.config_of(path)
    kind = str(told.get("model_type"))
    modelled = kind not in KINDS and "architectures" in told
    recurrent = not (looked_up or modelled) and KINDS.get(kind, RecurrentDrafter) is RecurrentDrafter
    if bits != 16 and not recurrent:
        raise RedrafterError(f"Only a recurrent drafter's head can have {bits} bits, and {path} is none.")
    if looked_up:
        return PromptLookup()
    if modelled:
        return TwoModel(_draft_model(path, Target(model)))
    if bits != 16:
        return RecurrentDrafter.from_pretrained(path, target=model, bits=bits)
    return load_head(path, model)


def load_head(path: str | Path, model: PreTrainedModel | None = None) -> Head:
    """A head from its folder or hub id, of the kind that it says.  Raises RedrafterError for a folder of no kind."""
    kind = KINDS.get(str(hub.config_of(path).get("model_type")), RecurrentDrafter)  # which says what is wrong
    return kind.from_pretrained(path, target=model)


def _draft_model(path: str | Path, target: Target) -> PreTrainedModel:
    try:
        draft: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=target.dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RedrafterError(f"The draft model {path} cannot be loaded: {reason}.") from error
    return draft.to(torch.device(target.device)).eval()
