"""From a request to the token ids of its prompts and to the settings of `Engine.submit`.

Raises RedrafterError or ApiError for what the model cannot do.  Does not know HTTP.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from redrafter.data.prompts import check_ids, encode, prompt_ids, render
from redrafter.data.rows import Chat, read_template_kwargs
from redrafter.engine.engine import Engine
from redrafter.server.errors import ApiError
from redrafter.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

_SAMPLING = ("top_p", "min_p", "seed")
"""Fields that only matter for sampling; `temperature` and `top_k` do too, and are converted."""

_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def check_supported(body: GenerationRequest) -> None:
    """Raises ApiError for features that the server does not have."""
    if body.response_format is not None and body.response_format.type != "text":
        raise _unsupported(f"response_format {body.response_format.type}", "response_format")
    for name in ("guided_regex", "structured_outputs", "tools"):
        if getattr(body, name, None):
            raise _unsupported(name, name)
    if isinstance(body, ChatRequest) and body.tool_choice not in (None, "none", "auto"):
        raise _unsupported("tool_choice", "tool_choice")


def _unsupported(what: str, param: str) -> ApiError:
    return ApiError(400, f"{what} is not supported: leave it out.", param=param)


def prompts_of(body: GenerationRequest, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[list[int]]:
    """The token ids of each prompt of a request."""
    if isinstance(body, ChatRequest):
        return [_chat_ids(body, tokenizer, vocab_size)]
    assert isinstance(body, CompletionRequest)
    prompts: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        return [prompts]
    return [
        prompt_ids({"prompt": one}, tokenizer, f"prompt {number}", vocab_size=vocab_size)
        if isinstance(one, str)
        else one
        for number, one in enumerate(prompts, start=1)
    ]


def _chat_ids(body: ChatRequest, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    template = tokenizer.chat_template
    if not template:
        raise ApiError(400, "The model has no chat template: use /v1/completions.", param="messages")
    messages = [message.for_template() for message in body.messages]
    if "developer" not in str(template):  # OpenAI's new name for the system's role
        messages = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
    kwargs = read_template_kwargs(body.chat_template_kwargs or {}, "chat_template_kwargs")
    ids = encode(render(Chat(messages, template_kwargs=kwargs), tokenizer, "messages"), tokenizer)
    check_ids(ids, vocab_size, "messages")
    return ids


def settings_of(body: GenerationRequest, prompt: list[int], engine: Engine) -> dict[str, Any]:
    """The arguments of `Engine.submit` for a prompt.

    What the request leaves open comes from the model's own generation config, except the temperature, which is 1.
    """
    settings = {name: value for name in _PENALTIES if (value := getattr(body, name)) is not None}
    if body.greedy:
        settings["do_sample"] = False
    else:
        settings |= {"do_sample": True, "temperature": 1.0 if body.temperature is None else body.temperature}
        settings |= {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        if body.top_k is not None:
            settings["top_k"] = max(0, body.top_k)  # vLLM turns it off by -1
    if body.logit_bias:
        settings["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if body.stops:
        settings["stop_strings"] = body.stops
    settings["max_new_tokens"] = _new_tokens(body, prompt, engine.max_length)
    settings["logprobs"] = body.requested_logprobs
    settings["drafter"] = body.drafter is not False
    return settings


def _new_tokens(body: GenerationRequest, prompt: list[int], max_length: int) -> int:
    """The maximum number of new tokens.  Raises ApiError if prompt and new tokens exceed the engine's length."""
    room = max_length - len(prompt)
    wanted = body.new_tokens(room) if room > 0 else 1
    if wanted > room:
        raise ApiError(
            400,
            f"The prompt has {len(prompt)} tokens and {wanted} new ones are requested, and the server handles at most "
            f"{max_length} tokens per request, prompt included: shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
        )
    return wanted
