"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from redrafter.results import Event


class Detokenizer:
    """Turns a growing list of tokens into text that only ever grows.

    A token that ends inside a character is held back until the character is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # tokens whose text has been given out
        self.base = 0  # from where to decode, so that a word's leading space is seen

    def push(self, token: int) -> str:
        """The text that `token` adds, which may be none yet."""
        self.ids.append(token)
        before, after = self._decode(self.base, self.shown), self._decode(self.base, len(self.ids))
        if len(after) <= len(before) or after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.base, self.shown = self.shown, len(self.ids)
        return after[len(before) :]

    def rest(self) -> str:
        """What was held back, once no token follows."""
        before = self._decode(self.base, self.shown)
        return self._decode(self.base, len(self.ids))[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))


def with_text(events: Iterable[Event], tokenizer: PreTrainedTokenizerBase) -> Iterator[Event]:
    """The same events with the text that each adds; a row's pieces add up to its text."""
    rows: dict[int, Detokenizer] = {}
    for event in events:
        pieces = rows.setdefault(event.row, Detokenizer(tokenizer))
        text = "".join(map(pieces.push, event.tokens))
        if event.finish_reason is not None:
            text += rows.pop(event.row).rest()
        yield replace(event, text=text)
