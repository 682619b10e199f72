"""Conversations that the target answers turn by turn, and the training rows that result.

Guarantees that `loss_mask` marks exactly the tokens that the target generated after exactly the preceding `input_ids`.
Does not know how answers are generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.core.noise import row_seeds
from redrafter.data.messages import Message
from redrafter.data.prompts import check_has_question, check_ids, encode, prompt_ids, render
from redrafter.data.rows import Chat, Text, parse_row
from redrafter.errors import RedrafterError
from redrafter.training.distillation import Prompt, row_labels


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are sampled: every prompt is answered once at each temperature, where 0 means greedy decoding.

    Raises RedrafterError for values that are invalid or have no effect.
    """

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not all(0 <= t < float("inf") for t in self.temperatures):
            raise RedrafterError("A temperature must be 0 (greedy) or positive.")
        if self.temperatures.count(0) > 1:
            raise RedrafterError("All greedy answers to a prompt are the same: give temperature 0 once.")
        if not any(self.temperatures):
            for name in ("top_p", "top_k", "seed"):
                if getattr(self, name) is not None:
                    raise RedrafterError(f"{name} has no effect in greedy decoding: set a temperature, or remove it.")

    def settings(self, temperature: float) -> dict[str, Any]:
        """Keyword arguments of `generate`, without the seeds."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": float(temperature), "top_p": self.top_p, "top_k": self.top_k}
        return settings

    def seeds(self, prompts: int) -> list[int]:
        """One seed per prompt and temperature, prompts first.  A prompt's seeds do not depend on later prompts."""
        return row_seeds(self.seed or 0, prompts * len(self.temperatures))


@dataclass(frozen=True)
class AnswerPlan:
    """The answers that a prompt row requests: after a plain prompt, or one after each group of a chat's messages."""

    given: list[list[Message]]
    """Messages that precede each answer; empty for a plain prompt."""
    prompt: str | None = None
    chat: Chat | None = None
    """The row's conversation with the other inputs of its chat template."""

    @property
    def answers(self) -> int:
        """Number of answers."""
        return max(1, len(self.given))


def plan_answers(
    record: dict[str, Any], where: str, *, chat: bool = False, template_kwargs: Mapping[str, Any] | None = None
) -> AnswerPlan:
    """The answers that a row requests: one in place of each assistant turn, and one after a final turn of another role.

    `chat` and `template_kwargs` as in `rows.parse_row`.  Assistant turns that call tools are kept as given, because the
    next message replies to them; so are those before any other role.  Raises RedrafterError if no answer is requested.
    """
    row = parse_row(record, where, chat=chat, template_kwargs=template_kwargs)
    if isinstance(row, Text):
        if row.prompt is None:
            raise RedrafterError(f'{where}: the row has "text" but no "prompt" to continue.')
        if not row.prompt:
            raise RedrafterError(f"{where}: the prompt is empty.")
        return AnswerPlan([], row.prompt)
    check_has_question(row.messages, where)
    answers = [] if row.only_user else [i for i in row.answers if not row.messages[i].get("tool_calls")]
    given: list[list[Message]] = [[]]
    for index, message in enumerate(row.messages):
        if index in answers:
            given.append([])
        else:
            given[-1].append(message)
            if row.only_user and message["role"] == "user":
                given.append([])
    if not given[-1] or given[-1][-1]["role"] == "assistant":
        given.pop()
    if not given:
        raise RedrafterError(f"{where}: there is no turn to answer.")
    return AnswerPlan(given, chat=row)


class Dialogue:
    """A prompt row at one temperature, turn by turn.

    If the chat template renders the earlier turns unchanged, the next turn is appended to the tokens so far, with the
    answers' tokens as generated.  If it renders them differently (for example without earlier reasoning), the model
    would see another text, so a new training row starts, in which the earlier answers are context only.
    """

    def __init__(
        self,
        prompt: Prompt,
        temperature: float,
        seed: int,
        *,
        chat: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.prompt = prompt
        self.plan = plan_answers(prompt.record, prompt.where, chat=chat, template_kwargs=template_kwargs)
        self.temperature = temperature
        self.messages: list[Message] = []
        self.rows: list[_TokenRow] = []
        self._seed = seed
        self._answers = 0
        self._rendered = ""  # the text of the last row's tokens, with special tokens

    @property
    def seed(self) -> int:
        """Seed of the current row's noise.

        The noise is a function of the position, and rows of one dialogue share positions, so each has another seed.
        """
        return self._seed if len(self.rows) == 1 else row_seeds(self._seed, len(self.rows))[-1]

    def next_turn(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> bool:
        """Appends the messages before the next answer; False if there are none or they do not fit `limit` tokens.

        Raises RedrafterError if the first turn does not fit.
        """
        where, plan = self.prompt.where, self.plan
        if self._answers == plan.answers:
            return False
        if plan.prompt is not None:
            messages, rendered, added = self.messages, plan.prompt, None
            ids = prompt_ids({"prompt": plan.prompt}, tokenizer, where)
        else:
            messages = [*self.messages, *plan.given[self._answers]]
            rendered = self.render(messages, tokenizer)
            ids = encode(rendered, tokenizer)
            added = self._added_tokens(ids, tokenizer) if self.rows else None
        length = len(ids) if added is None else len(self.rows[-1].input_ids) + len(added)
        if limit is not None and length >= limit:
            if self._answers == 0:
                raise RedrafterError(f"{where}: the prompt has {length} tokens, which leaves no room in {limit}.")
            return False
        self.messages = messages
        if added is None:
            self.rows.append(_TokenRow(ids, [0] * len(ids)))
        else:
            self.rows[-1].append(added, generated=False)
        self._rendered = rendered
        return True

    def render(self, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template's text for a prompt of these messages, with the row's other template inputs."""
        assert self.plan.chat is not None
        return render(replace(self.plan.chat, messages=messages), tokenizer, self.prompt.where)

    def _added_tokens(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """The tokens that follow the last row's text in `ids`; None if `ids` does not start with that text."""
        known = encode(self._rendered, tokenizer)  # may differ from the tokens as generated
        return ids[len(known) :] if ids[: len(known)] == known else None

    def add_answer(self, tokens: list[int], reason: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        """Appends an answer, cut so that the row has at most `limit` tokens."""
        row = self.rows[-1]
        if limit is not None and len(row.input_ids) + len(tokens) > limit:
            tokens, reason = tokens[: limit - len(row.input_ids)], "length"
        row.append(tokens, generated=True)
        content = str(tokenizer.decode(tokens, skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": content})
        self._rendered += str(tokenizer.decode(tokens))
        self._answers += 1
        row.finish_reasons.append(reason)
        row.num_messages = len(self.messages)

    def training_rows(self) -> list[dict[str, Any]]:
        """The rows in the format that `data.read_rows` reads."""
        chat = self.plan.chat
        return [
            {
                **row_labels(self.prompt, self.temperature),
                **(
                    {"prompt": self.plan.prompt, "text": self.messages[0]["content"]}
                    if chat is None
                    else chat.columns(self.messages[: row.num_messages])
                ),
                "finish_reasons": row.finish_reasons,
                "input_ids": row.input_ids,
                "loss_mask": row.loss_mask,
            }
            for row in self.rows
        ]


@dataclass
class _TokenRow:
    """Tokens, and for each whether the target generated it."""

    input_ids: list[int]
    loss_mask: list[int]
    finish_reasons: list[str] = field(default_factory=list)
    num_messages: int = 0
    """Messages of the dialogue that the row contains."""

    def append(self, tokens: list[int], *, generated: bool) -> None:
        self.input_ids += tokens
        self.loss_mask += [int(generated)] * len(tokens)


def check_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    *,
    chat: bool,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Raises RedrafterError for a row that cannot be answered.  Later turns are rendered with placeholder answers."""
    dialogue = Dialogue(prompt, 0.0, 0, chat=chat, template_kwargs=template_kwargs)
    dialogue.next_turn(tokenizer, limit)
    check_ids(dialogue.rows[-1].input_ids, vocab_size, prompt.where)
    if dialogue.plan.answers > 1:
        answer: Message = {"role": "assistant", "content": "."}
        messages = [message for given in dialogue.plan.given for message in (*given, answer)]
        check_ids(encode(dialogue.render(messages[:-1], tokenizer), tokenizer), vocab_size, prompt.where)
