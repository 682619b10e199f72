"""The bundled pair behind HTTP: every text is that of `generate` alone, and requests do not disturb each other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import redrafter
from redrafter import RecurrentDrafter, generate
from redrafter.engine.engine import Engine
from redrafter.server import service
from serving import eventually, listening

DEMO = Path(redrafter.__file__).parent / "assets" / "demo"
CHAT = [{"role": "user", "content": "Please find me a hotel in New York with a good rating."}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["New York", "Boston"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["city", "stars"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "redrafter-demo-12m")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "redrafter-demo-12m")


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    drafter = RecurrentDrafter.from_pretrained(DEMO / "drafter", target=model)
    with Engine(model, drafter, tokenizer=tokenizer, slots=6, max_length=256) as engine:
        yield engine
        assert engine.statistics().running == engine.statistics().waiting == 0


@pytest.fixture(scope="module")
def url(engine, tokenizer):
    with listening(engine, tokenizer) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone(model, tokenizer):
    """The text that `generate` writes without a drafter, for OpenAI's settings."""

    def text(max_tokens: int = 16, *, stop=None, temperature=1.0, drafter=True, **settings) -> str:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        stops = {"stop_strings": stop} if stop else {}
        prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True).input_ids
        written = generate(
            model, None, [prompt], tokenizer=tokenizer, max_new_tokens=max_tokens, **sampling, **stops, **settings
        ).texts[0]
        return written.partition(stop)[0] if stop else written

    return text


def streamed(client, **body) -> list[str]:
    """The text of each answer."""
    texts = [""] * body.get("n", 1)
    for chunk in client.chat.completions.create(model="tiny", messages=CHAT, stream=True, **body):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0},
        SAMPLED,
        {**SAMPLED, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0, "stop": "e"},
        {**SAMPLED, "stop": " a"},
        {"temperature": 0, "extra_body": {"drafter": False}},
        {**SAMPLED, "extra_body": {"top_k": 20, "repetition_penalty": 1.1}},
    ],
)
def test_texts_are_those_of_generate_alone(client, alone, body):
    expected = alone(
        **{name: value for name, value in body.items() if name != "extra_body"}, **body.get("extra_body", {})
    )
    body = {"max_tokens": 16} | body
    assert streamed(client, **body) == [expected]
    answer = client.chat.completions.create(model="tiny", messages=CHAT, **body)
    assert answer.choices[0].message.content == expected
    details = answer.usage.completion_tokens_details
    drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert (drafted > 0) == body.get("extra_body", {}).get("drafter", True)


def test_a_bias_and_several_answers(client, alone, tokenizer):
    banned = tokenizer.encode(alone(temperature=0))[0]
    body = SAMPLED | {"n": 3, "max_tokens": 12, "logit_bias": {str(banned): -100}}
    expected = [alone(12, **SAMPLED | {"seed": 7 + i}, logit_bias={banned: -100.0}) for i in range(3)]
    answer = client.chat.completions.create(model="tiny", messages=CHAT, **body)
    assert [one.message.content for one in answer.choices] == expected
    assert streamed(client, **body) == expected


def test_concurrent_requests_do_not_change_each_other(url, alone):
    bodies = [{"temperature": 0}, *[SAMPLED | {"seed": seed} for seed in range(5)], {"temperature": 0, "stop": "e"}]

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:

            async def one(body: dict) -> str:
                answer = await client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=16, **body)
                return answer.choices[0].message.content

            return await asyncio.gather(*map(one, 2 * bodies))  # more than there are slots

    assert asyncio.run(run()) == 2 * [alone(**body) for body in bodies]


def test_log_probabilities_are_the_models(client, model, tokenizer):
    answer = client.completions.create(model="tiny", prompt="The city of", max_tokens=6, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    prompt = tokenizer("The city of").input_ids
    out = generate(model, None, [prompt], max_new_tokens=6, output_logits=True)
    expected = torch.log_softmax(out.logits[0].double(), -1)
    chosen = expected.gather(1, torch.tensor(out.new_tokens[0])[:, None])[:, 0]
    assert logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-3)
    assert "".join(logprobs.tokens) == answer.choices[0].text
    for place, top in enumerate(logprobs.top_logprobs):
        assert sorted(top.values()) == pytest.approx(sorted(expected[place].topk(3).values.tolist()), abs=1e-3)


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED])
def test_a_schema_is_followed_with_and_without_drafts(client, settings):
    schema = {"type": "json_schema", "json_schema": {"name": "hotel", "schema": SCHEMA, "strict": True}}
    body = settings | {"max_tokens": 60, "response_format": schema}
    (drafted,), (undrafted,) = streamed(client, **body), streamed(client, **body, extra_body={"drafter": False})
    assert drafted == undrafted
    assert json.loads(drafted).keys() == {"city", "stars"}


def test_a_required_tool_is_called(client, tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% if tools %}{{ tools | tojson }}<tool_call>arguments{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}<|assistant|>",
    )
    function = {"name": "find_hotel", "parameters": SCHEMA}
    answer = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "find_hotel"}},
        max_tokens=100,
        temperature=0,
    ).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    assert call.function.name == "find_hotel"
    assert json.loads(call.function.arguments).keys() == {"city", "stars"}


def test_lengths(client):
    long = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=200, extra_body={"ignore_eos": True}
    )
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (200, "length")
    usual = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=200).usage
    more = usual.completion_tokens + 5
    longer = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=200, extra_body={"min_tokens": more}
    )
    assert longer.usage.completion_tokens >= more


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slots(url, engine, stream):
    before = engine.statistics().requests.get("cancelled", 0)
    body = {"prompt": ["a", "b"], "stream": stream, "max_tokens": 240, "ignore_eos": True}
    with httpx.Client(timeout=httpx.Timeout(5.0, read=0.3)) as client:
        if stream:
            with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/completions", json=body)
    eventually(lambda: engine.statistics().requests.get("cancelled", 0) == before + 2)
    assert engine.statistics().running == 0


def test_a_request_that_fails_ends_alone(url, alone, monkeypatch):
    class Faulty(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 20:
                raise ArithmeticError("This processor broke.")
            return scores

    monkeypatch.setattr(service, "make_processor", lambda *_, **__: Faulty())
    common = {"messages": CHAT, "temperature": 0, "max_tokens": 24}

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [common, common | {"guided_regex": "a*"}, common]
            return await asyncio.gather(*[client.post(f"{url}/v1/chat/completions", json=body) for body in bodies])

    good, bad, other = asyncio.run(run())
    assert bad.status_code == 500
    assert "This processor broke" in bad.json()["error"]["message"]
    expected = alone(24, temperature=0)
    assert [one.json()["choices"][0]["message"]["content"] for one in (good, other)] == [expected] * 2
