"""What a request's fields mean to the engine and to the chat template."""

from __future__ import annotations

import pytest

from serving import error_of, events

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 1.0}),
        ({"temperature": None}, {"temperature": 1.0}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1}, {"temperature": 0.5, "top_p": 0.9, "top_k": 7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": 3}, {"seed": 3}),
        ({"presence_penalty": 1, "frequency_penalty": -0.5}, {"presence_penalty": 1.0, "frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"logit_bias": {"40": -100, "41": 2.5}}, {"logit_bias": {40: -100.0, 41: 2.5}}),
        ({"stop": "a"}, {"stop_strings": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop_strings": ["a", "b"]}),
        ({"drafter": False}, {"drafter": False}),
        ({"drafter": True}, {"drafter": True}),
        ({}, {"drafter": True, "logprobs": None}),
        ({"max_tokens": 9}, {"max_new_tokens": 9}),
        ({"max_completion_tokens": 9}, {"max_new_tokens": 9}),
    ],
)
def test_settings(make_server, body, expected):
    server = make_server()
    assert server.chat(**body).status_code == 200
    assert server.settings().items() >= expected.items()


def test_greedy_requests_have_no_sampling_settings(make_server):
    server = make_server()
    server.chat(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=1, presence_penalty=0.5)
    settings = server.settings()
    assert (settings["do_sample"], settings["presence_penalty"]) == (False, 0.5)
    assert not settings.keys() & {"temperature", "top_p", "top_k", "min_p", "seed"}


def test_unset_fields_are_left_to_the_models_own_config(make_server):
    server = make_server()
    server.chat()
    assert not server.settings().keys() & {"top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop_strings"}


def test_default_lengths(make_server):
    server = make_server()
    server.chat()
    assert server.settings()["max_new_tokens"] + len(server.engine.submissions[-1].prompt) == server.engine.max_length
    server.complete()
    assert server.settings()["max_new_tokens"] == 16
    server.complete(prompt="x" * 120)
    assert server.settings()["max_new_tokens"] == 8


def test_log_probabilities_are_requested(make_server):
    server = make_server()
    for body, count in [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
        ({"logprobs": False}, None),
    ]:
        server.chat(**body)
        assert server.settings()["logprobs"] == count
    server.complete(logprobs=3)
    assert server.settings()["logprobs"] == 3


@pytest.mark.parametrize(
    "field", ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"]
)
def test_harmless_fields_are_ignored(make_server, field):
    values = {"metadata": {"a": "b"}, "store": True, "stream_options": {"include_usage": True}}
    assert make_server().chat(**{field: values.get(field, "auto")}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "<s>u:Hi</s><s>a:"),
        ([{"role": "system", "content": "Be"}, USER], "<s>s:Be</s><s>u:Hi</s><s>a:"),
        ([{"role": "developer", "content": "Be"}, USER], "<s>s:Be</s><s>u:Hi</s><s>a:"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "<s>u:Hi</s><s>a:"),
        ([{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}], "<s>u:a\nb</s><s>a:"),
        ([USER, {"role": "assistant", "content": "Yo", "refusal": None, "tool_calls": None}, USER],
         "<s>u:Hi</s><s>a:Yo</s><s>u:Hi</s><s>a:"),
        ([USER, {"role": "tool", "content": "4", "tool_call_id": "x"}], "<s>u:Hi</s><s>t:4</s><s>a:"),
    ],
)  # fmt: skip
def test_messages_are_rendered_by_the_chat_template(make_server, messages, text):
    server = make_server()
    assert server.chat(messages=messages).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.submissions[-1].prompt) == text


@pytest.fixture
def template(byte_tokenizer, monkeypatch):
    """Replaces the chat template."""
    return lambda text: monkeypatch.setattr(byte_tokenizer, "chat_template", text)


def test_calls_in_earlier_answers_reach_the_template_as_objects(make_server, template):
    template(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}."
    )
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}]
    server = make_server()
    assert server.chat(messages=[USER, {"role": "assistant", "tool_calls": calls}]).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.submissions[-1].prompt) == "5."


def test_template_kwargs(make_server, template):
    template("{{ 'deep' if thinking else 'flat' }}")
    server = make_server()
    server.chat(chat_template_kwargs={"thinking": True})
    assert server.engine.tokenizer.decode(server.engine.submissions[-1].prompt) == "deep"
    assert "tokenize" in error_of(server.chat(chat_template_kwargs={"tokenize": False}), 400)["message"]


def test_a_model_without_a_template_refuses_chats(make_server, template):
    template(None)
    server = make_server()
    assert "/v1/completions" in error_of(server.chat(), 400)["message"]
    assert server.complete().status_code == 200


def test_a_template_that_rejects_the_messages(make_server, template):
    template("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in error_of(make_server().chat(), 400)["message"]


def test_lengths_of_vllm(make_server):
    server = make_server()
    server.chat(min_tokens=5, ignore_eos=True, max_tokens=9)
    assert server.settings().items() >= {"min_new_tokens": 5, "eos_token_id": (), "max_new_tokens": 9}.items()
    server.chat(min_tokens=0, ignore_eos=False)
    assert not server.settings().keys() & {"min_new_tokens", "eos_token_id"}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
        {"guided_regex": "a+"},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"json": {"type": "object"}}},
    ],
)
def test_each_answer_of_a_form_has_its_own_processor(make_server, form):
    server = make_server()
    assert server.complete(n=2, **form).status_code == 200
    processors = [one.settings["logits_processor"] for one in server.engine.submissions]
    assert len({id(one) for (one,) in processors}) == 2
    assert server.chat(response_format={"type": "text"}).status_code == 200
    assert "logits_processor" not in server.settings()


def test_steps_are_described_if_requested(make_server):
    server = make_server("Hellö")
    path = {"stream": True, "redrafter": {"details": True}}
    for response in (server.chat(**path), server.complete(**path)):
        steps = [chunk["redrafter"] for chunk in events(response) if "redrafter" in chunk]
        assert [step["tokens"] for step in steps] == [2, 2, 2, 1]
        assert [step["accepted"] for step in steps] == [1, 1, 1, 0]
        assert steps[0] == {"tokens": 2, "accepted": 1, "drafted": 3, "pieces": ["H", "e"]}
        assert "".join(piece for step in steps for piece in step["pieces"]) == "Hellö"
    for body in ({}, {"redrafter": {}}, {"redrafter": {"details": False}}):
        assert not any("redrafter" in chunk for chunk in events(server.chat(stream=True, **body)))
    assert "redrafter" not in server.chat(redrafter={"details": True}).json()


def test_the_page_is_served(make_server):
    response = make_server(api_key="secret").get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "<!doctype html>" in response.text
