"""What one call asks for, checked once: rows, how they are drafted, how they are drawn, where they end.

Promises that nothing is run before all of it is is_finite.  Does not know the loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TopPLogitsWarper,
)

from redrafter.core.noise import row_seeds
from redrafter.decoding.processors import Nucleus, OccurrencePenalty
from redrafter.decoding.sampling import Sampler
from redrafter.decoding.settings import check_numbers, plain, resolve
from redrafter.errors import RedrafterError
from redrafter.proposers import Method, Proposer
from redrafter.proposers.loading import named
from redrafter.targets.target import Target, unwrapped

NEW_TOKENS = 256
"""Tokens that a row may write where nobody says how many."""


@dataclass(frozen=True)
class Row:
    """One text to write."""

    number: int
    prompt: list[int]
    seed: int
    """Of its noise; without meaning where decoding is greedy."""
    budget: int
    """New tokens at most."""


@dataclass(frozen=True)
class Request:
    """One call of `generate` or `stream`."""

    target: Target
    proposer: Proposer | None
    sampler: Sampler
    rows: list[Row]
    batch: int
    """Rows decoded together at most."""
    criteria: list[StoppingCriteria]
    tokenizer: PreTrainedTokenizerBase | None
    pad: int
    """What fills rows that are shorter than others."""
    padding: int | None
    """The token that may be padding in `input_ids`, which an end token is not."""
    output_scores: bool
    output_logits: bool
    fast: bool
    """Whether a step is to be captured, where it can be, and weights merged or packed."""
    compile: bool
    """Whether the target's layers are to be compiled."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens with which a row ends."""
        return self.sampler.ends

    @property
    def length(self) -> int:
        """L, drafted tokens of a path; 0 without drafting."""
        return 0 if self.proposer is None else self.proposer.length

    @property
    def size(self) -> int:
        """N, nodes of a tree."""
        return 1 if self.proposer is None else self.proposer.size


def request(
    model: nn.Module,
    drafter: Method | str | Path | None,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    seed: SupportsIndex | Sequence[int] | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_id: SupportsIndex | Sequence[int] | None = None,
    fast: bool = True,
    compile: bool = False,
    **settings: Any,
) -> Request:
    """Checks the arguments of `generate` and `stream`; `settings` are fields of a `GenerationConfig`.

    Raises RedrafterError.
    """
    if isinstance(drafter, str | Path):
        drafter = named(drafter, unwrapped(model))
    if drafter is not None and not isinstance(drafter, Method):
        raise RedrafterError(
            f"{type(drafter).__name__} is no method of drafting: pass a loaded drafter, its folder or hub id, or "
            "prompt-lookup; TwoModel drafts by a model."
        )
    batch_size, beam_width, beam_length, node_budget, seed, presence_penalty, frequency_penalty = map(
        plain, (batch_size, beam_width, beam_length, node_budget, seed, presence_penalty, frequency_penalty)
    )
    target = Target(model, () if drafter is None else drafter.layers)
    config = resolve(target.model, generation_config, settings)
    if eos_token_id is not None:
        config.eos_token_id = plain(eos_token_id)
    ends = ends_of(config)
    _refuse_unknown_tokens(config, target.vocab_size)
    shape = {"beam_width": beam_width, "beam_length": beam_length, "node_budget": node_budget}
    check_numbers({"batch_size": batch_size, **shape}, whole=True)
    check_numbers({"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty})
    if batch_size is not None and batch_size < 1:
        raise RedrafterError(f"batch_size must be at least 1, not {batch_size}.")
    prompts = _prompts(target, config, input_ids, attention_mask)
    prompts = [prompt for prompt in prompts for _ in range(config.num_return_sequences or 1)]
    batch = min(batch_size or len(prompts), len(prompts))
    proposer = None
    if drafter is not None:
        proposer = drafter.proposer(target, *drafter.drafting(batch, beam_width, beam_length, node_budget))
    if seed is not None and not config.do_sample:
        raise RedrafterError("seed means nothing in greedy decoding: set do_sample, or leave it out.")
    seeds = row_seeds(seed, len(prompts)) if config.do_sample else [0] * len(prompts)
    rows = [
        Row(number, prompt, one, _budget(config, number, prompt))
        for number, (prompt, one) in enumerate(zip(prompts, seeds, strict=True))
    ]
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise RedrafterError(f"tokenizer must be a tokenizer of transformers, not {tokenizer!r}.")
    extra = _called("logits_processor", logits_processor)
    penalties = (presence_penalty or 0.0, frequency_penalty or 0.0)
    sampler = _sampler(target, config, rows, extra, prefix_allowed_tokens_fn, penalties)
    if target.context_length is not None:  # the last token written is never read again, so it needs no position
        room = target.context_length + 1
        rows = [replace(row, budget=min(row.budget, room - len(row.prompt))) for row in rows]
    sampler = replace(sampler, ends=ends, limits=[len(row.prompt) + row.budget for row in rows])
    return Request(
        target,
        proposer,
        sampler,
        rows,
        batch=batch,
        criteria=_criteria(config, tokenizer, _called("stopping_criteria", stopping_criteria)),
        tokenizer=tokenizer,
        pad=padding_of(config),
        padding=None if config.pad_token_id in ends else config.pad_token_id,
        output_scores=bool(config.output_scores),
        output_logits=bool(config.output_logits),
        fast=fast,
        compile=fast and compile and target.packs,  # a mask as wide as the text is long needs code for every length
    )


def _prompts(
    target: Target,
    config: GenerationConfig,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
) -> list[list[int]]:
    """Prompts as lists of ids, padding removed."""
    prompts = _unpadded(config, _tensor(input_ids), _tensor(attention_mask))
    if not prompts:
        raise RedrafterError("There is no prompt.")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise RedrafterError(f"The prompt of row {row} is empty; give it at least one token.")
        if target.context_length is not None and len(prompt) > target.context_length:
            raise RedrafterError(
                f"The prompt of row {row} has {len(prompt)} tokens, the model's context {target.context_length}."
            )
        if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
            raise RedrafterError(f"The prompt of row {row} holds ids outside the vocabulary of {target.vocab_size}.")
    return prompts


def _tensor(value: Any) -> Any:
    """A NumPy array as a tensor."""
    try:
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    except TypeError:  # an array of objects, whose rows are looked at one by one
        return list(value)


def _unpadded(
    config: GenerationConfig, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise RedrafterError("An attention mask goes with a tensor of input ids, not with a list of rows.")
        return [_row(number, row) for number, row in enumerate(_rows(input_ids))]
    if input_ids.ndim != 2:
        raise RedrafterError(f"input_ids must have two dimensions, rows and tokens, not {input_ids.ndim}.")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise RedrafterError(f"input_ids must be whole numbers, not {str(input_ids.dtype).removeprefix('torch.')}.")
    inferred = attention_mask is None
    if attention_mask is None:
        attention_mask = _inferred_mask(config, input_ids)
    if not isinstance(attention_mask, Tensor):
        raise RedrafterError(f"The attention mask must be a tensor, not {type(attention_mask).__name__}.")
    if attention_mask.shape != input_ids.shape:
        raise RedrafterError(
            f"The attention mask's shape {tuple(attention_mask.shape)} is not that of the input ids "
            f"{tuple(input_ids.shape)}."
        )
    kept = attention_mask.bool()
    framed = torch.nn.functional.pad(kept.int(), (1, 1))
    if bool((framed.diff(dim=1).abs().sum(dim=1) > 2).any()) or (inferred and not bool(kept.any(dim=1).all())):
        if inferred:
            raise RedrafterError(
                f"A row of input_ids holds the padding token {config.pad_token_id} between others, or nothing else: "
                "pass attention_mask, which says what is padding."
            )
        raise RedrafterError("The attention mask has holes: pad each row at one or both ends only.")
    return [row[mask].tolist() for row, mask in zip(input_ids, kept, strict=True)]


def _inferred_mask(config: GenerationConfig, input_ids: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """As transformers infers it: padding tokens are left out, unless the padding token ends texts too.

    Rows of one token have no padding.
    """
    if config.pad_token_id is None or int(config.pad_token_id) in ends_of(config) or input_ids.shape[1] == 1:
        return torch.ones_like(input_ids)
    return (input_ids.long() != int(config.pad_token_id)).long()


def check_rows(request: Request, input_ids: Any) -> None:
    """Raises RedrafterError for rows in a list that look padded, as a list comes without an attention mask."""
    rows, pad = [row.prompt for row in request.rows], request.padding
    if isinstance(input_ids, Tensor | np.ndarray) or pad is None or len({len(row) for row in rows}) != 1:
        return
    for end in (0, -1):
        padded = [row[end] == pad for row in rows]
        if any(padded) and not all(padded):
            raise RedrafterError(
                f"Row {padded.index(True)} of input_ids looks padded with token {pad}, and a list has no attention "
                "mask: give the rows without padding, or tensors of input_ids and attention_mask."
            )


def _rows(input_ids: Any) -> list[Any]:
    if isinstance(input_ids, str | Mapping):
        raise RedrafterError(f"input_ids must be rows of token ids, not a {type(input_ids).__name__}.")
    try:
        return list(input_ids)
    except TypeError:
        raise RedrafterError(f"input_ids must be rows of token ids, not {input_ids!r}.") from None


def _row(number: int, row: Any) -> list[int]:
    try:
        return [index(token) for token in row]
    except TypeError:
        raise RedrafterError(f"Row {number} of input_ids must hold whole numbers, not be {row!r}.") from None


def _budget(config: GenerationConfig, row: int, prompt: list[int]) -> int:
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is None:
        return NEW_TOKENS
    if len(prompt) >= config.max_length:
        raise RedrafterError(f"The prompt of row {row} has {len(prompt)} tokens, max_length is {config.max_length}.")
    return int(config.max_length) - len(prompt)


def ends_of(config: GenerationConfig) -> frozenset[int]:
    """The end tokens that a config names.  Raises RedrafterError for what is no token's id."""
    told = config.eos_token_id
    if told is None:
        return frozenset()
    try:
        several = isinstance(told, Sequence) or (isinstance(told, Tensor) and told.ndim)
        return frozenset(map(index, told if several else [told]))
    except TypeError:
        raise RedrafterError(f"eos_token_id must be the id of a token, or several, not {told!r}.") from None


def padding_of(config: GenerationConfig) -> int:
    """The token that fills rows which have ended: as in transformers an end token where there is no padding token."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = plain(config.eos_token_id)
    first = ends[0] if isinstance(ends, Sequence) and ends else ends
    return 0 if first is None or isinstance(first, Sequence) else int(first)


def _refuse_unknown_tokens(config: GenerationConfig, vocabulary: int) -> None:
    """Raises RedrafterError where a setting that has to find a token names none of the vocabulary."""
    for name in ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"):
        for token in _ids_within(getattr(config, name)):
            if not 0 <= token < vocabulary:
                raise RedrafterError(f"{name} names token {token}, outside the vocabulary of {vocabulary}.")


def _ids_within(told: Any) -> Iterator[int]:
    """The whole numbers of lists within lists, and of what a dictionary is keyed by."""
    if isinstance(told, int):
        yield told
    elif isinstance(told, list | tuple | dict):
        for one in told:
            yield from _ids_within(one)


def _sampler(
    target: Target,
    config: GenerationConfig,
    rows: list[Row],
    extra: list[LogitsProcessor],
    allowed: Callable[[int, Tensor], list[int]] | None,
    penalties: tuple[float, float],
) -> Sampler:
    """transformers' own processors, for each row as if it were alone; one list for all where they heed no text."""
    sampler = Sampler(bool(config.do_sample), [_processors(target, config, rows[0], extra, allowed, penalties)])
    if not sampler.lazy:
        return sampler
    every = [_processors(target, config, row, extra, allowed, penalties) for row in rows]
    return Sampler(sampler.do_sample, every)


def _processors(
    target: Target,
    config: GenerationConfig,
    row: Row,
    extra: list[LogitsProcessor],
    allowed: Callable[[int, Tensor], list[int]] | None,
    penalties: tuple[float, float],
) -> list[LogitsProcessor]:
    config = copy.copy(config)
    config.max_length = len(row.prompt) + row.budget
    config.num_beams = 1
    ends = sorted(ends_of(config))
    config._eos_token_tensor = torch.tensor(ends, device=target.device) if ends else None
    own = [OccurrencePenalty(len(row.prompt), *penalties)] if any(penalties) else []
    try:
        processors = target.model._get_logits_processor(
            config,
            input_ids_seq_length=len(row.prompt),
            encoder_input_ids=torch.tensor([row.prompt], device=target.device),
            prefix_allowed_tokens_fn=None if allowed is None else lambda _, text: allowed(row.number, text),
            logits_processor=[*own, *extra],
            device=target.device,
        )
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise RedrafterError(f"transformers refuses a setting: {str(error).strip().rstrip('.')}.") from error
    return [Nucleus.like(one) if type(one) is TopPLogitsWarper else one for one in processors]


def _called(name: str, told: Any) -> list[Any]:
    if told is not None and not (isinstance(told, Sequence) and all(map(callable, told))):
        raise RedrafterError(f"{name} must be a list of what is called, not {told!r}.")
    return list(told or [])


def _criteria(
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    extra: list[StoppingCriteria],
) -> list[StoppingCriteria]:
    from transformers import MaxTimeCriteria, StopStringCriteria

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
