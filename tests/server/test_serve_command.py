"""`redrafter serve` as a process, and its options."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from conftest import refusal
from serving import eventually

SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from redrafter.engine import engine
from fake_engine import FakeEngine

class Slow(FakeEngine):
    def __init__(self, model, drafter, *, tokenizer, **options):
        assert drafter is not None
        super().__init__(tokenizer, "x" * 40)
        self.delay, self.max_length, self.vocab_size = 0.05, 512, model.config.vocab_size

engine.Engine = Slow
from redrafter.cli import main
main(sys.argv[1:])
"""


def test_the_command_serves_the_demo_and_drains_on_sigterm(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), "serve", "--demo", "--port", "0"]
    environment = os.environ | {"COLUMNS": "200", "REDRAFTER_API_KEY": "secret"}
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment)
    try:
        eventually(lambda: "curl" in log.read_text() or process.poll() is not None, seconds=120)
        printed = log.read_text()
        assert "Bearer $REDRAFTER_API_KEY" in printed
        assert "secret" not in printed
        url = re.search(r"curl (http://127.0.0.1:\d+)", printed)[1]
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=30) as client:
            drains(client, process)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def drains(client: httpx.Client, process: subprocess.Popen) -> None:
    """After SIGTERM, a running stream is completed while new requests are refused."""
    name = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503)
        assert client.post("/v1/chat/completions", json=body).status_code == 503
        text = "".join(lines)
    assert text.count('"content":"xx"') == 20
    assert text.endswith("[DONE]")


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


def test_missing_packages_are_named(say, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "redrafter[server]" in refusal(say("serve", "--demo"))
