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
from redrafter.server.tools import ToolParser, tool_parser

_SAMPLING = ("top_p", "min_p", "seed")
"""Fields that only matter for sampling; `temperature` and `top_k` do too, and are converted."""

_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def parser_of(body: GenerationRequest, tokenizer: PreTrainedTokenizerBase) -> ToolParser | None:
    """The parser of the answers' tool calls; None if no tools are offered."""
    return tool_parser(tokenizer) if isinstance(body, ChatRequest) and body.offered_tools else None


def constraint_of(body: GenerationRequest, parser: ToolParser | None) -> dict[str, Any] | None:
    """What restricts the answers, as an argument of `structured.make_processor`; None for any text."""
    constraint = body.form
    if parser is not None and isinstance(body, ChatRequest):
        grammar = parser.grammar(body.offered_tools, body.tool_choice)
        constraint = None if grammar is None else {"grammar": grammar}
    if constraint is not None and (body.ignore_eos or body.min_tokens):
        raise ApiError(400, "ignore_eos and min_tokens are not possible if the form of the answer decides its end.")
    return constraint


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
    chat = Chat(messages, tools=body.offered_tools or None, template_kwargs=kwargs)
    ids = encode(render(chat, tokenizer, "messages"), tokenizer)
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
    settings["max_new_tokens"] = longest = _new_tokens(body, prompt, engine.max_length)
    if body.min_tokens:
        if body.min_tokens > longest:
            raise ApiError(400, f"min_tokens exceeds the maximum of {longest} new tokens.", param="min_tokens")
        settings["min_new_tokens"] = body.min_tokens
    if body.ignore_eos:
        settings["eos_token_id"] = ()
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
