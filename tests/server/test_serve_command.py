"""`redrafter serve` as a process, and its options."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from conftest import refusal
from redrafter.cli import main
from redrafter.cli.serve import ServeOptions
from redrafter.server.lifecycle import DrainingServer
from serving import eventually

KEY = "secret"


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen, httpx.Client, str]]:
    """The command with the bundled pair: its process, a client, and what it printed."""
    log = folder / f"log-{port}"
    options = ["--demo", "--slots", "2", "--max-length", "512", "--port", str(port)]
    environment = os.environ | {"COLUMNS": "200", "REDRAFTER_API_KEY": KEY}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "redrafter", "serve", *options], stderr=stderr, env=environment
        )
    try:
        eventually(lambda: "curl" in log.read_text() or process.poll() is not None, seconds=120)
        printed = log.read_text()
        url = re.search(r"curl (http://127.0.0.1:\d+)", printed)[1]
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
            yield process, client, printed
    finally:
        process.kill()
        process.wait()


def stream(client: httpx.Client):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "ignore_eos": True}
    return client.stream("POST", "/v1/chat/completions", json=body | {"stream": True})


def test_a_killed_server_restarts_at_once_and_drains_on_sigterm(tmp_path):
    with served(tmp_path) as (process, client, printed):
        assert "Bearer $REDRAFTER_API_KEY" in printed
        assert KEY not in printed
        with stream(client) as response:
            lines = response.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        port = client.base_url.port
    with served(tmp_path, port) as (process, client, _):
        assert client.get("/v1/models").json()["data"][0]["id"] == "redrafter-demo-12m"
        with stream(client) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: client.get("/health").status_code == 503)
            assert client.post("/v1/completions", json={"prompt": "Hello"}).status_code == 503
            text = "".join(lines)
        assert text.count('"finish_reason":"length"') == 1
        assert text.endswith("[DONE]")
        assert process.wait(20) == 0


def test_garbage_collections_skip_what_was_loaded(monkeypatch):
    """They would stop all requests for a quarter of a second."""
    frozen: list[int] = []
    monkeypatch.setattr(DrainingServer, "serve_on", lambda self, bound: frozen.append(gc.get_freeze_count()))
    with pytest.raises(SystemExit, match=r"^(0|None)?$"):
        main(["serve", "--demo", "--slots", "1", "--max-length", "64", "--port", "0"])
    gc.unfreeze()
    assert frozen[0] > len(gc.get_objects()) // 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--demo"),
        (["--demo", "--model", "x"], "--demo"),
        (["--demo", "--drafter", "x"], "--drafter"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--demo", "--no-drafter", "--beam-width", 2], "--beam-width"),
        (["--demo", "--host", "nowhere.invalid"], "nowhere.invalid"),
    ],
)
def test_options_that_do_not_go_together(say, words, sentence):
    assert sentence in refusal(say("serve", *words))


def test_the_drafter_is_chosen_unless_one_is_named(model_folder, drafter_folder):
    def paths(**told):
        return ServeOptions(model=str(model_folder), **told).paths()[1]

    assert paths() == paths(drafter="auto") == paths(beam_length=3) == "auto"
    assert paths(drafter=str(drafter_folder)) == str(drafter_folder)
    assert paths(no_drafter=True) is None


def test_missing_packages_are_named(say, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "redrafter[server]" in refusal(say("serve", "--demo"))
