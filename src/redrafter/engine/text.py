"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from redrafter.engine.results import Event


class Detokenizer:
    """Turns a growing list of tokens into text that only ever grows, and ends as `tokenizer.decode` of all of them.

    A token that ends inside a character is held back until the character is complete.  Of a tokenizer that cleans up
    spaces (" ." becomes "."), a word is held back until what follows can no longer change it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # tokens whose text has been taken
        self.base = 0  # from where to decode, so that a word's leading space is seen
        self._cleans = _cleans_up(tokenizer)
        self._raw = ""  # text that is not cleaned up yet
        self._given: list[str] = []

    def push(self, token: int) -> str:
        """The text that `token` adds, which may be none yet."""
        self.ids.append(token)
        before, after = self._decode(self.base, self.shown), self._decode(self.base, len(self.ids))
        if len(after) <= len(before) or after.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.base, self.shown = self.shown, len(self.ids)
        return self._give(after[len(before) :])

    def rest(self) -> str:
        """What was held back, once no token follows."""
        if self._cleans:
            given, whole = "".join(self._given), str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
            return whole[len(given) :]
        before = self._decode(self.base, self.shown)
        return self._decode(self.base, len(self.ids))[len(before) :]

    def _give(self, text: str) -> str:
        """The text, or with clean-up as much of all that is held back as can no longer change."""
        if not self._cleans:
            return text
        self._raw += text
        end = _settled(self._raw) if _is_usual(self.tokenizer) else 0
        settled, self._raw = self._raw[:end], self._raw[end:]
        self._given.append(self.tokenizer.clean_up_tokenization(settled))
        return self._given[-1]

    def _decode(self, start: int, end: int) -> str:
        raw = {"clean_up_tokenization_spaces": False} if self._cleans else {}
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True, **raw))


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `decode` cleans up spaces; transformers does not for byte-pair encoding, unless forced to."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return type(model).__name__ != "BPE" or bool(forced)


def _is_usual(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the clean-up is that of transformers, so that it is known what it looks at."""
    own = getattr(tokenizer.clean_up_tokenization, "__func__", None)
    return own is PreTrainedTokenizerBase.clean_up_tokenization


def _settled(text: str) -> int:
    """Length of the longest beginning of `text` that clean-up treats alike whatever follows.

    Clean-up removes the space of " .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're" and both of " ' ".  None
    of these goes on across a place that follows a character of none of them, nor across one before a space that follows
    neither a space nor "'" nor "n".
    """
    for end in range(len(text), 0, -1):
        before = text[end - 1]
        if before not in " .?!,'ntmsver" or (text[end : end + 1] == " " and before not in " 'n"):
            return end
    return 0


def with_text(events: Iterable[Event], tokenizer: PreTrainedTokenizerBase) -> Iterator[Event]:
    """The same events with the text that each adds; a row's pieces add up to its text."""
    rows: dict[int, Detokenizer] = {}
    for event in events:
        pieces = rows.setdefault(event.row, Detokenizer(tokenizer))
        text = "".join(map(pieces.push, event.tokens))
        if event.finish_reason is not None:
            text += rows.pop(event.row).rest()
        yield replace(event, text=text)
