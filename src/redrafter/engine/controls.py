"""Logits processors and stopping criteria of a call: transformers' own objects, made from a `GenerationConfig`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
)

from redrafter.decoding.processors import OccurrencePenalty
from redrafter.decoding.sampling import RowProcessors
from redrafter.decoding.settings import check_numbers, plain
from redrafter.decoding.state import Row, Sampling
from redrafter.engine.inputs import end_tokens
from redrafter.errors import RedrafterError
from redrafter.targets.target import Target

_AS_TENSORS = {
    hf.RepetitionPenaltyLogitsProcessor: ("repetition", "penalty"),
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processors that a step holds as tensors: the field of `Sampling`, and the processor's attribute."""


@dataclass(frozen=True)
class Controls:
    """What a caller adds to a config."""

    processors: list[LogitsProcessor]
    allowed_tokens: Callable[[int, Tensor], list[int]] | None
    """`prefix_allowed_tokens_fn`."""
    presence_penalty: float
    frequency_penalty: float
    bias: dict[int, float]
    """`logit_bias`."""

    @classmethod
    def of(
        cls, processors: list[LogitsProcessor], allowed_tokens: Any, presence: Any, frequency: Any, bias: Any = None
    ) -> Controls:
        """Raises RedrafterError for penalties that are not numbers, and biases that are not numbers by token id."""
        penalties = {"presence_penalty": plain(presence), "frequency_penalty": plain(frequency)}
        check_numbers(penalties)
        bias = plain({} if bias is None else bias)
        if not isinstance(bias, dict) or not all(isinstance(token, int) for token in bias):
            raise RedrafterError(f"logit_bias must map token ids to numbers, not be {bias!r}.")
        check_numbers({f"The logit_bias of token {token}": value for token, value in bias.items()})
        return cls(processors, allowed_tokens, **{name: value or 0.0 for name, value in penalties.items()}, bias=bias)


def with_sampling(target: Target, config: GenerationConfig, rows: list[Row], controls: Controls) -> list[Row]:
    """The rows with their sampling settings.

    A setting without a tensor form turns all settings of the row into processors; those that look at scores alone are
    the same for all rows.
    """
    own = Sampling(
        bool(config.do_sample),
        presence=controls.presence_penalty,
        frequency=controls.frequency_penalty,
        bias=controls.bias,
    )
    found: list[Row] = []
    for row in rows:
        processors = _processors(target, config, row, controls)
        tensors = [one for one in processors if _is_tensor(one)]
        fields = (_AS_TENSORS[type(one)] + (one,) for one in tensors if type(one) in _AS_TENSORS)
        sampling = replace(own, **{name: getattr(one, attribute) for name, attribute, one in fields})
        if len(tensors) == len(processors):
            found.append(replace(row, sampling=sampling))
            continue
        if own.bias:
            bias = {(token,): value for token, value in own.bias.items()}
            processors.insert(0, hf.SequenceBiasLogitsProcessor(bias))
        limit = min(
            len(row.prompt) + row.budget, math.inf if target.context_length is None else target.context_length + 1
        )
        rule = RowProcessors(tuple(processors), end_tokens(config), int(limit))
        if not rule.lazy:
            return [replace(row, sampling=Sampling(own.do_sample), processors=rule) for row in rows]
        found.append(replace(row, sampling=sampling, processors=rule))
    return found


def _is_tensor(processor: LogitsProcessor) -> bool:
    """Whether a step holds a processor's setting as a tensor."""
    known = type(processor) is OccurrencePenalty or type(processor) in _AS_TENSORS
    return known and getattr(processor, "prompt_ignore_length", None) is None


def _processors(target: Target, config: GenerationConfig, row: Row, controls: Controls) -> list[LogitsProcessor]:
    """The processors that transformers would use if the row were decoded alone."""
    config = copy.copy(config)
    config.max_length = len(row.prompt) + row.budget
    config.num_beams = 1
    ends = sorted(end_tokens(config))
    config._eos_token_tensor = torch.tensor(ends, device=target.device) if ends else None
    allowed = controls.allowed_tokens
    reads_prompt = config.encoder_repetition_penalty is not None or config.encoder_no_repeat_ngram_size is not None
    penalties = (controls.presence_penalty, controls.frequency_penalty)
    occurrence = [OccurrencePenalty(len(row.prompt), *penalties)] if any(penalties) else []
    try:
        processors = target.model._get_logits_processor(
            config,
            input_ids_seq_length=len(row.prompt),
            encoder_input_ids=torch.tensor([row.prompt], device=target.device) if reads_prompt else None,
            prefix_allowed_tokens_fn=None if allowed is None else lambda _, text: allowed(row.number, text),
            logits_processor=[*occurrence, *controls.processors],
            device=target.device,
        )
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise RedrafterError(f"transformers refuses a setting: {str(error).strip().rstrip('.')}.") from error
    return list(processors)


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


def check_token_settings(config: GenerationConfig, bias: dict[int, float], vocabulary: int) -> None:
    """Raises RedrafterError if a setting names a token that is not in the vocabulary.  `bias` is `logit_bias`."""
    names = ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")
    for name, value in {"logit_bias": bias, **{name: getattr(config, name) for name in names}}.items():
        for token in _ids_in(value):
            if not 0 <= token < vocabulary:
                raise RedrafterError(f"{name} names token {token}, outside the vocabulary of {vocabulary}.")


def check_logprobs(logprobs: Any, vocabulary: int) -> None:
    """Raises RedrafterError for a number of log-probabilities that is impossible."""
    check_numbers({"logprobs": plain(logprobs)}, whole=True)
    if logprobs is not None and not 0 <= logprobs <= vocabulary:
        raise RedrafterError(f"logprobs must lie between 0 and the vocabulary's {vocabulary} tokens, not {logprobs}.")


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
