"""`model.generate(..., custom_generate=...)`: decoding by a drafter behind transformers' own interface.

Promises the text of transformers' own loop: every row gets what it would get alone, padding left out.  Does not know
how it is decoded.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from redrafter.decoding import generate
from redrafter.errors import RedrafterError
from redrafter.proposers import Method
from redrafter.proposers.loading import load_method
from redrafter.settings import Whole

_OWN = ("logits_to_keep", "use_cache", "position_ids", "cache_position", "past_key_values")
"""What transformers prepares for its own loop."""

_loaded: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[object, Method]]] = weakref.WeakKeyDictionary()
"""Drafters that were named by their folder, so that each is read once for a model where it is."""


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[LogitsProcessor],
    stopping_criteria: Sequence[StoppingCriteria],
    generation_config: GenerationConfig,
    *,
    drafter: Method | str | Path | None = None,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    seed: SupportsIndex | Sequence[int] | None = None,
    fast: bool = True,
    compile: bool = False,
    text_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(**inputs, custom_generate=redrafter.custom_generate, drafter=drafter, ...)`.

    `drafter`: a loaded one or another method of drafting, or what `redrafter.proposers.loading.load_method` takes: a
    folder or hub id.  transformers keeps `streamer` to itself, so pass one as `text_streamer`.  Returns what
    `model.generate` returns: padded sequences [B, T], or with `return_dict_in_generate` the output that holds them;
    there, scores and logits after a row's end are 0.  Raises RedrafterError.
    """
    if drafter is None:
        raise RedrafterError("custom_generate needs a drafter: pass drafter=, a loaded one or its folder.")
    if isinstance(drafter, str | Path):
        drafter = _named(drafter, model)
    attention_mask = model_kwargs.pop("attention_mask", None)  # transformers passes it twice where it is named
    _refuse(input_ids, attention_mask, model_kwargs)
    config = generation_config
    longest = min((one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria), default=None)
    ends = [end for one in stopping_criteria if type(one) is EosTokenCriteria for end in one.eos_token_id.tolist()]
    out = generate(
        model,
        drafter,
        input_ids,
        attention_mask,
        streamer=text_streamer,
        generation_config=_alone(config),
        max_new_tokens=max(1, (longest or config.max_length) - input_ids.shape[1]),
        eos_token_id=ends,
        batch_size=batch_size,
        beam_width=beam_width,
        beam_length=beam_length,
        node_budget=node_budget,
        seed=seed,
        fast=fast,
        compile=compile,
        logits_processor=_users(model, input_ids, attention_mask, config, logits_processor),
        prefix_allowed_tokens_fn=_allowed(logits_processor),
        stopping_criteria=[one for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)],
    )
    pad = _pad(config)
    new = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in out.new_tokens], True, pad)
    sequences = torch.cat((input_ids, new.to(input_ids)), dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=_steps(out.scores), logits=_steps(out.logits))


def _named(drafter: str | Path, model: PreTrainedModel) -> Method:
    """The drafter of a folder or hub id, loaded anew where the model was moved or converted."""
    known, name, place = _loaded.setdefault(model, {}), str(drafter), (model.device, model.dtype)
    if name not in known or known[name][0] != place:
        known[name] = place, load_method(drafter, model)
    return known[name][1]


def from_folder(model: PreTrainedModel, **arguments: Any) -> Any:
    """What `custom_generate/generate.py` in a drafter's folder calls, with all arguments of `model.generate`.

    The drafter is the one beside that file: transformers names its folder or hub id only in the frame that calls.
    """
    drafter = arguments.pop("drafter", None)
    frame = inspect.currentframe()
    while drafter is None and frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("custom_generate"), str):
            drafter = frame.f_locals["custom_generate"]
        frame = frame.f_back
    told = {name: value for name, value in arguments.items() if value is not None}
    if "streamer" in told:
        told["text_streamer"] = told.pop("streamer")
    return model.generate(custom_generate=custom_generate, drafter=drafter, **told)


def _refuse(input_ids: Tensor, attention_mask: Tensor | None, model_kwargs: dict[str, Any]) -> None:
    """Raises RedrafterError for inputs of the model that decoding would not heed."""
    for name, value in model_kwargs.items():
        if name not in _OWN and value is not None and value is not False:
            raise RedrafterError(f"{name} is not supported by redrafter's custom_generate.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise RedrafterError("past_key_values that hold a text already are not supported; pass the whole prompt.")
    told = model_kwargs.get("position_ids")
    if told is not None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        usual = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if told.shape != usual.shape or bool(((told.to(usual) != usual) & (mask != 0)).any()):
            raise RedrafterError("position_ids other than the usual ones are not supported.")


def _alone(config: GenerationConfig) -> Whole:
    """A config without what transformers prepared for the batch; its sequences to return are rows already."""
    told = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return Whole(**(told | {"num_return_sequences": 1, "stop_strings": None, "max_time": None}))


def _users(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    prepared: Sequence[LogitsProcessor],
) -> list[LogitsProcessor]:
    """The processors that the user passed; transformers' own are made again, for each row as if it were alone.

    One of a type that transformers makes too has taken that one's place, and is told by what it holds.
    """
    own = model._get_logits_processor(
        config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids[:: config.num_return_sequences or 1],
        device=model.device,
        model_kwargs={"attention_mask": attention_mask},
    )
    made = {type(one): one for one in own}
    return [
        one
        for one in prepared
        if type(one) is not PrefixConstrainedLogitsProcessor
        and not (type(one) in made and _alike(vars(one), vars(made[type(one)])))
    ]


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors and generators within them by what they hold."""
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        one, other = one.get_state(), other.get_state()
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _allowed(prepared: Sequence[LogitsProcessor]) -> Any:
    constrained = [p for p in prepared if type(p) is PrefixConstrainedLogitsProcessor]
    return constrained[0]._prefix_allowed_tokens_fn if constrained else None


def _pad(config: GenerationConfig) -> int:
    """As in transformers: an end token where there is no padding token."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return 0 if ends is None else int(ends if isinstance(ends, int) else ends[0])


def _steps(rows: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """Rows [new, V] as a tuple of steps [B, V]."""
    return None if rows is None else torch.nn.utils.rnn.pad_sequence(rows).unbind()
