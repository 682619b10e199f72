"""Chats to training sequences: the texts that a model reads when it answers, and which of their tokens are its answers.

An answer is what the model writes after its own generation prompt, so a sequence is a rendered prompt, the answer, what
the template puts before the next answer, and so on.  Where the template renders earlier turns in another way once
others follow (some drop earlier reasoning), the model reads another text from there on, and a new sequence begins.
`distill` splits a chat at the same places.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from redrafter.data.messages import text_of
from redrafter.data.prompts import apply_template, encode, render
from redrafter.data.rows import Chat
from redrafter.errors import RedrafterError

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPENED = re.compile(r"<(?P<tag>[^<>/\s]+)>\s*$")
_EMPTY = re.compile(r"<(?P<tag>[^<>/\s]+)>\s*</(?P=tag)>\s*$")


@dataclass
class _Sequence:
    """Text in pieces, each of which is learned or not; `count` messages of the chat are in it."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)
    count: int = 0

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    def add(self, text: str, *, learned: bool) -> None:
        if text:
            self.pieces.append((text, learned))


def tokenize_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[list[int], list[bool]]]:
    """Token ids and a mask of the tokens to learn, as long as they are: one pair for each sequence of the chat.

    A template's `{% generation %}` markers, where it has them, choose among the tokens of an answer.  Raises
    RedrafterError where the model would not write the answers of the chat after its generation prompt.
    """
    whole = render(chat, tokenizer, where, prompt=False)
    marked = bool(_MARKER.search(_template(chat, tokenizer))) and tokenizer.is_fast
    found: list[_Sequence] = []
    for index in chat.learned:
        before = render(chat.first(index), tokenizer, where)
        if not (found and before.startswith(found[-1].text)):
            found.append(_Sequence())
        found[-1].add(before.removeprefix(found[-1].text), learned=False)
        answer = _answer(chat, index, before, tokenizer, where)
        found[-1].add(answer if marked else _until_end(answer, chat, index, tokenizer), learned=True)
        found[-1].count = index + 1
    if not found:
        ids = encode(whole, tokenizer)
        return [(ids, [False] * len(ids))]
    if whole.startswith(found[-1].text):
        found[-1].add(whole.removeprefix(found[-1].text), learned=False)
        found[-1].count = len(chat.messages)
    pairs = []
    for one in found:
        ids, learned = _tokenize(one, tokenizer, where)
        if marked:
            rendered = apply_template(
                chat.first(one.count), tokenizer, where, return_dict=True, return_assistant_tokens_mask=True
            )
            if rendered["input_ids"][: len(ids)] == ids:
                learned = [a and bool(b) for a, b in zip(learned, rendered["assistant_masks"], strict=False)]
        pairs.append((ids, learned))
    return pairs


def _template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that `apply_chat_template` chooses among those of the tokenizer."""
    return str(tokenizer.get_chat_template(None, chat.tools))


def _answer(chat: Chat, index: int, before: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """What the model writes after `before`, the prompt of the answer `index`, and what the template adds to it."""
    after = render(chat.first(index + 1), tokenizer, where, prompt=False)
    if after.startswith(before):
        return after[len(before) :]
    base = render(chat.first(index), tokenizer, where, prompt=False)
    header = before.removeprefix(base)
    opened = _EMPTY.search(header) or _OPENED.search(header)
    start = base + (header[: opened.start()] if opened else "")
    if opened is None or not before.startswith(base) or not after.startswith(start):
        raise RedrafterError(
            f"{where}: the chat template renders message {index + 1} in another way than its generation prompt begins, "
            f"which ends with {before[-20:]!r}: give another template, or rows that distill wrote."
        )
    content, closing = text_of(chat.messages[index]), f"</{opened['tag']}>"
    blank = re.compile(rf"\s*<{re.escape(opened['tag'])}>\s*{re.escape(closing)}\s*").match(after, len(start))
    end = _end_of(content, after, blank.end() if blank else len(start), closing)
    written = _after_opening(content, opened, bool(_EMPTY.search(header)))
    if written is None or end is None:
        raise RedrafterError(
            f"{where}: the generation prompt ends with {opened[0].strip()!r}, and the content of message {index + 1} "
            f"does not go on from there{'' if closing in content else ', as it has no reasoning'}: give the reasoning "
            f"in the content, up to {closing!r}, or turn reasoning on or off by chat_template_kwargs."
        )
    return written.rstrip() + after[end:]


def _end_of(content: str, rendered: str, begin: int, closing: str = "</think>") -> int | None:
    """Where a content ends in a rendering, from `begin` on; the template may strip it, or drop its reasoning."""
    for visible in (content.strip(), content.rpartition(closing)[2].strip()):
        if visible and visible in rendered[begin:]:
            return rendered.index(visible, begin) + len(visible)
    return None


def _after_opening(content: str, opened: re.Match[str], empty: bool) -> str | None:
    """The content of an answer without the opening that the generation prompt has; None if it does not fit to it."""
    tag = opened["tag"]
    own = re.match(rf"\s*<{re.escape(tag)}>(?P<inner>.*?)</{re.escape(tag)}>\s*", content, re.DOTALL)
    if empty:  # the prompt opens and closes the reasoning
        if own is None:
            return None if f"</{tag}>" in content else content.lstrip()
        return None if own["inner"].strip() else content[own.end() :]
    if f"</{tag}>" not in content:
        return None
    if content.startswith(opened[0]):
        return content[len(opened[0]) :]
    stripped = content.lstrip()
    return stripped.removeprefix(f"<{tag}>").lstrip("\n") if stripped.startswith(f"<{tag}>") else content


def _until_end(answer: str, chat: Chat, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer up to its end token: what the template puts after that is not written by the model."""
    message = chat.messages[index]
    specials = {str(one) for one in tokenizer.all_special_tokens}
    specials |= {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
    start = None if message.get("tool_calls") else _end_of(text_of(message), answer, 0)
    if start is not None:
        ends = [(answer.index(one, start), one) for one in specials if one in answer[start:]]
        return answer[: min(ends)[0] + len(min(ends)[1])] if ends else answer
    stripped = answer.rstrip()
    return stripped if stripped.endswith(tuple(specials)) else answer


def _tokenize(sequence: _Sequence, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[bool]]:
    """Ids and mask of a sequence.  A token that would join a prompt and its answer is divided, as in generation."""
    ids, learned, prefix = encode(sequence.text, tokenizer), list[bool](), ""
    for piece, own in sequence.pieces:
        prefix += piece
        known = encode(prefix, tokenizer)
        if ids[: len(known)] != known:
            break
        learned += [own] * (len(known) - len(learned))
    else:
        return ids, learned
    parts = [(encode(piece, tokenizer), own) for piece, own in sequence.pieces]
    divided = [token for part, _ in parts for token in part]
    if tokenizer.decode(divided) != tokenizer.decode(ids):
        raise RedrafterError(
            f"{where}: the tokenizer joins the end of the generation prompt and the beginning of the answer."
        )
    return divided, [own for part, own in parts for _ in part]
