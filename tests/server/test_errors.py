"""Every error has OpenAI's form and names the field; nothing is submitted for a bad request."""

from __future__ import annotations

import json
import logging

import pytest

from serving import error_of, events

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{**USER, "audio": {"id": "x"}}]}, "audio"),
        ({"messages": [{**USER, "colour": "red"}]}, "colour"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 100}, "limit"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": 128}, "128"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "128"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"usage": True}}, "usage"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": []}, "functions"),
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, "no"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "(a"}, "unclosed"),
        ({"guided_regex": "a+", "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a+", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"redrafter": {"detail": True}}, "detail"),
        ({"user": "\ud800"}, "surrogate"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chat_requests(make_server, body, word, stream):
    server = make_server(max_answers=50)
    body = {"messages": [USER], "stream": stream} | body
    content = json.dumps(body).encode()
    response = server.request(
        "POST", "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.engine.submissions == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [259]}, "vocabulary"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": "x" * 128}, "128"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_bad_completion_requests(make_server, body, word):
    server = make_server()
    assert word in error_of(server.complete(**body), 400)["message"]
    assert server.engine.submissions == []


def test_one_bad_prompt_cancels_the_others(make_server):
    server = make_server()
    error_of(server.complete(prompt=[[70], [259]]), 400)
    assert [one.cancelled for one in server.engine.submissions] == [True]


def test_a_field_that_is_missing(make_server):
    error = error_of(make_server().request("POST", "/v1/completions", json={"model": "tiny"}), 400)
    assert (error["param"], "prompt" in error["message"]) == ("prompt", True)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"3", "application/json"),
        (b"", "application/json"),
        (b'{"prompt": "Hi"}', "text/plain"),
        (b"\xff", "application/json"),
        (b'{"prompt": "Hi", "temperature": NaN}', "application/json"),
        (b'{"prompt": ' + b"[" * 100_000, "application/json"),
    ],
)
def test_bodies_that_are_not_json_objects(make_server, content, kind):
    error_of(make_server().request("POST", "/v1/completions", content=content, headers={"Content-Type": kind}), 400)


def test_too_long_prompts_have_openais_code(make_server):
    assert error_of(make_server().complete(prompt="x" * 200), 400)["code"] == "context_length_exceeded"


def test_unknown_models_and_paths(make_server):
    server = make_server()
    error = error_of(server.chat(model="other"), 404)
    assert (error["code"], "other" in error["message"]) == ("model_not_found", True)
    error_of(server.get("/v1/models/other"), 404)
    error_of(server.get("/v1/embeddings"), 404)
    error_of(server.get("/v1/completions"), 405)


def test_a_full_engine(make_server):
    server = make_server()
    server.engine.slots = server.engine.max_waiting = 0
    response = server.chat()
    error_of(response, 429)
    assert int(response.headers["Retry-After"]) > 0
    server.engine.max_waiting = 2
    error_of(server.chat(n=3), 429)
    assert all(one.cancelled for one in server.engine.submissions)


def test_a_closed_engine(make_server):
    server = make_server()
    server.engine.closed = True
    error_of(server.chat(), 503)


def test_a_failure_in_the_engine(make_server, caplog):
    server = make_server("Hello")
    server.engine.failure = "The model wrote NaN."
    assert error_of(server.chat(), 500)["message"] == "The model wrote NaN."
    chunks = events(server.chat(stream=True))
    assert chunks[-1]["error"]["message"] == "The model wrote NaN."
    assert chunks[0]["choices"]
    assert error_of(server.chat(n=2), 500)
    assert caplog.records
    server.engine.failure = ""
    assert server.chat().status_code == 200


def test_an_unexpected_error_tells_no_details(make_server, monkeypatch, caplog):
    server = make_server()
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(server.engine, "submit", lambda *_, **__: 1 / 0)
    assert "zero" not in error_of(server.chat(), 500)["message"]


def test_a_request_that_the_engine_cancels(make_server):
    server = make_server("Hello")
    submit = server.engine.submit

    def cancelled(*args, **settings):
        submission = submit(*args, **settings)
        submission.cancelled = True
        return submission

    server.engine.submit = cancelled
    error_of(server.chat(), 503)
    assert events(server.chat(stream=True))[-1]["error"]["type"] == "service_unavailable_error"


def test_api_keys(make_server):
    server = make_server(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer é"}):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        assert error_of(server.get("/v1/models", headers=raw), 401)["code"] == "invalid_api_key"
    assert server.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert server.get("/health").status_code == 200
    error_of(server.request("POST", "/v1/completions", content=b"{"), 401)


def test_large_bodies(make_server):
    server = make_server(max_body_bytes=100)
    assert server.complete().status_code == 200
    error_of(server.complete(prompt="x" * 200), 413)

    async def pieces():
        for _ in range(20):
            yield b"x" * 10

    error_of(
        server.request("POST", "/v1/completions", content=pieces(), headers={"Content-Type": "application/json"}), 413
    )
    assert len(server.engine.submissions) == 1


@pytest.mark.parametrize(("allowed", "expected"), [((), None), (("http://page",), "http://page")])
def test_other_origins_are_only_allowed_if_configured(make_server, allowed, expected):
    server = make_server(allowed_origins=allowed)
    response = server.get("/v1/models", headers={"Origin": "http://page"})
    assert response.headers.get("access-control-allow-origin") == expected
