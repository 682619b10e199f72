"""Shapes of the demo's target and drafters."""

from __future__ import annotations

from pathlib import Path

from recipes.common.corpus import Corpus
from transformers import LlamaConfig

PEAK_RATE = 3e-3
CHAT_SHARE = 0.35
CATEGORIES = {"dialogue": "sgd", "instructions": "gpteacher", "maths": "gsm8k_train"}
"""Whose held-out rows drafters are compared on (`recipes/target`)."""


def corpus(folder: Path) -> Corpus:
    """Data sets whose licences allow sharing the trained weights."""
    chat = {"sgd": 1.0, "gsm8k_train": 1.0, "gpteacher": 1.0}
    text = {"books": 1.0, "cpp_docs": 1.0, "python_stdlib": 1.0}
    return Corpus(folder, chat, text, vocabulary=4096, context=1024)


def draft_configuration(data: Corpus) -> LlamaConfig:
    """A draft model of 1.7 million parameters with few layers, because a draft runs it once per token."""
    return _llama(data, width=192, inner=512, layers=2)


def configuration(data: Corpus) -> LlamaConfig:
    """Thin and deep: small models learn better this way, and on a CPU a step costs launches rather than arithmetic."""
    return _llama(data, width=256, inner=576, layers=16)


def _llama(data: Corpus, *, width: int, inner: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=data.vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=data.context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
