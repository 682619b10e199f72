"""Shape and training data of the benchmark target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.corpus import Corpus
from transformers import AutoConfig, PretrainedConfig

PEAK_RATE = 1.2e-3
CATEGORIES = {"dialogue": "sgd", "open questions": "alpaca_eval_prompts", "maths": "gsm8k_test"}
"""What is measured, and where its prompts come from: held-out rows of a training file, or an evaluation file."""

HEAD = 64  # numbers of an attention head

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "gemma3_text": {"query_pre_attn_scalar": HEAD, "sliding_window": 512},
}
"""What a config says beside the shape; the names of transformers' `model_type`."""

SHARES = {"sgd": 3.0, "gpteacher": 0.5, "t0": 0.25}
"""Prompts to learn from a file, beside those of a file that is not named: answers in dialogues are short."""


def corpus(folder: Path) -> Corpus:
    """Conversations only; small data sets are repeated more often."""
    chat = {"alpaca_eval": 1.0, "gsm8k_train": 3.0, "gpteacher": 2.0, "sgd": 2.0, "t0": 0.3}
    return Corpus(folder, chat, {}, vocabulary=16_000, context=1024)


def configuration(data: Corpus, family: str, width: int = 768, layers: int = 12) -> PretrainedConfig:
    """About 110 million parameters with Llama's proportions, for each supported family."""
    return AutoConfig.for_model(
        family,
        vocab_size=data.vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        head_dim=HEAD,
        max_position_embeddings=data.context,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **FAMILIES[family],
    )
