"""Servers: over the fake engine in this process, or over any engine on a free port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fake_engine import FakeEngine

from redrafter.server.app import make_app
from redrafter.server.lifecycle import DrainingServer, bind, url_of
from redrafter.server.service import ServerSettings, Service


@dataclass
class Local:
    """A server without a socket."""

    engine: FakeEngine
    app: Any

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def chat(self, **body: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}]} | body
        return self.request("POST", "/v1/chat/completions", json=body)

    def complete(self, **body: Any) -> httpx.Response:
        return self.request("POST", "/v1/completions", json={"prompt": "Hi"} | body)

    def settings(self) -> dict[str, Any]:
        """The settings of the last submission."""
        return self.engine.submissions[-1].settings


def make_local(tokenizer: Any, answer: Any = "Hello", **options: Any) -> Local:
    """A server; `answer` as for FakeEngine, other options as of ServerSettings."""
    engine = FakeEngine(tokenizer, answer)
    return Local(engine, make_app(Service(engine, tokenizer, ServerSettings("tiny", **options))))


@contextmanager
def listening(engine: Any, tokenizer: Any = None) -> Iterator[tuple[DrainingServer, str]]:
    """A server on a free port, in a thread."""
    server = DrainingServer(Service(engine, tokenizer or engine.tokenizer, ServerSettings("tiny")))
    with bind("127.0.0.1", 0) as bound:
        url = url_of(bound)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        eventually(lambda: server.started)
        try:
            yield server, url
        finally:
            if isinstance(engine, FakeEngine):
                engine.going.set()
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until the condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, without the mark at its end."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, whose form is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith(".")
    assert "\n" not in message
    return body["error"]
