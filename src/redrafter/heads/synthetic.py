"""Random models of well-known shapes, for timing without a download.

Guarantees random, non-zero weights, created on their device in their dtype.  Does not know what is timed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from redrafter.errors import RedrafterError
from redrafter.heads.recurrent import RecurrentDrafter
from redrafter.utils.memory import check_left


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        **more,
    }


SHAPES = {
    "llama-7b": _llama(4096, 32, 32, 32, 11008, 32000, max_position_embeddings=4096),
    "llama-8b": _llama(4096, 32, 32, 8, 14336, 128256, max_position_embeddings=131072),
    "llama-1b": _llama(2048, 16, 32, 8, 8192, 128256, max_position_embeddings=131072, tie_word_embeddings=True),
    "tiny": _llama(64, 2, 4, 2, 128, 256, max_position_embeddings=256),
}
"""Llama 2 7B (and Vicuna 7B), Llama 3.1 8B, Llama 3.2 1B, and a tiny model for tests."""


def random_model(shape: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with random weights.

    Raises RedrafterError for an unknown shape, and if the device has no room for the weights.
    """
    if shape not in SHAPES:
        raise RedrafterError(f"{shape} is not one of the shapes {', '.join(SHAPES)}.")
    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    check_left(
        device,
        sum(one.nbytes for one in model.parameters()),
        f"The weights of {shape} in {str(dtype).removeprefix('torch.')}",
        "choose a smaller shape, or a dtype of fewer bits",
    )
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its tables are not parameters
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=config.initializer_range)
            else:  # normalisation layers
                weight.fill_(1)
    return model.eval()


def random_drafter(
    model: PreTrainedModel, exit_dim: int | None = None, draft_vocabulary: int | None = None
) -> RecurrentDrafter:
    """An untrained drafter of the published form, on its target's device and in its dtype.

    `draft_vocabulary` is the number of tokens that it scores; default: all.  Raises RedrafterError if there are fewer.
    """
    if draft_vocabulary is not None and not 1 <= draft_vocabulary <= model.config.get_text_config().vocab_size:
        raise RedrafterError(f"A draft vocabulary of {draft_vocabulary} exceeds the model's vocabulary.")
    ids = None if draft_vocabulary is None else torch.arange(draft_vocabulary)
    with model.device:  # large weights are created on their device
        drafter = RecurrentDrafter.for_target(model, exit_dim=exit_dim, draft_vocabulary=ids)
    return drafter.to(model.dtype).eval()
