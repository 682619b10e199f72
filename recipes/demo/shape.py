"""What the demo's pair is made of."""

from __future__ import annotations

from pathlib import Path

from recipes.common.corpus import Corpus
from transformers import LlamaConfig

PEAK_RATE = 3e-3
CHAT_SHARE = 0.35
CATEGORIES = {"dialogue": "sgd", "instructions": "gpteacher", "maths": "gsm8k_train"}
"""Whose held-out rows drafters are compared on (`recipes/target`)."""


def corpus(folder: Path) -> Corpus:
    """Sets whose licences let trained weights be shared."""
    chat = {"sgd": 1.0, "gsm8k_train": 1.0, "gpteacher": 1.0}
    text = {"books": 1.0, "cpp_docs": 1.0, "python_stdlib": 1.0}
    return Corpus(folder, chat, text, vocabulary=4096, context=1024)


def configuration(data: Corpus) -> LlamaConfig:
    """Thin and deep: on a CPU a step then costs launches rather than arithmetic, and small models learn better so."""
    return LlamaConfig(
        vocab_size=data.vocabulary,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=data.context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
