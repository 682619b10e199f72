"""The target's own answers to prompts, turn by turn, as rows to train on.

Promises that `loss_mask` marks exactly the tokens that the target chose after exactly the tokens before them in
`input_ids`.  Does not know how rows are read or kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redrafter.core.noise import row_seeds
from redrafter.core.shapes import ShapeOverrides
from redrafter.data.files import Skip
from redrafter.data.messages import Message
from redrafter.data.prompts import check_has_question, check_ids, encode, prompt_ids, render
from redrafter.data.rows import Chat, Text, parse_row
from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
from redrafter.engine.generate import stream
from redrafter.engine.results import finished
from redrafter.errors import RedrafterError
from redrafter.proposers import Drafter, method_of
from redrafter.proposers.base import resolved_shape
from redrafter.targets.target import Target
from redrafter.training.distillation import Done, Part, Prompt, Tally, least, named


@dataclass(frozen=True)
class Law:
    """How answers are drawn: every prompt once at each temperature, 0 being greedy.

    Raises RedrafterError for what means nothing.
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
            raise RedrafterError("Greedy answers to a prompt are all the same: give temperature 0 once.")
        if not any(self.temperatures):
            for name in ("top_p", "top_k", "seed"):
                if getattr(self, name) is not None:
                    raise RedrafterError(
                        f"{name} means nothing in greedy decoding: give a temperature, or leave it out."
                    )

    def settings(self, temperature: float) -> dict[str, Any]:
        """As `generate` takes them, the seeds left out."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": float(temperature), "top_p": self.top_p, "top_k": self.top_k}
        return settings

    def seeds(self, prompts: int) -> list[int]:
        """A seed for every prompt and temperature, in turn; those of a prompt do not depend on how many follow."""
        return row_seeds(self.seed or 0, prompts * len(self.temperatures))


@dataclass(frozen=True)
class Plan:
    """What a prompt row asks for: an answer after `prompt`, plain text, or one after each stretch of a chat."""

    stretches: list[list[Message]]
    """Messages that are given, up to each answer."""
    prompt: str | None = None
    chat: Chat | None = None
    """The row's conversation with the inputs of its chat template."""


def plan(
    record: dict[str, Any], where: str, *, chat: bool = False, template_kwargs: Mapping[str, Any] | None = None
) -> Plan:
    """The answers that a row asks for: in the place of each of the assistant's turns, and after a last turn of others.

    `chat` and `template_kwargs` as in `rows.parse_row`.  Turns that call tools are given, because what follows answers
    them; so are the assistant's before anybody else spoke.  Raises RedrafterError for a row that asks for nothing.
    """
    row = parse_row(record, where, chat=chat, template_kwargs=template_kwargs)
    if isinstance(row, Text):
        if row.prompt is None:
            raise RedrafterError(f'{where}: the row has "text" and no "prompt" to continue.')
        if not row.prompt:
            raise RedrafterError(f"{where}: the prompt is empty.")
        return Plan([], row.prompt)
    check_has_question(row.messages, where)
    answers = [] if row.only_user else [i for i in row.answers if not row.messages[i].get("tool_calls")]
    stretches: list[list[Message]] = [[]]
    for index, message in enumerate(row.messages):
        if index in answers:
            stretches.append([])
        else:
            stretches[-1].append(message)
            if row.only_user and message["role"] == "user":
                stretches.append([])
    if not stretches[-1] or stretches[-1][-1]["role"] == "assistant":
        stretches.pop()
    if not stretches:
        raise RedrafterError(f"{where}: there is no turn to answer.")
    return Plan(stretches, chat=row)


class Dialogue:
    """A prompt row at one temperature, turn by turn.

    Where the template renders what was said as it stands, a turn is added to the tokens so far, the answers' own kept.
    Where it renders it otherwise (say without earlier thinking), the model would read another text, so another row
    begins, in which the earlier answers are only read.
    """

    def __init__(
        self,
        prompt: Prompt,
        law: Law,
        variant: int,
        seed: int,
        *,
        chat: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.prompt = prompt
        self.plan = plan(prompt.record, prompt.where, chat=chat, template_kwargs=template_kwargs)
        self.temperature = law.temperatures[variant]
        self.messages: list[Message] = []
        self.texts: list[_Text] = []
        self._seed = seed
        self._answers = 0
        self._rendered = ""  # the rendering of what the last text holds, special tokens and all

    @property
    def seed(self) -> int:
        """Of its noise, which is a function of place: texts of one dialogue overlap there, so each has its own."""
        texts = len(self.texts)
        return self._seed if texts == 1 else row_seeds(self._seed, texts)[-1]

    def ask(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> bool:
        """Goes on to the next turn; False where there is none or it does not fit into `limit` tokens.

        Raises RedrafterError where not even the first does.
        """
        where, plan = self.prompt.where, self.plan
        if self._answers == max(1, len(plan.stretches)):
            return False
        if plan.prompt is not None:
            rendered, ids, more = plan.prompt, prompt_ids({"prompt": plan.prompt}, tokenizer, where), None
        else:
            messages = [*self.messages, *plan.stretches[self._answers]]
            rendered = self.rendered(messages, tokenizer)
            ids = encode(rendered, tokenizer)
            more = self._addition(ids, tokenizer) if self.texts else None
        length = len(ids) if more is None else len(self.texts[-1].input_ids) + len(more)
        if limit is not None and length >= limit:
            if self._answers == 0:
                raise RedrafterError(f"{where}: the prompt has {length} tokens, which leaves no room in {limit}.")
            return False
        if plan.prompt is None:
            self.messages = messages
        if more is None:
            self.texts.append(_Text(ids, [0] * len(ids)))
        else:
            self.texts[-1].add(more, chosen=False)
        self._rendered = rendered
        return True

    def rendered(self, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of a prompt of these messages, with all other inputs of the row's chat template."""
        assert self.plan.chat is not None
        return render(replace(self.plan.chat, messages=messages), tokenizer, self.prompt.where)

    def _addition(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """The tokens that a rendering adds to the last text, or None where it is not its continuation."""
        known = encode(self._rendered, tokenizer)  # the answers' own tokens may differ
        return ids[len(known) :] if ids[: len(known)] == known else None

    def answer(self, tokens: list[int], reason: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        """Takes in what the target wrote, cut to `limit` tokens of the whole text."""
        text = self.texts[-1]
        if limit is not None and len(text.input_ids) + len(tokens) > limit:
            tokens, reason = tokens[: limit - len(text.input_ids)], "length"
        text.add(tokens, chosen=True)
        content = str(tokenizer.decode(tokens, skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": content})
        self._rendered += str(tokenizer.decode(tokens))
        self._answers += 1
        text.reasons.append(reason)
        text.turns = len(self.messages)

    def rows(self) -> list[dict[str, Any]]:
        """What came of it, in the form that `data.read_rows` takes."""
        return [
            {
                **named(self.prompt, self.temperature),
                **(
                    self.plan.chat.columns(self.messages[: text.turns])
                    if self.plan.chat is not None
                    else {"prompt": self.plan.prompt, "text": self.messages[0]["content"]}
                ),
                "finish_reasons": text.reasons,
                "input_ids": text.input_ids,
                "loss_mask": text.loss_mask,
            }
            for text in self.texts
        ]


@dataclass
class _Text:
    """Tokens, and which of them the target chose."""

    input_ids: list[int]
    loss_mask: list[int]
    reasons: list[str] = field(default_factory=list)
    turns: int = 0
    """Messages that it reaches to."""

    def add(self, tokens: list[int], *, chosen: bool) -> None:
        self.input_ids += tokens
        self.loss_mask += [int(chosen)] * len(tokens)


def check_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    *,
    chat: bool,
    template_kwargs: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Raises RedrafterError for a row that cannot be answered; its later turns are rendered with answers made up.

    `vocab_size` is that of the model.
    """
    dialogue = Dialogue(prompt, Law(), 0, 0, chat=chat, template_kwargs=template_kwargs)
    dialogue.ask(tokenizer, limit)
    check_ids(dialogue.texts[-1].input_ids, vocab_size, prompt.where)
    stretches = dialogue.plan.stretches
    if len(stretches) > 1:
        between: Message = {"role": "assistant", "content": "."}
        whole = [message for stretch in stretches for message in (*stretch, between)]
        check_ids(encode(dialogue.rendered(whole[:-1], tokenizer), tokenizer), vocab_size, prompt.where)


def by_target(
    prompts: Iterator[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter | None,
    law: Law,
    *,
    seeds: Sequence[int],
    chunk: int,
    limit: int | None = None,
    chat: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    tally: Tally | None = None,
    skip: Skip | None = None,
    **settings: Any,
) -> Iterator[Done | Part]:
    """Answers of a model, `chunk` prompts at a time, turn after turn in continuous batches.

    Each prompt is given back as it finishes, in any order, and as a part after each of its answers before the last.
    `seeds` are `law.seeds` of all prompts; `limit` bounds the tokens of a text, as the model's context does; `settings`
    go to `stream`.  A prompt that leaves no room is told to `skip`, or without it raises RedrafterError.
    """
    tally = tally or Tally()
    limit = least(limit, Target(model).context_length)
    while part := list(islice(prompts, chunk)):
        going: list[_Active] = []
        for prompt in part:
            first = prompt.number * len(law.temperatures)
            own = [
                Dialogue(prompt, law, k, seeds[first + k], chat=chat, template_kwargs=template_kwargs)
                for k in range(len(law.temperatures))
            ]
            try:
                going.append(_Active.begun(prompt, own, tokenizer, limit))
            except RedrafterError as error:
                if skip is None:
                    raise
                skip(str(error))
                yield Done(prompt, [], Counter())
        while going:
            for k, temperature in enumerate(law.temperatures):
                together = [one for one in going if one.asked[k]]
                law_settings = law.settings(temperature) | settings | ONE_TEXT
                for one, answer in _answered(together, k, model, tokenizer, drafter, tally, law_settings):
                    one.take(k, answer, tokenizer, limit)
                    yield one.result()
            going = [one for one in going if any(one.asked)]


_Answer = tuple[list[int], str, int]
"""New tokens, why they end, and the steps that they took."""


@dataclass
class _Active:
    """A prompt that is being answered: its dialogue at each temperature."""

    prompt: Prompt
    dialogues: list[Dialogue]
    asked: list[bool]
    """Whether each dialogue waits for an answer."""
    answers: list[list[_Answer]]
    """Of each dialogue so far: from these it can be made again."""

    @classmethod
    def begun(
        cls, prompt: Prompt, dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> _Active:
        """Asks for the first turn, or continues after the answers that an interrupted run saved.

        Raises RedrafterError if the first turn does not fit.
        """
        one = cls(prompt, dialogues, [each.ask(tokenizer, limit) for each in dialogues], [[] for _ in dialogues])
        for k, saved in enumerate(prompt.part or []):
            for tokens, reason, steps in saved:
                one.take(k, (tokens, reason, steps), tokenizer, limit)
        return one

    def take(self, k: int, answer: _Answer, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        """Gives a dialogue its answer and asks for its next turn."""
        tokens, reason, _ = answer
        self.answers[k].append(answer)
        self.dialogues[k].answer(tokens, reason, tokenizer, limit)
        self.asked[k] = self.dialogues[k].ask(tokenizer, limit)

    def result(self) -> Done | Part:
        """All rows with their counts if no turn is left, else the answers so far."""
        given = [answer for own in self.answers for answer in own]
        if any(self.asked):
            turns = sum(max(1, len(one.plan.stretches)) for one in self.dialogues)
            return Part(self.prompt, [list(own) for own in self.answers], len(given) / turns)
        rows = [row for one in self.dialogues for row in one.rows()]
        counts = Counter(rows=len(rows), answers=len(given))
        counts["tokens"] = sum(len(tokens) for tokens, _, _ in given)
        counts["steps"] = sum(steps for _, _, steps in given)
        counts["cut"] = sum(reason == "length" for row in rows for reason in row["finish_reasons"])
        return Done(self.prompt, rows, counts)


def _answered(
    together: list[_Active],
    k: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter | None,
    tally: Tally,
    settings: dict[str, Any],
) -> Iterator[tuple[_Active, _Answer]]:
    """One turn of the dialogues at temperature number `k`, each as it finishes."""
    if not together:
        return
    dialogues = [one.dialogues[k] for one in together]
    if settings["do_sample"]:
        settings["seed"] = [one.seed for one in dialogues]
    settings = with_stop_strings(model, settings, tokenizer)
    prompts = [one.texts[-1].input_ids for one in dialogues]
    overrides = ShapeOverrides(*(settings.get(name) for name in ("beam_width", "beam_length", "node_budget")))
    batch = min(settings.get("batch_size") or len(prompts), len(prompts))
    positions = 0 if drafter is None else resolved_shape(method_of(drafter), batch, overrides).beam_length
    events = tally.watch(stream(model, drafter, prompts, **settings))
    for one in finished(events, rows=len(dialogues), positions=positions):
        yield together[one.row], (one.new_tokens, one.finish_reason, one.stats.steps)
