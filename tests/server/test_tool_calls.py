"""Tools in requests: rendered, read from the answer, streamed as OpenAI does, and refused by name."""

from __future__ import annotations

import json
import re

import pytest

from serving import error_of, events

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call> with name and arguments {% endif %}"
    "{% for m in messages %}{{ m.role[0] + ':' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{% endfor %}a:"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
NAMED = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LONG = {"max_tokens": 900}


@pytest.fixture
def make_tool_server(make_server, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", TEMPLATE)

    def make(answer: str):
        server = make_server(answer)
        server.engine.max_length = 4096
        return server

    return make


def prompt_of(server) -> str:
    return server.engine.tokenizer.decode(server.engine.submissions[-1].prompt)


def test_a_call_is_read_and_can_be_answered(make_tool_server):
    server = make_tool_server("Let me see.\n" + CALL)
    answer = server.chat(tools=TOOLS, **LONG).json()["choices"][0]
    message = answer["message"]
    assert answer["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert re.fullmatch("[A-Za-z0-9]{9}", call["id"])
    assert '"name": "add"' in prompt_of(server)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "1"}
    history = [{"role": "user", "content": "Hi"}, message, result]
    assert server.chat(messages=history, tools=TOOLS, **LONG).status_code == 200
    assert prompt_of(server).endswith(
        'u:Hia:Let me see.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>t:1a:'
    )


@pytest.mark.parametrize("content", ["", "Let me see < 3.\n"])
def test_streams_hold_calls_back(make_tool_server, content):
    server = make_tool_server(content + 2 * CALL)
    chunks = [chunk["choices"][0] for chunk in events(server.chat(tools=TOOLS, stream=True, **LONG))]
    texts = [chunk["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == content
    assert len([text for text in texts if text]) >= len(content) / 4
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1}] * 2
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["tool_calls"]


@pytest.mark.parametrize("answer", ["a < b, <tool", "<tool_call>add(1)</tool_call>", CALL[:-30]])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_content(make_tool_server, answer, stream):
    response = make_tool_server(answer).chat(tools=TOOLS, stream=stream, **LONG)
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == answer
        assert chunks[-1]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (answer, "stop")
        assert "tool_calls" not in choice["message"]


def test_parallel_calls_can_be_switched_off(make_tool_server):
    server = make_tool_server(2 * CALL)
    answer = server.chat(tools=TOOLS, n=2, parallel_tool_calls=False, **LONG).json()
    assert [len(one["message"]["tool_calls"]) for one in answer["choices"]] == [1, 1]


@pytest.mark.parametrize(("choice", "grammar"), [("auto", False), ("required", True), (NAMED, True)])
def test_choices_that_force_a_call_restrict_the_answer(make_tool_server, choice, grammar):
    server = make_tool_server(CALL)
    assert server.chat(tools=TOOLS, tool_choice=choice, **LONG).status_code == 200
    assert ("logits_processor" in server.settings()) == grammar


def test_no_tools_are_offered_if_the_choice_is_none(make_tool_server):
    server = make_tool_server(CALL)
    answer = server.chat(tools=TOOLS, tool_choice="none", **LONG).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (CALL, "stop")
    assert "add" not in prompt_of(server)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "sub"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_bad_requests(make_tool_server, body, word):
    server = make_tool_server(CALL)
    assert word in error_of(server.chat(**{"tools": TOOLS} | LONG | body), 400)["message"]
    assert not server.engine.submissions


def test_a_template_without_tools_is_refused(make_server):
    assert "does not support tools" in error_of(make_server().chat(tools=TOOLS), 400)["message"]
