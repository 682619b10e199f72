"""Converts chats to training sequences: the texts that the model reads while it answers, with its answers marked.

An answer is what the model writes after its generation prompt.  A sequence is a rendered prompt, the answer, the text
that the template puts before the next answer, and so on.  Some templates render earlier messages differently once
others follow, for example without their reasoning.  A new sequence begins there.  `distill` splits a chat at the same
messages.
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
    """Pieces of text, each with a flag for learning; they contain the chat's first `count` messages."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)
    count: int = 0

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    def extend(self, text: str, *, learned: bool) -> None:
        """Appends the part of `text` that follows the sequence's own text."""
        if len(text) > len(self.text):
            self.pieces.append((text[len(self.text) :], learned))


def tokenize_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[tuple[list[int], list[bool]]]:
    """Token ids and an equally long mask of the tokens to learn, for each sequence of the chat.

    If the template has `{% generation %}` markers, they select among the tokens of an answer.  Raises RedrafterError if
    the chat's answers do not continue the template's generation prompt.
    """
    complete = render(chat, tokenizer, where, prompt=False)
    template = str(tokenizer.get_chat_template(None, chat.tools))
    marked = bool(_MARKER.search(template)) and tokenizer.is_fast
    sequences: list[_Sequence] = []
    for index in chat.learned:
        prompt = render(chat.first(index), tokenizer, where)
        if not (sequences and prompt.startswith(sequences[-1].text)):
            sequences.append(_Sequence())
        sequences[-1].extend(prompt, learned=False)
        answer = _answer(chat, index, prompt, tokenizer, where)
        answer = answer if marked else _until_end_token(answer, chat, index, tokenizer)
        sequences[-1].extend(prompt + answer, learned=True)
        sequences[-1].count = index + 1
    if not sequences:
        ids = encode(complete, tokenizer)
        return [(ids, [False] * len(ids))]
    if complete.startswith(sequences[-1].text):
        sequences[-1].extend(complete, learned=False)
        sequences[-1].count = len(chat.messages)
    pairs = []
    for sequence in sequences:
        ids, learned = _tokenize(sequence, tokenizer, where)
        if marked:
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            rendered = apply_template(chat.first(sequence.count), tokenizer, where, **options)
            if rendered["input_ids"][: len(ids)] == ids:
                learned = [a and bool(b) for a, b in zip(learned, rendered["assistant_masks"], strict=False)]
        pairs.append((ids, learned))
    return pairs


def _answer(chat: Chat, index: int, prompt: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """What the model writes after the prompt of message `index`, with the text that the template appends."""
    after = render(chat.first(index + 1), tokenizer, where, prompt=False)
    if after.startswith(prompt):
        return after[len(prompt) :]
    base = render(chat.first(index), tokenizer, where, prompt=False)
    header = prompt.removeprefix(base)
    opened = _EMPTY.search(header) or _OPENED.search(header)
    start = base + (header[: opened.start()] if opened else "")
    if opened is None or not prompt.startswith(base) or not after.startswith(start):
        raise RedrafterError(
            f"{where}: the chat template renders message {index + 1} differently from its generation prompt, which "
            f"ends with {prompt[-20:]!r}: give another template, or rows written by distill."
        )
    content, closing = text_of(chat.messages[index]), f"</{opened['tag']}>"
    blank = re.compile(rf"\s*<{re.escape(opened['tag'])}>\s*{re.escape(closing)}\s*").match(after, len(start))
    end = _end_of(content, after, blank.end() if blank else len(start), closing)
    written = _without_opening(content, opened, empty=bool(_EMPTY.search(header)))
    if written is None or end is None:
        raise RedrafterError(
            f"{where}: the generation prompt ends with {opened[0].strip()!r}, and the content of message {index + 1} "
            f"does not continue it{'' if closing in content else ', as it has no reasoning'}: give the reasoning in "
            f"the content, up to {closing!r}, or turn reasoning on or off with chat_template_kwargs."
        )
    return written.rstrip() + after[end:]


def _end_of(content: str, rendered: str, begin: int, closing: str = "</think>") -> int | None:
    """The index in `rendered`, from `begin` on, at which a content ends, perhaps stripped or without its reasoning."""
    for visible in (content.strip(), content.rpartition(closing)[2].strip()):
        if visible and visible in rendered[begin:]:
            return rendered.index(visible, begin) + len(visible)
    return None


def _without_opening(content: str, opened: re.Match[str], *, empty: bool) -> str | None:
    """An answer's content without the tag that the generation prompt opened; None if it does not fit.

    `empty`: the generation prompt also closes the tag.
    """
    tag = opened["tag"]
    if empty:
        own = re.match(rf"\s*<{re.escape(tag)}>(?P<inner>.*?)</{re.escape(tag)}>\s*", content, re.DOTALL)
        if own is None:
            return None if f"</{tag}>" in content else content.lstrip()
        return None if own["inner"].strip() else content[own.end() :]
    if f"</{tag}>" not in content:
        return None
    if content.startswith(opened[0]):
        return content[len(opened[0]) :]
    stripped = content.lstrip()
    return stripped.removeprefix(f"<{tag}>").lstrip("\n") if stripped.startswith(f"<{tag}>") else content


def _until_end_token(answer: str, chat: Chat, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer up to its end token; the model does not write what the template appends after it."""
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
    """Ids and mask.  A token that would join a prompt and its answer is divided, as in generation."""
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
