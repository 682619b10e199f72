"""`model.generate(..., custom_generate=...)`: transformers' own interface with a drafter.

Returns the text of transformers' own loop; every row gets the text that it gets without the other rows and without
padding.  Does not know how decoding works.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from redrafter.decoding.settings import CompleteConfig
from redrafter.engine.generate import generate
from redrafter.engine.inputs import padding_token
from redrafter.engine.results import Generation
from redrafter.errors import RedrafterError
from redrafter.proposers import Drafter

_PREPARED_INPUTS = ("logits_to_keep", "use_cache", "position_ids", "cache_position", "past_key_values")
"""Inputs that transformers prepares for its own loop."""

_WITHHELD = ("assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask")
"""Arguments of `model.generate` that it does not pass to a callable, and that are not supported."""

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_EXTRACT = getattr(getattr(GenerationMixin, "_extract_generation_mode_kwargs", None), "__code__", None)


class _Signature(inspect.Signature):
    """The signature of `custom_generate`, which also makes transformers pass `tokenizer`.

    transformers (5.23 at least) removes `tokenizer` from the arguments of `model.generate` and drops it if a callable
    decodes, so that stop strings fail.  This puts it back while transformers looks up which arguments the callable has.
    """

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:  # type: ignore[override]
        """The parameters by name."""
        caller = _frame(_EXTRACT)
        if caller is not None:
            tokenizer = caller.f_locals.get("generation_mode_kwargs", {}).get("tokenizer")
            if tokenizer is not None:
                caller.f_locals["kwargs"].setdefault("tokenizer", tokenizer)
        return super().parameters


class _Relay(BaseStreamer):  # type: ignore[misc]
    """Forwards tokens to the user's streamer; the prompt only if transformers did not, and the end only once."""

    def __init__(self, streamer: BaseStreamer, *, skip_prompt: bool):
        self.streamer, self.skip_prompt, self.ended = streamer, skip_prompt, False

    def put(self, value: Tensor) -> None:
        """Forwards tokens."""
        if self.skip_prompt:
            self.skip_prompt = False
        else:
            self.streamer.put(value)

    def end(self) -> None:
        """Forwards the end of the text."""
        if not self.ended:
            self.ended = True
            self.streamer.end()


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[LogitsProcessor],
    stopping_criteria: Sequence[StoppingCriteria],
    generation_config: GenerationConfig,
    *,
    drafter: Drafter | str | Path | None = None,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    lookup: bool | None = None,
    seed: SupportsIndex | Sequence[int] | None = None,
    fast: bool = True,
    compile: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(**inputs, custom_generate=redrafter.custom_generate, drafter=drafter, ...)`.

    `drafter`: as for `redrafter.generate`.  Pass a streamer as `streamer`, as in `model.generate`, or as
    `text_streamer`; its `end()` is called after an error too, so that no reader waits forever.  Returns what
    `model.generate` returns: padded sequences [B, T], or with `return_dict_in_generate` an output that holds them, with
    scores and logits of 0 after the end of a row.  Raises RedrafterError.
    """
    del tokenizer  # transformers has already made a criterion of the stop strings
    withheld = _withheld_arguments()
    streamer, relay = withheld.pop("streamer", None), None
    with ExitStack() as cleanup:
        for one in {id(one): one for one in (streamer, text_streamer) if one is not None}.values():
            relay = _Relay(one, skip_prompt=one is streamer)
            cleanup.callback(relay.end)
        if streamer is not None and text_streamer is not None and streamer is not text_streamer:
            raise RedrafterError("streamer and text_streamer are the same argument: pass only one of them.")
        if drafter is None:
            raise RedrafterError("custom_generate needs a drafter: pass drafter=, a loaded drafter or its folder.")
        attention_mask = model_kwargs.pop("attention_mask", None)
        if attention_mask is None:  # transformers found no padding
            attention_mask = torch.ones_like(input_ids)
        _check_inputs(model, input_ids, attention_mask, model_kwargs | withheld)
        out = generate(
            model,
            drafter,
            input_ids,
            attention_mask,
            streamer=relay,
            **_request(model, input_ids, attention_mask, generation_config, logits_processor, stopping_criteria),
            batch_size=batch_size,
            beam_width=beam_width,
            beam_length=beam_length,
            node_budget=node_budget,
            lookup=lookup,
            seed=seed,
            fast=fast,
            compile=compile,
        )
    return _output(out, input_ids, generation_config)


custom_generate.__signature__ = _Signature.from_callable(custom_generate)  # type: ignore[attr-defined]


def from_folder(model: PreTrainedModel, **arguments: Any) -> Any:
    """Called by `custom_generate/generate.py` in a drafter's folder, with all arguments of `model.generate`.

    The drafter is the one beside that file.  transformers has the folder or Hub id only in the frame of its caller.
    """
    if arguments.get("cache_implementation") == "paged":
        raise RedrafterError("cache_implementation='paged' is not supported: transformers would not use the drafter.")
    caller = _frame(_GENERATE)
    if arguments.get("drafter") is None and caller is not None:
        arguments["drafter"] = caller.f_locals["custom_generate"]
    return model.generate(custom_generate=custom_generate, **arguments)


def _frame(code: CodeType | None) -> FrameType | None:
    """The innermost call that is running this code."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _withheld_arguments() -> dict[str, Any]:
    """Arguments of the running `model.generate` that it does not pass to a callable."""
    caller = _frame(_GENERATE)
    if caller is None:  # custom_generate was called directly
        return {}
    arguments = {name: caller.f_locals.get(name) for name in ("streamer", *_WITHHELD)}
    if caller.f_locals.get("kwargs", {}).get("past_key_values") is not None:
        arguments["Your own cache, past_key_values,"] = True
    return arguments


def _check_inputs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, model_kwargs: dict[str, Any]
) -> None:
    """Raises RedrafterError for inputs of the model that decoding would ignore."""
    for name, value in model_kwargs.items():
        if name not in _PREPARED_INPUTS and value is not None and value is not False:
            raise RedrafterError(f"{name} is not supported by redrafter's custom_generate.")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        usual = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        differs = positions.shape[-1] != usual.shape[-1]
        if differs or bool(((positions.to(usual) != usual) & (attention_mask != 0)).any()):
            raise RedrafterError("position_ids other than the usual ones are not supported.")
    _reject_adapter_names(model)


def _reject_adapter_names(model: PreTrainedModel) -> None:
    """Raises RedrafterError if PEFT selects an adapter per row: rows change their position in the batch here."""
    found = False
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in getattr(hook, "keywords", {}):
                found = True
                del module._forward_pre_hooks[number]  # PEFT does not remove it after an error
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if found:
        raise RedrafterError("adapter_names is not supported: call set_adapter, and generate once per adapter.")


def _request(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    criteria: Sequence[StoppingCriteria],
) -> dict[str, Any]:
    """The arguments of `redrafter.generate` for what transformers prepared."""
    longest = min((one.max_length for one in criteria if type(one) is MaxLengthCriteria), default=None)
    constraints = [one for one in processors if type(one) is PrefixConstrainedLogitsProcessor]
    return {
        "generation_config": per_row_config(config),
        "max_new_tokens": max(1, (longest or config.max_length) - input_ids.shape[1]),
        "eos_token_id": [
            token for one in criteria if type(one) is EosTokenCriteria for token in one.eos_token_id.tolist()
        ],
        "logits_processor": user_processors(model, input_ids, attention_mask, config, processors),
        "prefix_allowed_tokens_fn": constraints[0]._prefix_allowed_tokens_fn if constraints else None,
        "stopping_criteria": [one for one in criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)],
    }


def per_row_config(config: GenerationConfig) -> CompleteConfig:
    """A config for rows, without what transformers already did for the batch: copies, stop strings, the time limit."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    fields |= {"num_return_sequences": 1, "stop_strings": None, "max_time": None}
    if not config.return_dict_in_generate:  # then transformers gives no scores to criteria either
        fields |= {"output_scores": False, "output_logits": False}
    return CompleteConfig(**fields)


def user_processors(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    prepared: Sequence[LogitsProcessor],
) -> list[LogitsProcessor]:
    """The processors that the user passed.  Those of transformers are created again for each row.

    A user's processor of a type that transformers creates too replaces that one; it is recognised by its attributes.
    """
    own = model._get_logits_processor(
        config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids[:: config.num_return_sequences or 1],
        device=model.device,
        model_kwargs={"attention_mask": attention_mask},
    )
    created = {type(one): one for one in own}
    return [
        one
        for one in prepared
        if type(one) is not PrefixConstrainedLogitsProcessor
        and not (type(one) in created and _equal(vars(one), vars(created[type(one)])))
    ]


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are equal; tensors and generators are compared by content."""
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        one, other = one.get_state(), other.get_state()
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other.to(one.device)).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _output(out: Generation, input_ids: Tensor, config: GenerationConfig) -> Tensor | GenerateDecoderOnlyOutput:
    """What `model.generate` returns."""
    new = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in out.new_tokens], True, padding_token(config))
    sequences = torch.cat((input_ids, new.to(input_ids)), dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=_steps(out.scores), logits=_steps(out.logits))


def _steps(rows: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """Converts rows [new, V] to a tuple of steps [B, V]."""
    return None if rows is None else torch.nn.utils.rnn.pad_sequence(rows).unbind()
