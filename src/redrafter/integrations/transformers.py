"""`model.generate(..., custom_generate=...)`: decoding by a drafter behind transformers' own interface.

Promises the text of transformers' own loop: every row gets what it would get alone, padding left out.  Does not know
how it is decoded.
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
from redrafter.errors import RedrafterError
from redrafter.proposers import Method

_OWN = ("logits_to_keep", "use_cache", "position_ids", "cache_position", "past_key_values")
"""What transformers prepares for its own loop."""

_NOT_PASSED_ON = ("assistant_model", "synced_gpus", "negative_prompt_ids", "negative_prompt_attention_mask")
"""Arguments of `model.generate` that it does not pass on to a callable, and that are not supported."""

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_EXTRACT = getattr(getattr(GenerationMixin, "_extract_generation_mode_kwargs", None), "__code__", None)


class _Signature(inspect.Signature):
    """The signature of `custom_generate`, which also gets hold of `tokenizer`.

    transformers (up to 5.23 at least) takes `tokenizer` out of the arguments of `model.generate` and drops it where a
    callable decodes, so that stop strings fail.  Here it is put back while transformers looks up which arguments the
    callable takes, among them `tokenizer`.
    """

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:  # type: ignore[override]
        """The parameters by name."""
        looking = _frame(_EXTRACT)
        if looking is not None:
            taken = looking.f_locals.get("generation_mode_kwargs", {}).get("tokenizer")
            if taken is not None:
                looking.f_locals["kwargs"].setdefault("tokenizer", taken)
        return super().parameters


class _Relay(BaseStreamer):  # type: ignore[misc]
    """Passes tokens on to the caller's streamer, but the prompt only if transformers has not, and the end only once."""

    def __init__(self, streamer: BaseStreamer, *, prompt_shown: bool):
        self.streamer, self.prompt_shown, self.ended = streamer, prompt_shown, False

    def put(self, value: Tensor) -> None:
        """Tokens."""
        if self.prompt_shown:
            self.prompt_shown = False
        else:
            self.streamer.put(value)

    def end(self) -> None:
        """Nothing follows."""
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
    drafter: Method | str | Path | None = None,
    batch_size: int | None = None,
    beam_width: int | None = None,
    beam_length: int | None = None,
    node_budget: int | None = None,
    seed: SupportsIndex | Sequence[int] | None = None,
    fast: bool = True,
    compile: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(**inputs, custom_generate=redrafter.custom_generate, drafter=drafter, ...)`.

    `drafter`: as for `redrafter.generate`.  `streamer` may be given as in `model.generate`, or as `text_streamer`; its
    `end()` is called also where an error is raised, so that no reader waits for ever.  Returns what `model.generate`
    returns: padded sequences [B, T], or with `return_dict_in_generate` the output that holds them; there, scores and
    logits after a row's end are 0.  Raises RedrafterError.
    """
    del tokenizer  # transformers has made its stop strings a criterion
    told = _not_passed_on()
    streamer = told.pop("streamer", None)
    relay = None if text_streamer is None else _Relay(text_streamer, prompt_shown=False)
    if streamer is not None:
        relay = _Relay(streamer, prompt_shown=True)
    with ExitStack() as ending:
        if relay is not None:
            ending.callback(relay.end)
        if streamer is not None and text_streamer is not None and streamer is not text_streamer:
            ending.callback(text_streamer.end)
            raise RedrafterError("streamer and text_streamer are two names of one argument: pass one of them.")
        if drafter is None:
            raise RedrafterError("custom_generate needs a drafter: pass drafter=, a loaded one or its folder.")
        attention_mask = model_kwargs.pop("attention_mask", None)  # None where transformers found no padding
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _refuse(input_ids, attention_mask, model_kwargs | told)
        _refuse_adapter_names(model)
        config = generation_config
        longest = min((one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria), default=None)
        ends = [end for one in stopping_criteria if type(one) is EosTokenCriteria for end in one.eos_token_id.tolist()]
        users = [one for one in stopping_criteria if type(one) not in (MaxLengthCriteria, EosTokenCriteria)]
        out = generate(
            model,
            drafter,
            input_ids,
            attention_mask,
            streamer=relay,
            generation_config=per_row_config(config),
            max_new_tokens=max(1, (longest or config.max_length) - input_ids.shape[1]),
            eos_token_id=ends,
            batch_size=batch_size,
            beam_width=beam_width,
            beam_length=beam_length,
            node_budget=node_budget,
            seed=seed,
            fast=fast,
            compile=compile,
            logits_processor=user_processors(model, input_ids, attention_mask, config, logits_processor),
            prefix_allowed_tokens_fn=_allowed(logits_processor),
            stopping_criteria=users,
        )
    new = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in out.new_tokens], True, padding_token(config))
    sequences = torch.cat((input_ids, new.to(input_ids)), dim=1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=_steps(out.scores), logits=_steps(out.logits))


custom_generate.__signature__ = _Signature.from_callable(custom_generate)  # type: ignore[attr-defined]


def from_folder(model: PreTrainedModel, **arguments: Any) -> Any:
    """What `custom_generate/generate.py` in a drafter's folder calls, with all arguments of `model.generate`.

    The drafter is the one beside that file: transformers names its folder or hub id only in the frame that calls.
    """
    if arguments.get("cache_implementation") == "paged":
        raise RedrafterError("cache_implementation='paged' is not supported: transformers would not use the drafter.")
    calling = _frame(_GENERATE)
    if arguments.get("drafter") is None and calling is not None:
        arguments["drafter"] = calling.f_locals["custom_generate"]
    return model.generate(custom_generate=custom_generate, **arguments)


def _frame(code: CodeType | None) -> FrameType | None:
    """The innermost call that is running this code."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _not_passed_on() -> dict[str, Any]:
    """The arguments of the running `model.generate` that a callable is not given, and a cache that its caller gave."""
    calling = _frame(_GENERATE)
    if calling is None:  # custom_generate was called by hand
        return {}
    told = {name: calling.f_locals.get(name) for name in ("streamer", *_NOT_PASSED_ON)}
    if calling.f_locals.get("kwargs", {}).get("past_key_values") is not None:
        told["A cache of your own, past_key_values,"] = True
    return told


def _refuse(input_ids: Tensor, attention_mask: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raises RedrafterError for inputs of the model that decoding would not heed."""
    for name, value in model_kwargs.items():
        if name not in _OWN and value is not None and value is not False:
            raise RedrafterError(f"{name} is not supported by redrafter's custom_generate.")
    told = model_kwargs.get("position_ids")
    if told is not None:
        usual = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        if told.shape[-1] != usual.shape[-1] or bool(((told.to(usual) != usual) & (attention_mask != 0)).any()):
            raise RedrafterError("position_ids other than the usual ones are not supported.")


def _refuse_adapter_names(model: PreTrainedModel) -> None:
    """Raises RedrafterError where PEFT chooses an adapter for each row, as rows do not keep their places here."""
    found = False
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if "adapter_names" in getattr(hook, "keywords", {}):
                found = True
                del module._forward_pre_hooks[number]  # PEFT leaves it there after an error
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if found:
        raise RedrafterError("adapter_names is not supported: call set_adapter, and generate for each adapter alone.")


def per_row_config(config: GenerationConfig) -> CompleteConfig:
    """A config without what transformers prepared for the batch; its sequences to return are rows already."""
    told = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    told |= {"num_return_sequences": 1, "stop_strings": None, "max_time": None}
    if not config.return_dict_in_generate:  # then transformers gives criteria no scores either
        told |= {"output_scores": False, "output_logits": False}
    return CompleteConfig(**told)


def user_processors(
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


def _steps(rows: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """Rows [new, V] as a tuple of steps [B, V]."""
    return None if rows is None else torch.nn.utils.rnn.pad_sequence(rows).unbind()
