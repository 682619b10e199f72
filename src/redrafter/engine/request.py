"""One call of `generate` or `stream`, checked: rows, drafting, sampling and stopping.

Guarantees that nothing runs before all arguments are valid.  Does not know the decode loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from redrafter.core.noise import row_seeds
from redrafter.core.shapes import DraftShape, ShapeOverrides
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.settings import check_numbers, plain, resolve
from redrafter.decoding.state import Row, sampler_of
from redrafter.decoding.step import Decoder
from redrafter.engine.controls import (
    Controls,
    callables,
    check_logprobs,
    check_token_settings,
    make_criteria,
    with_sampling,
)
from redrafter.engine.inputs import end_tokens, padding_token, read_prompts
from redrafter.engine.kept import target_for
from redrafter.errors import RedrafterError
from redrafter.kernels import kernels_enabled
from redrafter.proposers import Drafter, Method, method_of
from redrafter.proposers.base import resolved_shape
from redrafter.proposers.loading import cached_drafter
from redrafter.targets.structure import unwrapped
from redrafter.targets.target import Target

NEW_TOKENS = 256
"""Default for the maximum number of new tokens."""


@dataclass(eq=False)
class Task:
    """A row to decode, and when it finishes."""

    row: Row
    ends: frozenset[int]
    """End tokens."""
    criteria: list[StoppingCriteria]
    output_scores: bool = False
    output_logits: bool = False
    admitted: float | None = None
    """When it was given a slot, by `time.perf_counter`."""


@dataclass(frozen=True)
class Request:
    """The checked arguments of one call."""

    model: nn.Module
    decoder: Decoder
    tasks: list[Task]
    batch: int
    """Maximum number of rows decoded together."""
    tokenizer: PreTrainedTokenizerBase | None
    pad: int
    """The token that pads shorter rows."""
    inferred_padding: int | None
    """The token that counts as padding in `input_ids`; None if an end token is used for padding."""
    output_scores: bool
    output_logits: bool
    fast: bool
    """Whether optimisations are used."""
    compile: bool
    """Whether the target's layers are compiled."""

    @property
    def target(self) -> Target:
        """The target model."""
        return self.decoder.target

    @property
    def rows(self) -> list[Row]:
        """One row for each returned sequence."""
        return [task.row for task in self.tasks]

    @property
    def sampler(self) -> Sampler:
        """How all rows are sampled if they are decoded together."""
        return sampler_of(dict(enumerate(self.rows)))


def request(
    model: nn.Module,
    drafter: Drafter | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    lookup: bool | None = None,
    shape: DraftShape | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fast: bool = True,
    compile: bool = False,
    **settings: Any,
) -> Request:
    """Checks the arguments of `generate` and `stream`.  `settings` are those of `tasks`.

    Raises RedrafterError.
    """
    sizes = _integers(batch_size=batch_size, beam_width=beam_width, beam_length=beam_length, node_budget=node_budget)
    batch_size = sizes.pop("batch_size")
    method = method_for(model, drafter)
    with kernels_enabled(fast):
        target = target_for(model, () if method is None else method.layers, fast=fast)
    config, checked = tasks(target, input_ids, attention_mask, tokenizer=tokenizer, **settings)
    batch = min(batch_size or len(checked), len(checked))
    proposer = None
    if method is not None:
        with kernels_enabled(fast):
            proposer = method.proposer(target, _shape(method, batch, ShapeOverrides(**sizes, lookup=lookup), shape))
    return Request(
        model,
        Decoder(target, proposer),
        checked,
        batch=batch,
        tokenizer=tokenizer,
        pad=padding_token(config),
        inferred_padding=None if config.pad_token_id in end_tokens(config) else config.pad_token_id,
        output_scores=bool(config.output_scores),
        output_logits=bool(config.output_logits),
        fast=fast,
        compile=compile,
    )


def method_for(model: nn.Module, drafter: Drafter | str | Path | None) -> Method | None:
    """What a caller passed as `drafter`, loaded if it is a name.  Raises RedrafterError."""
    if isinstance(drafter, str | Path):
        drafter = cached_drafter(drafter, unwrapped(model))
    return None if drafter is None else method_of(drafter)


def tasks(
    target: Target,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: GenerationConfig | None = None,
    seed: SupportsIndex | Sequence[int] | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    drafter: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_id: SupportsIndex | Sequence[int] | None = None,
    **settings: Any,
) -> tuple[GenerationConfig, list[Task]]:
    """The rows of a call with their settings, and the merged config.  `settings` are fields of a `GenerationConfig`.

    `drafter=False` decodes without drafts.  Raises RedrafterError.
    """
    processors = callables("logits_processor", logits_processor)
    controls = Controls.of(processors, prefix_allowed_tokens_fn, presence_penalty, frequency_penalty, logit_bias)
    config = resolve(target.model, generation_config, settings)
    if eos_token_id is not None:
        config.eos_token_id = plain(eos_token_id)
    check_token_settings(config, controls.bias, target.vocab_size)
    check_logprobs(logprobs, target.vocab_size)
    prompts = read_prompts(target, config, input_ids, attention_mask)
    rows = [
        replace(row, drafting=bool(drafter), logprobs=plain(logprobs))
        for row in _rows(target, config, prompts, plain(seed))
    ]
    rows = with_sampling(target, config, rows, controls)
    criteria = make_criteria(config, tokenizer, callables("stopping_criteria", stopping_criteria))
    shared = (end_tokens(config), criteria, bool(config.output_scores), bool(config.output_logits))
    return config, [Task(row, *shared) for row in _within_context(target, rows)]


def _integers(**values: Any) -> dict[str, Any]:
    """Python integers, or None.  Raises RedrafterError for other values."""
    integers = {name: plain(value) for name, value in values.items()}
    check_numbers(integers, whole=True)
    if integers["batch_size"] is not None and integers["batch_size"] < 1:
        raise RedrafterError(f"batch_size must be at least 1, not {integers['batch_size']}.")
    return integers


def _shape(method: Method, batch: int, overrides: ShapeOverrides, shape: DraftShape | None) -> DraftShape:
    """The draft shape of a call."""
    if shape is None:
        return resolved_shape(method, batch, overrides)
    if overrides or overrides.lookup is not None:
        raise RedrafterError("Pass either shape, or beam_width, beam_length, node_budget and lookup.")
    return shape


def _rows(target: Target, config: GenerationConfig, prompts: list[list[int]], seed: Any) -> list[Row]:
    """One row for each returned sequence."""
    prompts = [prompt for prompt in prompts for _ in range(config.num_return_sequences or 1)]
    if seed is not None and not config.do_sample:
        raise RedrafterError("seed has no effect in greedy decoding: set do_sample, or leave it out.")
    seeds = row_seeds(seed, len(prompts)) if config.do_sample else [0] * len(prompts)
    return [
        Row(number, prompt, row_seed, _budget(config, number, prompt))
        for number, (prompt, row_seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _budget(config: GenerationConfig, row: int, prompt: list[int]) -> int:
    """The maximum number of new tokens of a row."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        return NEW_TOKENS
    if len(prompt) >= config.max_length:
        raise RedrafterError(f"The prompt of row {row} has {len(prompt)} tokens, max_length is {config.max_length}.")
    return int(config.max_length) - len(prompt)


def _within_context(target: Target, rows: list[Row]) -> list[Row]:
    """Rows whose budget fits the model's context.  The last new token is never read, so it needs no position."""
    if target.context_length is None:
        return rows
    room = target.context_length + 1
    return [replace(row, budget=min(row.budget, room - len(row.prompt))) for row in rows]
