"""Log probabilities as OpenAI's API reports them, in the form of chats and in that of completions.

Both list every generated token, those of a stop string and end tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from redrafter.engine.results import TokenLogprob
from redrafter.server.responses import ChatLogprobs, CompletionLogprobs, TokenInfo, TopToken

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks, as in OpenAI's API."""


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # some tokenizers drop the space of the first token, so each is decoded after another
        self._before = list(tokenizer("a", add_special_tokens=False).input_ids)
        self.text = lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        return self._decode([*self._before, token])[len(self._decode(self._before)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def bytes(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of a token; None if it is part of a character."""
        text = self.text(token)
        return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


def chat_logprobs(tokens: Iterable[TokenLogprob], texts: TokenTexts) -> ChatLogprobs:
    """The form of `/v1/chat/completions`."""

    def top(token: int, logprob: float) -> TopToken:
        return TopToken(token=texts.text(token), logprob=_finite(logprob), bytes=texts.bytes(token))

    return ChatLogprobs(
        content=[
            TokenInfo(
                token=texts.text(one.token),
                logprob=_finite(one.logprob),
                bytes=texts.bytes(one.token),
                top_logprobs=[top(*pair) for pair in one.top],
            )
            for one in tokens
        ],
        refusal=None,
    )


def completion_logprobs(tokens: Iterable[TokenLogprob], texts: TokenTexts, *, offset: int) -> CompletionLogprobs:
    """The form of `/v1/completions`; the text of the first token begins at character `offset` of the answer."""
    result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for one in tokens:
        text = texts.text(one.token)
        result.tokens.append(text)
        result.token_logprobs.append(_finite(one.logprob))
        top = [*one.top, (one.token, one.logprob)]
        result.top_logprobs.append({texts.text(token): _finite(logprob) for token, logprob in top})
        result.text_offset.append(offset)
        offset += len(text)
    return result


def _finite(logprob: float) -> float:
    return LOWEST if math.isinf(logprob) or logprob < LOWEST else logprob
