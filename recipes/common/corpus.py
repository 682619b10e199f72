"""Reads public data files and turns them into token streams.

Guarantees that the same rows are held out in every run (by a hash of the row's id) and that only files named in a
recipe's README are read.  Does not know models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Corpus:
    """Training data of a target: files of conversations and of plain text, each repeated a given number of times."""

    folder: Path
    chat: dict[str, float]
    text: dict[str, float]
    vocabulary: int
    context: int

    @property
    def files(self) -> list[str]:
        """Names of all files."""
        return [*self.chat, *self.text]


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def data_folder(text: str) -> Path:
    """The folder given by `--data`.  Raises argparse's error if it does not exist."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def rows(folder: Path, name: str) -> Iterator[dict]:
    """The rows of one data file without tool-calling rows of gpteacher, because the models have no tools."""
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if name == "gpteacher" and row["messages"][0]["content"].startswith("toolformer"):
                continue
            yield row


def is_held_out(row: dict) -> bool:
    """Whether a row is held out: one in 64, decided by its id only."""
    return hashlib.sha256(row["id"].encode()).digest()[0] < 4


def render(row: dict) -> str:
    """A row as text; conversations exactly as CHAT_TEMPLATE renders them."""
    if "text" in row:
        return row["text"] + "<|end|>"
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in row["messages"])


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """A byte-level BPE with separate digits, trained on the chat files and a tenth of the rest."""

    def texts() -> Iterator[str]:
        for name in corpus.chat:
            for row in rows(corpus.folder, name):
                yield from (m["content"] for m in row["messages"])
        for name in corpus.text:
            for row in rows(corpus.folder, name):
                yield row["text"][: max(2000, len(row["text"]) // 10)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=corpus.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=corpus.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts as one stream of token ids (uint16) and the offset at which each text starts (int64)."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 2000):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 2000], add_special_tokens=False)
        ids += [np.asarray(encoding.ids, dtype=np.uint16) for encoding in batch]
    starts = np.cumsum([0] + [len(i) for i in ids[:-1]])
    return np.concatenate(ids), starts


def streams(
    folder: Path, tokenizer: PreTrainedTokenizerFast, files: dict[str, float], *, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The files' training (or held-out) rows as one stream, in file order, repeated as configured."""
    texts: list[str] = []
    for name, times in files.items():
        own = [render(row) for row in rows(folder, name) if is_held_out(row) == held_out]
        texts += own * int(times) + own[: round(len(own) * (times % 1))]
    return encode(tokenizer, texts)
