"""Responses of both endpoints, streamed or not."""

from __future__ import annotations

import pytest

from serving import events


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
    return "".join(one["delta"].get("content", "") if "delta" in one else one["text"] for one in choices)


def test_chat(make_server):
    server = make_server("Hello")
    response = server.chat(model="tiny")
    assert response.status_code == 200
    body = response.json()
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = server.engine.submissions[0].prompt
    assert server.engine.tokenizer.decode(prompt) == "<s>u:Hi</s><s>a:"
    assert body["usage"] == {  # five letters and the end token, in three steps of one accepted token each
        "prompt_tokens": len(prompt),
        "completion_tokens": 6,
        "total_tokens": len(prompt) + 6,
        "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 6},
    }


def test_completion(make_server):
    body = make_server("Hello").complete(max_tokens=3).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("usage", [False, True])
def test_streamed_chat(make_server, usage):
    response = make_server("Hello").chat(stream=True, stream_options={"include_usage": usage})
    chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hello"
    reasons = [one["finish_reason"] for chunk in chunks for one in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 6
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_streamed_completion(make_server):
    chunks = events(make_server("Hello").complete(stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == "Hello"
    assert chunks[-1]["usage"]["total_tokens"] == 2 + 6
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_several_answers_and_prompts(make_server):
    server = make_server(lambda prompt: "x" * len(prompt))
    body = server.complete(prompt=["a", "bcd"], n=2).json()
    assert [one["text"] for one in body["choices"]] == ["x", "x", "xxx", "xxx"]
    assert [one["index"] for one in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 4  # each prompt counts once
    chunks = events(server.complete(prompt=["a", "bcd"], n=2, stream=True))
    assert [text_of(chunks, index) for index in range(4)] == ["x", "x", "xxx", "xxx"]


def test_seeds_of_several_answers_differ(make_server):
    server = make_server()
    server.chat(n=3, seed=7)
    assert [one.settings["seed"] for one in server.engine.submissions] == [7, 8, 9]


@pytest.mark.parametrize("prompt", [[70, 71], [[70, 71]], [[70], [71]]])
def test_token_ids_are_used_as_they_are(make_server, prompt):
    server = make_server()
    assert server.complete(prompt=prompt).status_code == 200
    expected = [prompt] if isinstance(prompt[0], int) else prompt
    assert [one.prompt for one in server.engine.submissions] == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("lo", "Hel"), (["x", "l"], "He"), ("world", "Hello you"), ([], "Hello you")]
)
def test_text_is_cut_before_stop_strings(make_server, stream, stop, text):
    response = make_server("Hello you").chat(stop=stop, stream=stream)
    if stream:
        chunks = events(response)
        assert text_of(chunks) == text
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == text
        reason = choice["finish_reason"]
    assert reason == "stop"


def test_a_stop_string_that_the_engine_misses_ends_the_answer(make_server, monkeypatch):
    server = make_server("Hello you")
    submit = server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda prompt, stop_strings, **rest: submit(prompt, **rest))
    assert server.chat(stop="lo").json()["choices"][0]["message"]["content"] == "Hel"
    assert server.engine.submissions[0].cancelled


def test_streams_never_split_characters(make_server):
    text = "naïve 漢字 🙂"
    chunks = events(make_server(text).chat(stream=True))
    assert text_of(chunks) == text
    assert not any("\ufffd" in text_of([chunk]) for chunk in chunks)


def test_chat_logprobs(make_server):
    choice = make_server("He").chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert [one["token"] for one in tokens] == ["H", "e", "</s>"]
    assert [one["bytes"] for one in tokens[:2]] == [[72], [101]]
    assert tokens[0]["logprob"] == -0.5
    assert [one["logprob"] for one in tokens[0]["top_logprobs"]] == [-0.25, -9999.0]
    assert make_server("He").chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_streamed_chat_logprobs(make_server):
    chunks = events(make_server("Hé").chat(logprobs=True, stream=True))
    listed = [one["logprobs"] for chunk in chunks for one in chunk["choices"]]
    tokens = [token for one in listed if one for token in one["content"]]
    assert len(tokens) == 4
    assert tokens[1]["bytes"] is None  # a part of a character


def test_completion_logprobs(make_server):
    logprobs = make_server("Hello").complete(logprobs=1, max_tokens=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0]["H"] == -0.5
    assert len(logprobs["top_logprobs"][0]) == 2
    chunks = events(make_server("Hello").complete(logprobs=0, stream=True))
    assert [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4, 5]


def test_models(make_server):
    server = make_server()
    listed = server.get("/v1/models").json()
    assert [(one["id"], one["max_model_len"]) for one in listed["data"]] == [("tiny", 128)]
    assert server.get("/v1/models/tiny").json() == listed["data"][0]


def test_health(make_server):
    server = make_server()
    assert server.get("/health").json() == {"status": "ok"}
    server.engine.alive = False
    assert server.get("/health").status_code == 503
