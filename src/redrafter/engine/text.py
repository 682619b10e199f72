"""Incremental detokenization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.engine.results import Event


class Detokenizer:
    """Converts a growing list of tokens to text that only grows, and finally equals `tokenizer.decode` of all tokens.

    A token that ends inside a character is held back until the character is complete.  If the tokenizer cleans up
    spaces (" ." becomes "."), a word is held back until later text can no longer change it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # tokens whose text was returned
        self.base = 0  # where decoding starts, so that the leading space of a word is kept
        self._cleans = _cleans_up(tokenizer)
        self._raw = ""  # text before clean-up
        self._given: list[str] = []

    def push(self, token: int) -> str:
        """The text that `token` adds, which may be empty."""
        self.ids.append(token)
        before, after = self._decode(self.base, self.shown), self._decode(self.base, len(self.ids))
        if len(after) <= len(before) or after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.base, self.shown = self.shown, len(self.ids)
        return self._give(after[len(before) :])

    def rest(self) -> str:
        """The text that was held back, after the last token."""
        if self._cleans:
            return self.decode(self.ids)[len("".join(self._given)) :]
        before = self._decode(self.base, self.shown)
        return self._decode(self.base, len(self.ids))[len(before) :]

    def _give(self, text: str) -> str:
        """The text; with clean-up, the part of the held-back text that can no longer change."""
        if not self._cleans:
            return text
        self._raw += text
        end = _settled(self._raw) if _is_usual(self.tokenizer) else 0
        settled, self._raw = self._raw[:end], self._raw[end:]
        self._given.append(self.tokenizer.clean_up_tokenization(settled))
        return self._given[-1]

    def decode(self, tokens: list[int], **options: Any) -> str:
        """The text of tokens without special ones.  `options` as for `decode` of tokenizers."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, **options))

    def _decode(self, start: int, end: int) -> str:
        raw = {"clean_up_tokenization_spaces": False} if self._cleans else {}
        return self.decode(self.ids[start:end], **raw)


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `decode` cleans up spaces.  transformers does not for byte-pair encoding, unless forced."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return type(model).__name__ != "BPE" or bool(forced)


def _is_usual(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the clean-up is transformers' own, whose rules are known."""
    own = getattr(tokenizer.clean_up_tokenization, "__func__", None)
    return own is PreTrainedTokenizerBase.clean_up_tokenization


def _settled(text: str) -> int:
    """Length of the longest prefix of `text` whose clean-up does not depend on what follows.

    Clean-up removes the space of " .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're" and both spaces of " ' ".
    None of these patterns spans a position after a character that is in none of them, or a position before a space
    that follows neither a space nor "'" nor "n".
    """
    for end in range(len(text), 0, -1):
        before = text[end - 1]
        if before not in " .?!,'ntmsver" or (text[end : end + 1] == " " and before not in " 'n"):
            return end
    return 0


def with_text(events: Iterable[Event], tokenizer: PreTrainedTokenizerBase) -> Iterator[Event]:
    """The same events with the text that each adds."""
    rows: dict[int, Detokenizer] = {}
    for event in events:
        pieces = rows.setdefault(event.row, Detokenizer(tokenizer))
        text = "".join(map(pieces.push, event.tokens))
        if event.finish_reason is not None:
            text += rows.pop(event.row).rest()
        yield replace(event, text=text)
