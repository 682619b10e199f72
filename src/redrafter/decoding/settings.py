"""What a `GenerationConfig` of transformers can say, and what becomes of it: honoured, refused by name, or irrelevant.

Promises that nothing which would change the text goes unheeded, a field that this version does not know included.  Does
not know prompts or drafters.  `docs/settings.md` is written from the table here.
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
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WatermarkingConfig,
)

from redrafter.errors import RedrafterError


@dataclass(frozen=True)
class Field:
    """One field's fate; a refused one may hold a value of `neutral`, which asks for nothing."""

    fate: Literal["honoured", "refused", "irrelevant"]
    note: str = ""
    neutral: tuple[Any, ...] = (None, False)


def _honoured(note: str = "") -> Field:
    return Field("honoured", note)


def _refused(note: str, *neutral: Any) -> Field:
    return Field("refused", note, (None, False, *neutral))


def _irrelevant(note: str) -> Field:
    return Field("irrelevant", note)


_BEAMS = "for beam search by the target, which is not speculative decoding"
_ASSISTED = "transformers' own drafting; here the drafter drafts"
_CACHE = "memory and speed only: decoding has its own cache"
_UNUSED = "transformers uses it for other kinds of models"

FIELDS: dict[str, Field] = {
    "max_length": _honoured("prompt and new tokens; `max_new_tokens` goes first"),
    "max_new_tokens": _honoured("256 where neither is set"),
    "min_length": _honoured("prompt and new tokens; `min_new_tokens` goes first"),
    "min_new_tokens": _honoured(),
    "max_time": _honoured("looked at after every token; from the call on, waiting included"),
    "stop_strings": _honoured("needs `tokenizer`; a row ends with the token that completes one; `()` for none"),
    "eos_token_id": _honoured("one or several; `()` for none"),
    "pad_token_id": _honoured("fills the rows of `sequences`"),
    "do_sample": _honoured(),
    "temperature": _honoured(),
    "top_k": _honoured("off where nobody sets it: transformers' silent 50 is not taken over"),
    "top_p": _honoured(),
    "min_p": _honoured(),
    "top_h": _honoured(),
    "typical_p": _honoured(),
    "epsilon_cutoff": _honoured(),
    "eta_cutoff": _honoured(),
    "num_return_sequences": _honoured("when sampling: so many rows for each prompt, one after another"),
    "repetition_penalty": _honoured(),
    "encoder_repetition_penalty": _honoured(),
    "no_repeat_ngram_size": _honoured(),
    "encoder_no_repeat_ngram_size": _honoured(),
    "bad_words_ids": _honoured(),
    "sequence_bias": _honoured(),
    "forced_bos_token_id": _honoured("takes effect after a prompt of one token"),
    "forced_eos_token_id": _honoured(),
    "suppress_tokens": _honoured(),
    "begin_suppress_tokens": _honoured(),
    "exponential_decay_length_penalty": _honoured(),
    "remove_invalid_values": _honoured(),
    "renormalize_logits": _honoured(),
    "watermarking_config": _honoured(),
    "output_scores": _honoured("`Generation.scores`: after the processors, before the noise"),
    "output_logits": _honoured("`Generation.logits`"),
    "num_beams": _refused("beam search by the target", 1),
    "num_beam_groups": _refused("beam search by the target", 1),
    "diversity_penalty": _refused(_BEAMS, 0.0),
    "constraints": _refused(_BEAMS),
    "force_words_ids": _refused(_BEAMS),
    "penalty_alpha": _refused("contrastive search", 0.0),
    "dola_layers": _refused("decoding by contrasting layers"),
    "guidance_scale": _refused("classifier-free guidance", 1, 1.0),
    "token_healing": _refused("it rewrites the prompt; do that before"),
    "output_attentions": _refused("attention weights of a tree are not those of a text"),
    "output_hidden_states": _refused("only the last layer's states are kept"),
    "use_mtp": _refused(_ASSISTED),
    "prompt_lookup_num_tokens": _refused(_ASSISTED),
    "assistant_early_exit": _refused(_ASSISTED),
    "speculation_type": _refused(_ASSISTED),
    "is_assistant": _refused(_ASSISTED),
    "length_penalty": _irrelevant(_BEAMS),
    "early_stopping": _irrelevant(_BEAMS),
    "low_memory": _irrelevant(_BEAMS),
    "num_assistant_tokens": _irrelevant(_ASSISTED),
    "num_assistant_tokens_schedule": _irrelevant(_ASSISTED),
    "assistant_confidence_threshold": _irrelevant(_ASSISTED),
    "max_matching_ngram_size": _irrelevant(_ASSISTED),
    "assistant_lookbehind": _irrelevant(_ASSISTED),
    "target_lookbehind": _irrelevant(_ASSISTED),
    "assistant_ensemble_weight": _irrelevant(_ASSISTED),
    "use_cache": _irrelevant(_CACHE),
    "cache_implementation": _irrelevant(_CACHE),
    "cache_config": _irrelevant(_CACHE),
    "max_cache_len": _irrelevant(_CACHE),
    "prefill_chunk_size": _irrelevant("prompts are always run in chunks"),
    "compile_config": _irrelevant("speed only"),
    "disable_compile": _irrelevant("speed only"),
    "continuous_batching_config": _irrelevant("rows that end always give their slot to waiting ones"),
    "return_dict_in_generate": _irrelevant("a `Generation` holds it all; heeded by `custom_generate`"),
    "bos_token_id": _irrelevant("prompts are given as they are"),
    "decoder_start_token_id": _irrelevant(_UNUSED),
    "transformers_version": _irrelevant("where the config came from"),
}


class CompleteConfig(GenerationConfig):  # type: ignore[misc]
    """A config that says all: what it does not set is off, whatever the model's own config says."""


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields that mean nothing in greedy decoding."""


ONE_TEXT: dict[str, Any] = {"num_return_sequences": 1, "output_scores": False, "output_logits": False}
"""What a caller sets that writes one text for each prompt, whatever the model's own config says."""

COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_return_sequences")
"""Fields that hold whole numbers."""

_CONFIGS: dict[str, Any] = {"watermarking_config": WatermarkingConfig, "compile_config": CompileConfig}
"""Fields that hold an object, which may also be given as a dictionary of its arguments."""


def plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays, also inside lists and dictionaries, as Python's; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def with_stop_strings(
    model: PreTrainedModel, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """`settings`, with the tokenizer added where there are stop strings, the model's own included."""
    own = getattr(getattr(model, "generation_config", None), "stop_strings", None)
    return {**settings, "tokenizer": tokenizer} if settings.get("stop_strings", own) else dict(settings)


def check_numbers(values: Mapping[str, Any], *, whole: bool = False) -> None:
    """Raises RedrafterError for what is set and no number."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Integral if whole else Real):
            raise RedrafterError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}.")


def resolve(model: PreTrainedModel, config: GenerationConfig | None, told: dict[str, Any]) -> GenerationConfig:
    """One config from the caller's word, the caller's config and the model's own, in this order; not set is off.

    Raises RedrafterError for what is not supported, impossible, unknown, or would go unheeded.
    """
    told = {name: plain(value) for name, value in told.items() if value is not None}
    for name in told:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
            advice = f"; did you mean {near[0]}?" if near else "."
            raise RedrafterError(f"{name} is no setting of generation{advice}")
    if config is not None and not isinstance(config, GenerationConfig):
        raise RedrafterError(f"generation_config must be a GenerationConfig, not a {type(config).__name__}.")
    own = None if isinstance(config, CompleteConfig) else getattr(model, "generation_config", None)
    resolved = GenerationConfig() if config is None else copy.deepcopy(config)
    lengths = ("max_length", "max_new_tokens")
    chosen = any(name in told or getattr(resolved, name, None) is not None for name in lengths)
    for name, value in explicit_fields(own or GenerationConfig()).items():
        if getattr(resolved, name, None) is None and not (name in lengths and chosen):
            setattr(resolved, name, copy.deepcopy(value))
    for name, value in told.items():
        setattr(resolved, name, value)
        if name in lengths:  # the last word on the length is the only one
            for other in lengths:
                if other != name and other not in told:
                    setattr(resolved, other, None)
    for name, value in explicit_fields(resolved).items():
        setattr(resolved, name, _built(name, plain(value)))
    check_numbers({name: getattr(resolved, name) for name in COUNTS}, whole=True)
    check_numbers({name: getattr(resolved, name, None) for name in (*SAMPLING, "max_time")})
    _refuse(resolved, told)
    if resolved.min_new_tokens is not None:  # as in transformers
        resolved.min_length = None
    if not resolved.do_sample:  # a model's own law of sampling means nothing now
        for name in SAMPLING:
            setattr(resolved, name, None)
    try:
        resolved.validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise RedrafterError(f"transformers refuses a setting: {str(error).strip().rstrip('.')}.") from error
    return resolved


def _built(name: str, value: Any) -> Any:
    """A field's value; where it is to hold an object and is a dictionary, the object made of that.

    Raises RedrafterError where it cannot be made.
    """
    if name not in _CONFIGS or not isinstance(value, dict):
        return value
    try:
        return _CONFIGS[name](**value)
    except (TypeError, ValueError) as error:
        kind = _CONFIGS[name].__name__
        raise RedrafterError(f"{name} must hold the arguments of a {kind}, not {value!r} ({error}).") from error


def explicit_fields(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_") and value is not None}


def _refuse(config: GenerationConfig, told: dict[str, Any]) -> None:
    known = vars(GenerationConfig())  # old configs hold entries that mean nothing to transformers either
    for name, value in explicit_fields(config).items():
        field = FIELDS.get(name, _refused("a setting that this version does not know"))
        if name in known and field.fate == "refused" and value not in field.neutral:
            raise RedrafterError(f"{name}={value!r} is not supported: {field.note}.")
    if not config.do_sample:
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0}
        for name in SAMPLING:
            if name in told and told[name] != neutral.get(name):
                raise RedrafterError(f"{name} means nothing in greedy decoding: set do_sample, or leave it out.")
        if (config.num_return_sequences or 1) > 1:
            raise RedrafterError(
                "num_return_sequences means nothing in greedy decoding, where all would be the same: set do_sample."
            )
        return
    if config.temperature is not None and not config.temperature > 0:
        raise RedrafterError(f"The temperature must be positive to sample, not {config.temperature:g}.")
    if config.top_k is not None and config.top_k < 0:
        raise RedrafterError(f"top_k must be at least 1, or 0 for no limit, not {config.top_k}.")
    for name in ("top_p", "typical_p"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise RedrafterError(f"{name} must lie in (0, 1], not be {value:g}.")
    if config.min_p is not None and not 0 <= config.min_p <= 1:
        raise RedrafterError(f"min_p must lie in [0, 1], not be {config.min_p:g}.")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise RedrafterError(f"{name} must lie in [0, 1), not be {value:g}.")
    if config.num_return_sequences is not None and config.num_return_sequences < 1:
        raise RedrafterError(f"num_return_sequences must be at least 1, not {config.num_return_sequences}.")


def page() -> str:
    """The text of `docs/settings.md`."""
    fates = {
        "honoured": "Honoured",
        "refused": "Refused",
        "irrelevant": "Irrelevant",
    }
    why = {
        "honoured": "By transformers' own processors and criteria, in its order.",
        "refused": "With an error that names the setting, unless it holds the value that asks for nothing.",
        "irrelevant": "Taken and passed over: they change no text here.",
    }
    parts = [_INTRODUCTION]
    for fate, title in fates.items():
        lines = "\n".join(f"| `{name}` | {field.note} |" for name, field in FIELDS.items() if field.fate == fate)
        parts.append(f"## {title}\n\n{why[fate]}\n\n| setting | |\n|---|---|\n{lines}\n")
    return "\n".join(parts)


_INTRODUCTION = """\
# Settings

Written from the table in `src/redrafter/decoding/settings.py`; do not edit. A test holds it against the installed transformers.

`generate` and `stream` take every field of a `GenerationConfig` by name, or as `generation_config=`. What is not set is
taken from the model's own `generation_config`, as in `model.generate`; what is set nowhere is off. Numbers and arrays
may be NumPy's or torch's, and `watermarking_config` and `compile_config` dictionaries of their arguments. A name that
is neither a field nor listed here is refused, among them the other arguments of `model.generate` (`assistant_model`,
`inputs_embeds`, `position_ids`, `past_key_values`, `negative_prompt_ids`, `synced_gpus`, ...). Beside the fields:

| argument | |
|---|---|
| `logits_processor` | a list of any `LogitsProcessor`; called for a row at a time, [1, T], with the row's true text |
| `stopping_criteria` | a list of any `StoppingCriteria`; called for a row after each token, with scores as asked |
| `prefix_allowed_tokens_fn` | as in `model.generate`; called with the number of the row and its text |
| `presence_penalty`, `frequency_penalty` | OpenAI's, of the tokens written |
| `tokenizer` | for `stop_strings`, and for text in the events |
| `streamer` | for `generate`: one of transformers'; its `end()` is called after an error too |
| `seed` | one for each row, or one from which row 0, 1, … get their own |
| `batch_size` | rows decoded together at most; where one ends, the next one enters its slot |
| `beam_width`, `beam_length` | the shape of a draft; `beam_length=0` decodes without drafting |
| `fast` | `False`: no CUDA graph, no merged or packed products ([speed.md](speed.md)); the text is the same |
| `compile` | `True`: the target's layers through torch.compile, where kernels for trees run ([speed.md](speed.md)) |
| `node_budget` | of all that the beam search weighs, draft the so many most probable nodes, the root counted |

Sampling and the repetition penalty run over all nodes of a draft at once. Any other processor makes the walk lazy: it
is called node by node along the path that is taken, once for each position, with the text that stands there. So
processors that keep a state of their own work as long as they are not shared by rows.

## Padding

A tensor or NumPy array of prompts may be padded at both ends of its rows. Without `attention_mask` the padding is found
as in `model.generate`: every `pad_token_id`, unless that is an end token too; a row that holds it between other tokens,
or nothing else, is refused. A list of rows holds no padding; one that looks padded is refused.

## Behind `model.generate`

`custom_generate=redrafter.custom_generate` and `custom_generate=FOLDER` take the same arguments, `tokenizer` for stop
strings and `streamer` included. What `model.generate` itself takes and decoding cannot heed is refused by name:
`assistant_model`, `synced_gpus`, `negative_prompt_ids`, a `past_key_values` of the caller's, `inputs_embeds`, unusual
`position_ids`, PEFT's `adapter_names`. `cache_implementation="paged"` makes transformers pass over any callable.
After a row has ended its places hold padding; transformers writes on there where a model has no end token.

## On the command line

`--set NAME=VALUE` takes every field below that has no option of its own, the value as JSON. A command writes one text
for each prompt, whatever `num_return_sequences` the model's own config names. Stop strings of that config end texts;
`--set stop_strings=[]` turns them off.
"""
