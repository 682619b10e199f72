"""vLLM's server with the plug-in: the openai client, metrics, and `redrafter check --endpoint`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from vllm_jobs import ENVIRONMENT, MODEL, needs_vllm, speculative

from redrafter.cli.demo import PROMPTS

pytestmark = needs_vllm


def start_server(folder, config: dict):
    """A server process and its URL, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", MODEL, "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", 512]
    arguments += ["--enforce-eager", "--max-num-seqs", 8, "--speculative-config", json.dumps(config)]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return process, url
        except httpx.HTTPError:
            pass
        time.sleep(1)
    process.kill()
    raise AssertionError((folder / "server.log").read_text()[-5000:])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, url = start_server(tmp_path_factory.mktemp("server"), speculative(seeded=True))
    yield url
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": one}]}) + "\n" for one in PROMPTS))
    return path


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def test_chats_of_concurrent_clients_and_metrics(server, request):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    request.addfinalizer(client.close)
    before = metric(server, "spec_decode_num_accepted_tokens")

    def chat(text: str, stream: bool) -> str:
        arguments = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 48,
            "temperature": 0,
        }
        if not stream:
            return client.chat.completions.create(**arguments).choices[0].message.content
        chunks = client.chat.completions.create(stream=True, **arguments)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    with ThreadPoolExecutor(8) as pool:
        complete = list(pool.map(chat, PROMPTS, [False] * len(PROMPTS)))
        streamed = list(pool.map(chat, PROMPTS, [True] * len(PROMPTS)))
    assert all(complete)
    assert streamed == complete
    drafts, accepted = metric(server, "spec_decode_num_drafts"), metric(server, "spec_decode_num_accepted_tokens")
    assert drafts > 0
    assert accepted > before


@pytest.mark.parametrize("sampling", [(), ("--do-sample", "--temperature", "0.8", "--top-k", "40", "--seed", "3")])
def test_check_compares_the_server_with_the_local_model(server, prompt_file, say, sampling):
    words = ("check", "--endpoint", server, "--model", MODEL, "--prompts", prompt_file, "--max-new-tokens", 48)
    status, out, err = say(*words, *sampling)
    assert status == 0, out + err
    assert f"{len(PROMPTS)} of {len(PROMPTS)} texts equal" in out


def test_min_p_and_bias_are_accepted_by_the_server(server):
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "min_p": 0.1, "logit_bias": {"300": 100}, "seed": 1}
    answer = httpx.post(f"{server}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    assert answer.json()["choices"][0]["token_ids"] == [300] * 4


def test_check_compares_two_servers(server, prompt_file, say, tmp_path):
    process, other = start_server(tmp_path, speculative(seeded=True, max_verified_tokens=1))
    try:
        status, out, err = say(
            *("check", "--endpoint", server, "--against", other, "--model", MODEL, "--prompts", prompt_file),
            *("--max-new-tokens", 48),
        )
    finally:
        process.terminate()
        process.wait(60)
    assert status == 0, out + err
    assert f"{len(PROMPTS)} of {len(PROMPTS)} texts equal" in out
