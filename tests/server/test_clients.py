"""A server on a port: OpenAI's own client, clients that disconnect, and signals."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from redrafter.errors import RedrafterError
from redrafter.server import lifecycle, service
from redrafter.server.service import ServerSettings, Service
from serving import eventually, listening

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine(byte_tokenizer) -> FakeEngine:
    return FakeEngine(byte_tokenizer, "Hello you")


def test_openais_client(engine):
    with listening(engine) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1, stop="you", logprobs=True)
        assert answer.choices[0].message.content == "Hello "
        assert answer.choices[0].logprobs.content[0].token == "H"
        assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0
        again = client.chat.completions.create(  # an answer can be sent back as it is
            model="tiny", messages=[*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
        )
        assert again.choices[0].message.content == "Hello you"
        extra = {"top_k": 5, "min_p": 0.1, "drafter": False}
        completion = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5, extra_body=extra)
        assert [one.text for one in completion.choices] == ["Hello", "Hello"]
        assert [one.id for one in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="top_p"):
            client.chat.completions.create(model="tiny", messages=MESSAGES, top_p=2)
        engine.failure = "It failed."
        with pytest.raises(openai.InternalServerError, match="It failed"):
            client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_openais_streams(engine):
    with listening(engine) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == "Hello you"
        assert chunks[-1].usage.completion_tokens == 10
        text = client.completions.create(model="tiny", prompt="a", stream=True, stop=["o y"])
        assert "".join(one.choices[0].text for one in text) == "Hell"
        engine.failure = "It failed."
        with pytest.raises(openai.APIError, match="It failed"):
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))


def test_openais_asynchronous_client(engine):
    async def run(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def one(stream: bool) -> str:
                answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
                if not stream:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*[one(stream) for stream in (False, True, True, False)])

    with listening(engine) as (_, url):
        assert asyncio.run(run(url)) == ["Hello you"] * 4


def test_a_slow_grammar_delays_no_other_request(engine, monkeypatch):
    compiling, compiled = threading.Event(), threading.Event()

    def slow(*_, **__):
        compiling.set()
        assert compiled.wait(20)

    monkeypatch.setattr(service, "make_processor", slow)
    with listening(engine) as (_, url), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a"}
        first = pool.submit(httpx.post, f"{url}/v1/completions", json=body | {"guided_regex": "a*"}, timeout=30)
        assert compiling.wait(10)
        for chat in (body, body | {"stream": True}):
            assert httpx.post(f"{url}/v1/completions", json=chat).status_code == 200
        assert not first.done()
        compiled.set()
        assert first.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slots(engine, stream):
    engine.going.clear()
    body = {"prompt": ["a", "b"], "stream": stream}

    async def leave(url: str) -> None:
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5.0, read=0.1))

    with listening(engine) as (_, url):
        asyncio.run(leave(url))
        eventually(lambda: engine.reasons == {"cancelled": 2})
        engine.going.set()
        assert httpx.post(f"{url}/v1/completions", json=body | {"stream": False}).status_code == 200


def test_a_client_that_stops_reading_a_stream_frees_its_slot(engine):
    engine.answer, engine.delay = "x" * 100, 0.01
    with listening(engine) as (_, url):
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 99}) as r:
            next(r.iter_lines())
        eventually(lambda: engine.reasons == {"cancelled": 1})
        assert engine.submissions[0].stats.tokens < 99


def test_the_first_signal_drains(engine):
    engine.going.clear()
    with listening(engine) as (server, url), ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "a"})
        eventually(lambda: len(engine.open) == 1)
        server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: engine.closed)
        assert httpx.get(f"{url}/health").json() == {"status": "draining"}
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 503
        engine.going.set()
        assert first.result(10).json()["choices"][0]["text"] == "Hello you"
        eventually(lambda: server.should_exit)
        assert not server.force_exit


@pytest.mark.parametrize("stuck", [False, True])
def test_the_second_signal_ends_the_server(engine, monkeypatch, stuck):
    """Also if the engine does not react."""
    engine.going.clear()
    if stuck:
        monkeypatch.setattr(engine, "close", lambda: None)
    server = lifecycle.DrainingServer(Service(engine, engine.tokenizer, ServerSettings("tiny")))
    with lifecycle.bind("127.0.0.1", 0) as bound, ThreadPoolExecutor(2) as pool:
        url = lifecycle.url_of(bound)
        serving = pool.submit(server.serve_on, bound)
        eventually(lambda: server.started)
        request = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "a"}, timeout=20)
        eventually(lambda: len(engine.open) == 1)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGINT, None)
        with pytest.raises(RedrafterError) as stopped:
            serving.result(10)
        assert stopped.value.status == 130
        assert request.exception(10) or request.result().status_code == (500 if stuck else 503)
        engine.open.clear()  # lets the thread that drains end


def test_an_engine_that_stops_ends_the_server(engine):
    engine.going.clear()
    server = lifecycle.DrainingServer(Service(engine, engine.tokenizer, ServerSettings("tiny")))
    with lifecycle.bind("127.0.0.1", 0) as bound, ThreadPoolExecutor(2) as pool:
        url = lifecycle.url_of(bound)
        serving = pool.submit(server.serve_on, bound)
        eventually(lambda: server.started)
        request = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "a"}, timeout=20)
        eventually(lambda: len(engine.open) == 1)
        engine.close()  # it is no longer alive, and nobody sent a signal
        with pytest.raises(RedrafterError) as stopped:
            serving.result(10)
        assert stopped.value.status == 1
        assert request.result().status_code == 503


def test_a_port_in_use_is_an_error():
    with lifecycle.bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(RedrafterError, match=str(port := bound.getsockname()[1])):
            lifecycle.bind("127.0.0.1", port)
    with pytest.raises(RedrafterError, match="nowhere"):
        lifecycle.bind("nowhere.invalid", 0)
