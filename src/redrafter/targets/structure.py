"""What can be read from a model and its config without running it.

Raises RedrafterError for models whose structure rules out draft trees, with the reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redrafter.errors import RedrafterError
from redrafter.utils.paths import GGUF

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers of PEFT, whose adapters stay active, and of `torch.compile`.

    Code compiled by `torch.compile` is not used: decoding runs the model itself.  Raises RedrafterError for other
    models.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise RedrafterError("Adapters that put virtual tokens before the prompt are not supported; LoRA is.")
        model = getattr(model.get_base_model(), "_orig_mod", model.get_base_model())
    if not isinstance(model, PreTrainedModel):
        raise RedrafterError(f"{type(model).__name__} is not a transformers model.")
    return model


def refusal(model: nn.Module, reason: str) -> RedrafterError:
    """The error for a model that cannot verify draft trees."""
    return RedrafterError(f"{type(model).__name__} cannot verify draft trees: {reason}.")


def check_structure(model: PreTrainedModel, config: Any) -> None:
    """Raises RedrafterError if the model's class or config rules out draft trees."""
    attention = getattr(model.config, "_attn_implementation", None)
    types = set(getattr(config, "layer_types", None) or [])
    reason = None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        reason = "it has no language-model head"
    elif getattr(model, "_is_stateful", False):
        reason = "it keeps a recurrent state, which cannot branch"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "it takes no position_ids, so branches cannot share a position"
    elif not types <= _LAYER_TYPES:
        reason = f"its layers of type {', '.join(sorted(types - _LAYER_TYPES))} take no tree mask"
    elif attention not in ("sdpa", "eager"):
        reason = f"its attention implementation {attention} takes no tree mask; load it with attn_implementation='sdpa'"
    if reason is not None:
        raise refusal(model, reason)


def device_of(layer: nn.Module) -> torch.device:
    """The device on which a layer computes.  accelerate keeps offloaded weights on the meta device between calls."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return weight.device if weight.device.type != "meta" or device is None else torch.device(device)


def context_length(config: Any) -> int | None:
    """The number of positions in which a text does not depend on its batch; None if the config does not say.

    With longrope (arXiv 2402.13753), a forward pass beyond the original context uses other frequencies for every
    position of every row, so that a draft or another row would change a text before that text is so long.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or one per type
    short = [one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"]
    lengths = [getattr(config, "max_position_embeddings", None), *short]
    return min((length for length in lengths if length is not None), default=None)


def sliding_window(config: Any) -> int | None:
    """The attention window of the layers; None for full attention."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def decoder_layers(model: PreTrainedModel, config: Any) -> list[nn.Module]:
    """The decoder's layers in order; empty if the model has no list of them."""
    count = config.num_hidden_layers
    lists = [list(part) for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return lists[0] if lists else []


def numbered_layers(model: PreTrainedModel, config: Any, numbers: Sequence[int]) -> list[nn.Module]:
    """The decoder's layers with these numbers, from 1.  Raises RedrafterError if they cannot be read."""
    if not numbers:
        return []
    count = config.num_hidden_layers
    if list(numbers) != sorted(set(numbers)) or not 1 <= numbers[0] <= numbers[-1] < count:
        raise RedrafterError(f"context_layers must be distinct numbers from 1 to {count - 1}, sorted, not {numbers}.")
    layers = decoder_layers(model, config)
    if not layers:
        raise RedrafterError(f"{type(model).__name__} has no list of layers, so context_layers are not supported.")
    return [layers[number - 1] for number in numbers]


def public_name(name: str | None) -> str | None:
    """A hub id unchanged; for a local folder only its base name, so that no local path is published."""
    if not name:
        return None
    folder = Path(name)
    return base_name(str(folder.resolve())) if folder.exists() or folder.is_absolute() else name


def base_name(name: str) -> str:
    """The last part of a hub id or path, also inside the hub's cache folders.

    For a GGUF file it is the model's name, without the ending for the kind of quantisation.
    """
    parts = Path(name).parts
    if parts[-1].endswith(GGUF):
        return _QUANTISATION.sub("", parts[-1].removesuffix(GGUF))
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else parts[-1]


_QUANTISATION = re.compile(r"[.-](I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)
"""How names of GGUF files end: `.Q4_1`, `-Q4_K_M`, `-IQ3_XS`, `.F16`."""
