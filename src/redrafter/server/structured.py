"""Structured output: restricts a text to a JSON schema, any JSON object, a regular expression or a grammar.

llguidance compiles and follows the grammar.  The processor of a request is a function of the text: it may be called
again with a text that is shorter or continues differently.  Forbidden are all tokens after which the text could not
become valid, special tokens that the grammar does not name, and ids beyond the tokenizer's vocabulary.  Does not know
requests, models or the engine.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from redrafter.errors import RedrafterError, reason

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r" |\n[ \t]{0,16}"
"""Whitespace between the parts of a JSON text: none, a space, or a new line with its indentation.  Without a limit, a
model can write whitespace until its budget ends."""


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    json_schema: dict[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | None = None,
    end_tokens: Collection[int] | None = None,
) -> GrammarProcessor:
    """A logits processor for one request.

    Exactly one of these sets the form of the text: `json_schema`; `json_object`, any JSON object; `regex`, which must
    match the whole text (syntax of Rust's regex crate, without anchors); `grammar`, in llguidance's Lark syntax.
    `vocab_size` is the model's, which may exceed the tokenizer's.  `end_tokens` are allowed exactly where the text may
    end; None takes the tokenizer's.  Compiled grammars are cached.  Compiling may take seconds for a large schema.

    Raises RedrafterError if the grammar is invalid or not supported, with llguidance's reason, if there is no end
    token, if the tokenizer is not supported, or if llguidance is not installed.
    """
    if sum((json_schema is not None, json_object, regex is not None, grammar is not None)) != 1:
        raise RedrafterError("Structured output needs exactly one of json_schema, json_object, regex and grammar.")
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise RedrafterError("Structured output needs llguidance: pip install 'redrafter[server]'.") from error
    if regex is not None:
        kind, compiled = "regex", LLMatcher.grammar_from_regex(regex)
    elif grammar is not None:
        kind, compiled = "grammar", LLMatcher.grammar_from_lark(grammar)
    else:
        kind, compiled = "JSON schema", _json_grammar({"type": "object"} if json_schema is None else json_schema)
    if end_tokens is None:
        end_tokens = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not end_tokens:
        raise RedrafterError("Structured output needs an end token: the tokenizer has none, and end_tokens is empty.")
    return GrammarProcessor(_matcher(tokenizer, vocab_size, tuple(sorted(end_tokens)), kind, compiled).deep_copy())


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Sets the scores of forbidden tokens to -inf.  Serves the texts that continue the prompt of the first call."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._prompt: Tensor | None = None
        self._new: list[int] = []
        """The new tokens that the matcher has consumed."""

    def __call__(self, input_ids: Int[Tensor, "1 T"], scores: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
        """The scores of the token after a text; the first call's text is the prompt.

        Raises RedrafterError if the text does not continue the prompt, if the grammar forbids one of its tokens, or if
        the grammar exceeds llguidance's limits at this text.
        """
        self._follow(input_ids[0])
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():  # its mask would end the text
            raise RedrafterError(f"The output's grammar is too complex: {_cause(self._matcher.get_error())}.")
        forbidden = allowed[: scores.shape[-1]] == 0
        return scores.masked_fill(forbidden.to(scores.device), -torch.inf)

    def _follow(self, text: Int[Tensor, " T"]) -> None:
        """Moves the matcher to the end of a text: back to the tokens in common, then forward."""
        if self._prompt is None:
            self._prompt = text.clone()
        length = len(self._prompt)
        if not text[:length].equal(self._prompt):
            raise RedrafterError("A processor for structured output serves one prompt: make one for each request.")
        new = text[length:].tolist()
        kept = len(self._new)
        if new[:kept] != self._new:
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(new, self._new, strict=False)))
            self._matcher.rollback(len(self._new) - kept)
        kept += self._matcher.try_consume_tokens(new[kept:])
        self._new = new[:kept]
        if kept < len(new):
            raise RedrafterError(
                f"The output's grammar does not allow token {new[kept]} at position {length + kept}: another setting "
                "forces it, or the grammar spells out a special token."
            )


def _json_grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE})
    except (ValueError, TypeError) as error:
        raise RedrafterError(f"The JSON schema cannot be used: {reason(error)}.") from error


@lru_cache(maxsize=64)
def _matcher(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: tuple[int, ...], kind: str, grammar: str
) -> LLMatcher:
    """A matcher at the begin of a text, to be copied.  `kind` describes the grammar in errors."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_ll_tokenizer(tokenizer, vocab_size, ends), grammar, log_level=0)
    if matcher.is_error():
        raise RedrafterError(f"The {kind} cannot be used: {_cause(matcher.get_error())}.")
    return matcher


@lru_cache(maxsize=4)
def _ll_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: tuple[int, ...]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=list(ends))
    except (ValueError, RuntimeError) as error:
        raise RedrafterError(f"Structured output does not support this tokenizer: {reason(error)}.") from error


def _cause(message: str) -> str:
    """The line of llguidance's message that gives the reason: the one after "error:", or the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (causes or lines or ["no reason given"])[0].rstrip(".:")
