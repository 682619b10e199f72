"""The fields of transformers' `GenerationConfig`: supported, rejected with an error, or ignored.

Every field that could change the text is either applied or rejected, fields of future versions included.  Does not know
prompts or drafters.  The tables in `docs/settings.md` are generated from `FIELDS`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, WatermarkingConfig

from redrafter.errors import RedrafterError

Status = Literal["supported", "rejected", "ignored"]


@dataclass(frozen=True)
class Field:
    """How one field is treated.  A rejected field may hold one of its `neutral` values, which have no effect."""

    status: Status
    note: str = ""
    neutral: tuple[Any, ...] = (None, False)


def _fields(status: Status, names: str, note: str, *neutral: Any) -> dict[str, Field]:
    return {name: Field(status, note, (None, False, *neutral)) for name in names.split()}


_BEAM_SEARCH = "only for beam search by the target, which is not speculative decoding"
_ASSISTED = "transformers' own drafting; here the drafter drafts"

_NOTES = {
    "max_length": "prompt and new tokens; `max_new_tokens` takes precedence",
    "max_new_tokens": "256 if neither is set",
    "min_length": "prompt and new tokens; `min_new_tokens` takes precedence",
    "max_time": "checked after every token; counts from the call, including the time that a row waits",
    "stop_strings": "needs `tokenizer`; a row finishes with the token that completes one; `()` for none",
    "eos_token_id": "one or several; `()` for none",
    "pad_token_id": "pads the rows of `sequences`",
    "top_k": "off unless it is set; transformers would use 50",
    "num_return_sequences": "with sampling: this many consecutive rows per prompt",
    "forced_bos_token_id": "takes effect after a prompt of one token",
    "output_scores": "`Generation.scores`: after the processors, before the sampling noise",
    "output_logits": "`Generation.logits`",
}
_SUPPORTED = (
    "max_length max_new_tokens min_length min_new_tokens max_time stop_strings eos_token_id pad_token_id do_sample "
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff num_return_sequences repetition_penalty "
    "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids sequence_bias "
    "forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens exponential_decay_length_penalty "
    "remove_invalid_values renormalize_logits watermarking_config output_scores output_logits"
)

FIELDS: dict[str, Field] = {
    **{name: Field("supported", _NOTES.get(name, "")) for name in _SUPPORTED.split()},
    **_fields("rejected", "num_beams num_beam_groups", "beam search by the target", 1),
    **_fields("rejected", "diversity_penalty constraints force_words_ids", _BEAM_SEARCH, 0.0),
    **_fields("rejected", "penalty_alpha", "contrastive search", 0.0),
    **_fields("rejected", "dola_layers", "decoding by contrasting layers"),
    **_fields("rejected", "guidance_scale", "classifier-free guidance", 1, 1.0),
    **_fields("rejected", "token_healing", "it rewrites the prompt; apply it before the call"),
    **_fields("rejected", "output_attentions", "attention weights over a draft tree differ from those over a text"),
    **_fields("rejected", "output_hidden_states", "only the last layer's states are kept"),
    **_fields(
        "rejected",
        "use_mtp prompt_lookup_num_tokens assistant_early_exit speculation_type is_assistant",
        _ASSISTED,
    ),
    **_fields("ignored", "length_penalty early_stopping low_memory", _BEAM_SEARCH),
    **_fields(
        "ignored",
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size "
        "assistant_lookbehind target_lookbehind assistant_ensemble_weight",
        _ASSISTED,
    ),
    **_fields(
        "ignored",
        "use_cache cache_implementation cache_config max_cache_len",
        "memory and speed only: decoding has its own cache",
    ),
    **_fields("ignored", "prefill_chunk_size", "prompts are read in passes of up to 8,192 tokens"),
    **_fields("ignored", "compile_config disable_compile", "speed only"),
    **_fields("ignored", "continuous_batching_config", "a finished row always gives its slot to a waiting row"),
    **_fields("ignored", "return_dict_in_generate", "a `Generation` contains everything; `custom_generate` uses it"),
    **_fields("ignored", "bos_token_id", "prompts are used as they are"),
    **_fields("ignored", "decoder_start_token_id", "transformers uses it for encoder-decoder models"),
    **_fields("ignored", "transformers_version", "records the origin of the config"),
}


class CompleteConfig(GenerationConfig):  # type: ignore[misc]
    """A config whose unset fields are off; the model's own config is not consulted."""


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields that have no effect in greedy decoding."""

_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""Values of these fields that have no effect in sampling either."""

ONE_TEXT: dict[str, Any] = {"num_return_sequences": 1, "output_scores": False, "output_logits": False}
"""Settings for callers that need one text per prompt and no scores, whatever the model's own config says."""

COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_return_sequences")
"""Fields that hold whole numbers."""

_LENGTHS = ("max_length", "max_new_tokens")

_CONFIG_TYPES: dict[str, Any] = {"watermarking_config": WatermarkingConfig, "compile_config": CompileConfig}
"""Fields that hold an object, which may also be given as a dictionary of its arguments."""


def plain(value: Any) -> Any:
    """Converts numbers and arrays of NumPy and torch to Python's, also inside lists and dictionaries."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def with_stop_strings(
    model: PreTrainedModel, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Adds the tokenizer to `settings` if they, or the model's own config, contain stop strings."""
    own = getattr(getattr(model, "generation_config", None), "stop_strings", None)
    return {**settings, "tokenizer": tokenizer} if settings.get("stop_strings", own) else dict(settings)


def check_numbers(values: Mapping[str, Any], *, whole: bool = False) -> None:
    """Raises RedrafterError for a value that is neither None nor a number, with `whole` a whole number."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Integral if whole else Real):
            raise RedrafterError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}.")


def resolve(model: PreTrainedModel, config: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
    """Merges the caller's arguments, the caller's config and the model's own config, in this order of precedence.

    Raises RedrafterError for a setting that is unknown, not supported, impossible, or without effect.
    """
    arguments = {name: plain(value) for name, value in arguments.items() if value is not None}
    for name in arguments:
        if name not in FIELDS:
            similar = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
            advice = f"; did you mean {similar[0]}?" if similar else "."
            raise RedrafterError(f"{name} is not a generation setting{advice}")
    if config is not None and not isinstance(config, GenerationConfig):
        raise RedrafterError(f"generation_config must be a GenerationConfig, not a {type(config).__name__}.")
    resolved = _merge(model, config, arguments)
    check_numbers({name: getattr(resolved, name) for name in COUNTS}, whole=True)
    check_numbers({name: getattr(resolved, name, None) for name in (*SAMPLING, "max_time")})
    _reject_unsupported(resolved)
    if resolved.do_sample:
        _check_sampling(resolved)
    else:
        _check_greedy(resolved, arguments)
        for name in SAMPLING:  # the model's own config may set them for sampling
            setattr(resolved, name, None)
    if resolved.min_new_tokens is not None:  # takes precedence, as in transformers
        resolved.min_length = None
    try:
        resolved.validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise RedrafterError(f"transformers refuses a setting: {str(error).strip().rstrip('.')}.") from error
    return resolved


def _merge(model: PreTrainedModel, config: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
    own = None if isinstance(config, CompleteConfig) else getattr(model, "generation_config", None)
    merged = GenerationConfig() if config is None else copy.deepcopy(config)
    has_length = any(name in arguments or getattr(merged, name, None) is not None for name in _LENGTHS)
    for name, value in explicit_fields(own or GenerationConfig()).items():
        if getattr(merged, name, None) is None and not (name in _LENGTHS and has_length):
            setattr(merged, name, copy.deepcopy(value))
    for name, value in arguments.items():
        setattr(merged, name, value)
        if name in _LENGTHS:  # an argument overrides both lengths of the configs
            for other in _LENGTHS:
                if other not in arguments:
                    setattr(merged, other, None)
    for name, value in explicit_fields(merged).items():
        setattr(merged, name, _as_object(name, plain(value)))
    return merged


def _as_object(name: str, value: Any) -> Any:
    """Converts a dictionary to the object that the field holds.  Raises RedrafterError for wrong arguments."""
    if name not in _CONFIG_TYPES or not isinstance(value, dict):
        return value
    try:
        return _CONFIG_TYPES[name](**value)
    except (TypeError, ValueError) as error:
        kind = _CONFIG_TYPES[name].__name__
        raise RedrafterError(f"{name} must hold the arguments of a {kind}, not {value!r} ({error}).") from error


def explicit_fields(config: GenerationConfig) -> dict[str, Any]:
    """The public fields that are not None."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and value is not None}


def _reject_unsupported(config: GenerationConfig) -> None:
    known = vars(GenerationConfig())  # old configs contain entries that transformers ignores too
    for name, value in explicit_fields(config).items():
        field = FIELDS.get(name, Field("rejected", "this version does not know the setting"))
        if name in known and field.status == "rejected" and value not in field.neutral:
            raise RedrafterError(f"{name}={value!r} is not supported: {field.note}.")


def _check_greedy(config: GenerationConfig, arguments: dict[str, Any]) -> None:
    for name in SAMPLING:
        if name in arguments and arguments[name] != _OFF.get(name):
            raise RedrafterError(f"{name} has no effect in greedy decoding: set do_sample, or leave it out.")
    if (config.num_return_sequences or 1) > 1:
        raise RedrafterError("num_return_sequences needs do_sample: greedy decoding would repeat the same text.")


def _check_sampling(config: GenerationConfig) -> None:
    def check(name: str, valid: bool, rule: str) -> None:
        if getattr(config, name, None) is not None and not valid:
            raise RedrafterError(f"{name} must be {rule}, not {getattr(config, name):g}.")

    check("temperature", (config.temperature or 0) > 0, "positive for sampling")
    check("top_k", (config.top_k or 0) >= 0, "at least 1, or 0 for no limit")
    for name in ("top_p", "typical_p"):
        check(name, 0 < (getattr(config, name) or 0) <= 1, "in (0, 1]")
    check("min_p", 0 <= (config.min_p or 0) <= 1, "in [0, 1]")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        check(name, 0 <= (getattr(config, name) or 0) < 1, "in [0, 1)")
    check("num_return_sequences", (config.num_return_sequences or 0) >= 1, "at least 1")
