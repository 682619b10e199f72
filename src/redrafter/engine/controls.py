"""Logits processors and stopping criteria of a call: transformers' own objects, made from a `GenerationConfig`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
    TopPLogitsWarper,
)

from redrafter.decoding.processors import Nucleus, OccurrencePenalty
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.settings import check_numbers, plain
from redrafter.decoding.step import Row
from redrafter.engine.inputs import end_tokens
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target


@dataclass(frozen=True)
class Controls:
    """What a caller adds to a config."""

    processors: list[LogitsProcessor]
    allowed_tokens: Callable[[int, Tensor], list[int]] | None
    """`prefix_allowed_tokens_fn`."""
    presence_penalty: float
    frequency_penalty: float

    @classmethod
    def of(cls, processors: list[LogitsProcessor], allowed_tokens: Any, presence: Any, frequency: Any) -> Controls:
        """Raises RedrafterError for penalties that are not numbers."""
        penalties = {"presence_penalty": plain(presence), "frequency_penalty": plain(frequency)}
        check_numbers(penalties)
        return cls(processors, allowed_tokens, **{name: value or 0.0 for name, value in penalties.items()})


def make_sampler(target: Target, config: GenerationConfig, rows: list[Row], controls: Controls) -> Sampler:
    """The sampler of a call: one list of processors for each row, or for all rows if they ignore input_ids."""
    sampler = Sampler(bool(config.do_sample), [_processors(target, config, rows[0], controls)])
    if not sampler.lazy:
        return sampler
    return Sampler(sampler.do_sample, [_processors(target, config, row, controls) for row in rows])


def _processors(target: Target, config: GenerationConfig, row: Row, controls: Controls) -> list[LogitsProcessor]:
    """The processors that transformers would use if the row were decoded alone."""
    config = copy.copy(config)
    config.max_length = len(row.prompt) + row.budget
    config.num_beams = 1
    ends = sorted(end_tokens(config))
    config._eos_token_tensor = torch.tensor(ends, device=target.device) if ends else None
    penalties = (controls.presence_penalty, controls.frequency_penalty)
    own = [OccurrencePenalty(len(row.prompt), *penalties)] if any(penalties) else []
    allowed = controls.allowed_tokens
    try:
        processors = target.model._get_logits_processor(
            config,
            input_ids_seq_length=len(row.prompt),
            encoder_input_ids=torch.tensor([row.prompt], device=target.device),
            prefix_allowed_tokens_fn=None if allowed is None else lambda _, text: allowed(row.number, text),
            logits_processor=[*own, *controls.processors],
            device=target.device,
        )
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise RedrafterError(f"transformers refuses a setting: {str(error).strip().rstrip('.')}.") from error
    return [Nucleus.like(one) if type(one) is TopPLogitsWarper else one for one in processors]


def make_criteria(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None, extra: list[StoppingCriteria]
) -> list[StoppingCriteria]:
    """The stopping criteria of a config, then those of the caller.  Raises RedrafterError for invalid ones."""
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise RedrafterError(f"tokenizer must be a tokenizer of transformers, not {tokenizer!r}.")
    criteria: list[StoppingCriteria] = []
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=config.max_time))
    if config.stop_strings is not None and config.stop_strings not in ([], ()):
        strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
        if not isinstance(strings, Collection) or not all(isinstance(one, str) and one for one in strings):
            raise RedrafterError("Every one of the stop_strings must be a string that is not empty.")
        if tokenizer is None:
            raise RedrafterError("stop_strings need the tokenizer: pass tokenizer=, or stop_strings=() for none.")
        try:
            criteria.append(StopStringCriteria(tokenizer, list(strings)))
        except (ValueError, TypeError, AttributeError) as error:
            raise RedrafterError(f"transformers refuses stop_strings: {str(error).strip().rstrip('.')}.") from error
    return [*criteria, *extra]


def check_token_settings(config: GenerationConfig, vocabulary: int) -> None:
    """Raises RedrafterError if a setting names a token that is not in the vocabulary."""
    for name in ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"):
        for token in _ids_in(getattr(config, name)):
            if not 0 <= token < vocabulary:
                raise RedrafterError(f"{name} names token {token}, outside the vocabulary of {vocabulary}.")


def callables(name: str, value: Any) -> list[Any]:
    """A list of callables.  Raises RedrafterError for anything else."""
    if value is not None and not (isinstance(value, Sequence) and all(map(callable, value))):
        raise RedrafterError(f"{name} must be a list of callables, not {value!r}.")
    return list(value or [])


def _ids_in(value: Any) -> Iterator[int]:
    """The integers in nested lists and in the keys of dictionaries."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value:
            yield from _ids_in(one)
