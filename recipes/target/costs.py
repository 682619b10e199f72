"""Compute costs of a comparison: the target's native size, or padded to a larger one together with its drafters.

Guarantees that draft models keep the proportions of published pairs.  Does not know how they were trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recipes.common.answers import put
from recipes.target import stages
from recipes.target.grown import grown_head, grown_target
from recipes.target.stages import say
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redrafter import RecurrentDrafter, RedrafterError
from redrafter.heads.base import Head
from redrafter.proposers.loading import load_head

DRAFT, SMALL = "draft", "draft-small"
"""Draft models, which are trained on text before they learn the target's answers; all others are heads."""

PUBLISHED = {"hidden": 768, "layers": 2, "heads": 12, "inner": 3072}
"""What the small draft model grows to: the shape of https://huggingface.co/JackFram/llama-68m, which drafts for 7B."""

EXIT = {"recurrent-released": 2}
"""Width of a grown recurrent drafter's head in hidden sizes, where it is not one: this is the released form."""


def grown(given: argparse.Namespace, target: Path, there: Mapping[str, Path], begin: float) -> dict[str, Path]:
    """Folders of `target` and its drafters, padded to a larger shape; without drafters that cannot be padded."""
    folder = given.output / "grown"
    sizes = {"hidden": given.hidden, "heads": given.heads, "inner": given.inner}
    kind: dict[str, Any] = {"device": stages.device(), "dtype": torch.bfloat16}
    torch.manual_seed(0)

    def model(name: str, source: Path) -> PreTrainedModel:
        own = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        larger = sizes | {"layers": given.grown_layers}
        if name != "target":
            larger = grown_draft(name, larger, own.config, AutoConfig.from_pretrained(target))
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
        return grown_target(own, **larger, **kind)

    def head(name: str, source: Path) -> Head:
        own = load_head(source)
        exit_dim = None
        if isinstance(own, RecurrentDrafter):
            exit_dim = max(own.config.exit_dim, EXIT.get(name, 1) * given.hidden)
        return grown_head(own, target="target", exit_dim=exit_dim, **sizes, **kind)

    found = {}
    for name, source in ({"target": target} | dict(there)).items():
        if not (folder / f"{name}.json").exists():
            try:
                new = (model if name in ("target", DRAFT, SMALL) else head)(name, source)
            except RedrafterError as error:
                if name == "target":
                    raise
                say(begin, f"{name} cannot grow: {error}")
                continue
            new.save_pretrained(folder / name)
            parameters = sum(one.numel() for one in new.parameters())
            put(folder / f"{name}.json", {"parameters": parameters})
            say(begin, f"{name} has grown to {parameters:,} parameters")
            del new
        found[name] = folder / name
    return found


def grown_draft(name: str, larger: dict[str, int], own: Any, target: Any) -> dict[str, int]:
    """The shape of a draft model whose target is padded to `larger`; both configs are those before padding.

    The larger draft model keeps its proportions to the target, the small one becomes as PUBLISHED.
    """
    if name == SMALL:
        return PUBLISHED
    words = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
    }
    return {key: round(size * getattr(own, words[key]) / getattr(target, words[key])) for key, size in larger.items()}
