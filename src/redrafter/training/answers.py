"""The target's answers to prompts, generated in this process.

Guarantees that an answer depends on its prompt and seed only, not on batches, chunks or the drafter.  Does not know how
rows are read or saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redrafter.core.shapes import ShapeOverrides
from redrafter.data.files import Skip
from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
from redrafter.engine.generate import stream
from redrafter.engine.results import finished
from redrafter.errors import RedrafterError
from redrafter.proposers import Drafter, method_of
from redrafter.proposers.base import resolved_shape
from redrafter.targets.target import Target
from redrafter.training.dialogues import Dialogue, SamplingConfig
from redrafter.training.distillation import CompletedPrompt, DistillProgress, PartialPrompt, Prompt, smallest

Answer = tuple[list[int], str, int]
"""New tokens, finish reason, and the number of decoding steps."""


@dataclass(frozen=True)
class ModelAnswers:
    """Answers prompts with a model, `chunk` prompts at a time, turn by turn in continuous batches.

    `seeds`: `sampling.seeds` of all prompts.  `limit`: maximum tokens of a row; the model's context length also
    applies. `reading`: keyword arguments `chat` and `template_kwargs` of `parse_row`.  `settings`: more arguments of
    `stream`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafter: Drafter | None
    sampling: SamplingConfig
    seeds: Sequence[int]
    chunk: int
    limit: int | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    progress: DistillProgress = field(default_factory=DistillProgress)
    skip: Skip | None = None
    """Receives the error message for a prompt that leaves no room for an answer; by default the error is raised."""

    def __call__(self, prompts: Iterator[Prompt]) -> Iterator[CompletedPrompt | PartialPrompt]:
        """Yields each prompt when it is complete, in any order, and as partial after each earlier answer."""
        limit = smallest(self.limit, Target(self.model).context_length)
        while chunk := list(islice(prompts, self.chunk)):
            active: list[_ActivePrompt] = []
            for prompt in chunk:
                try:
                    active.append(self._start(prompt, limit))
                except RedrafterError as error:
                    if self.skip is None:
                        raise
                    self.skip(str(error))
                    yield CompletedPrompt(prompt, [], Counter())
            while active:
                for variant in range(len(self.sampling.temperatures)):
                    waiting = [one for one in active if one.waiting[variant]]
                    for one, answer in self._answer(waiting, variant):
                        one.add_answer(variant, answer, self.tokenizer, limit)
                        yield one.result()
                active = [one for one in active if any(one.waiting)]

    def _start(self, prompt: Prompt, limit: int | None) -> _ActivePrompt:
        """Starts a prompt's dialogues, or continues after the answers that an interrupted run saved.

        Raises RedrafterError if the first turn does not fit.
        """
        temperatures = self.sampling.temperatures
        first = prompt.number * len(temperatures)
        dialogues = [
            Dialogue(prompt, temperature, self.seeds[first + variant], **self.reading)
            for variant, temperature in enumerate(temperatures)
        ]
        waiting = [dialogue.next_turn(self.tokenizer, limit) for dialogue in dialogues]
        active = _ActivePrompt(prompt, dialogues, waiting, [[] for _ in dialogues])
        for variant, saved in enumerate(prompt.partial or []):
            for tokens, reason, steps in saved:
                active.add_answer(variant, (tokens, reason, steps), self.tokenizer, limit)
        return active

    def _answer(self, active: list[_ActivePrompt], variant: int) -> Iterator[tuple[_ActivePrompt, Answer]]:
        """Generates one turn of the dialogues at temperature number `variant`; yields each when it finishes."""
        if not active:
            return
        dialogues = [one.dialogues[variant] for one in active]
        settings = self.sampling.settings(self.sampling.temperatures[variant]) | self.settings | ONE_TEXT
        if settings["do_sample"]:
            settings["seed"] = [dialogue.seed for dialogue in dialogues]
        settings = with_stop_strings(self.model, settings, self.tokenizer)
        prompts = [dialogue.rows[-1].input_ids for dialogue in dialogues]
        overrides = ShapeOverrides(
            *(settings.get(name) for name in ("beam_width", "beam_length", "node_budget", "lookup"))
        )
        batch = min(settings.get("batch_size") or len(prompts), len(prompts))
        length = 0
        if self.drafter is not None:
            length = resolved_shape(method_of(self.drafter), batch, overrides).depth
        events = self.progress.watch(stream(self.model, self.drafter, prompts, **settings))
        for row in finished(events, rows=len(dialogues), positions=length):
            yield active[row.row], (row.new_tokens, row.finish_reason, row.stats.steps)


@dataclass
class _ActivePrompt:
    """A prompt that is being answered: one dialogue per temperature."""

    prompt: Prompt
    dialogues: list[Dialogue]
    waiting: list[bool]
    """Whether each dialogue waits for an answer."""
    answers: list[list[Answer]]
    """Answers of each dialogue so far; the dialogue can be rebuilt from them."""

    def add_answer(self, variant: int, answer: Answer, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        tokens, reason, _ = answer
        self.answers[variant].append(answer)
        self.dialogues[variant].add_answer(tokens, reason, tokenizer, limit)
        self.waiting[variant] = self.dialogues[variant].next_turn(tokenizer, limit)

    def result(self) -> CompletedPrompt | PartialPrompt:
        """All rows with their counts if no turn is left, else the answers so far."""
        answers = [answer for own in self.answers for answer in own]
        if any(self.waiting):
            turns = sum(dialogue.plan.answers for dialogue in self.dialogues)
            return PartialPrompt(self.prompt, [list(own) for own in self.answers], len(answers) / turns)
        rows = [row for dialogue in self.dialogues for row in dialogue.training_rows()]
        counts = Counter(rows=len(rows), answers=len(answers))
        counts["tokens"] = sum(len(tokens) for tokens, _, _ in answers)
        counts["steps"] = sum(steps for _, _, steps in answers)
        counts["cut"] = sum(reason == "length" for row in rows for reason in row["finish_reasons"])
        return CompletedPrompt(self.prompt, rows, counts)
