"""`check --endpoint`: requests, the comparison, and the margin rule, with a server that generates by the tiny model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import refusal
from redrafter import generate


class Handler(BaseHTTPRequestHandler):
    """Answers completions; `change` of the server edits the tokens of each answer."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        settings = {name: body[name] for name in ("repetition_penalty",) if name in body}
        if body["temperature"]:
            names = ("temperature", "top_k", "top_p", "min_p")
            settings |= {"do_sample": True, "seed": [body["seed"]]} | {one: body[one] for one in names if one in body}
        prompt = torch.tensor([body["prompt"]])
        with self.server.lock:
            out = generate(self.server.model, None, prompt, max_new_tokens=body["max_tokens"], **settings)
        answer = {"index": 0, "text": "", "token_ids": self.server.change(out.new_tokens[0])}
        content = json.dumps({"choices": [answer]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(model_folder):
    """A function that starts a server and returns it."""
    servers = []

    def start(change=lambda tokens: tokens):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.model, server.change = AutoModelForCausalLM.from_pretrained(model_folder), change
        server.bodies, server.lock = [], threading.Lock()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def command(model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two two", "three")))
    return ("check", "--model", model_folder, "--prompts", prompts, "--max-new-tokens", 12)


@pytest.mark.parametrize(
    "sampling",
    [(), ("--set", "repetition_penalty=1.3"), ("--do-sample", "--temperature", "0.7", "--top-k", "9", "--seed", "4")],
    ids=["greedy", "penalty", "sampled"],
)
def test_a_server_of_the_same_model_is_equal(say, serve, command, sampling):
    server = serve()
    status, out, err = say(*command, "--endpoint", server.url, *sampling)
    assert status == 0, out + err
    assert "3 of 3 texts equal" in out
    assert len(server.bodies) == 3
    assert all(body["return_token_ids"] for body in server.bodies)


def test_two_servers_are_compared_without_loading_the_model(say, serve, command, monkeypatch):
    one, other = serve(), serve()
    monkeypatch.setattr("redrafter.cli.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    status, out, _ = say(*command, "--endpoint", one.url, "--against", other.url, "--endpoint-model", "served")
    assert (status, "3 of 3 texts equal" in out) == (0, True)
    assert {body["model"] for body in (*one.bodies, *other.bodies)} == {"served"}


def test_other_tokens_are_an_error_that_rounding_does_not_explain(say, serve, command):
    server = serve(lambda tokens: [*tokens[:5], (tokens[5] + 1) % 50 + 3, *tokens[6:]])
    status, out, _ = say(*command, "--endpoint", server.url)
    assert status == 1
    assert "from new token 6 on" in out
    assert "NOT explained" in out
    assert "0 of 3 texts equal" in out


def test_a_server_without_token_ids_is_refused(say, serve, command):
    server = serve(lambda _: None)
    assert "return_token_ids" in refusal(say(*command, "--endpoint", server.url))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--endpoint"),
        (("--drafter", "prompt-lookup", "--endpoint", "http://localhost:1"), "--endpoint"),
        (("--drafter", "prompt-lookup", "--against", "http://localhost:1"), "--against"),
        (("--endpoint", "http://localhost:1", "--beam-width", "2"), "draft shape"),
        (("--endpoint", "http://localhost:1", "--set", "num_beams=2"), "num_beams"),
        (("--endpoint", "localhost"), "localhost"),
    ],
)
def test_options_that_contradict_each_other(say, command, words, expected):
    assert expected in refusal(say(*command, *words))
