"""Many HTTP clients for a long time: is every text right, is nothing lost, does memory stay flat?

    python benchmarks/serving_load.py [--requests 2000] [--clients 64] [--slots 32] [--out FILE]

Starts `redrafter serve --demo` and sends it chats with short answers and mixed settings: greedy and seeded sampling,
penalties, biases, stop strings, regular expressions, with and without drafts, streamed or not.  One request in five is
abandoned by its client at a random time.  At the end,

- every completed text must be that of `generate` alone without a drafter;
- every request must have ended, and without an error;
- the server must have no running or waiting request, and as many ended ones as were sent;
- the server's memory in the last quarter of the run must be that of the second quarter, within 5 %.

Prints a table; `--out` writes the figures as JSON.  The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from redrafter import generate
from redrafter.server.structured import make_processor

PROMPTS = (
    "Please find me a hotel in New York with a good rating.",
    "Can you book a table for four people tomorrow?",
    "Write a poem about the sea.",
    "What is the capital of France?",
    "You are an astronaut. Describe the view of the Earth.",
    "Hello!",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "drafter": False},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0, "stop": " a"},
    {"temperature": 0, "guided_regex": "[A-Z][a-z ]{4,40}\\."},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "top_k": 20, "drafter": False},
    {"temperature": 0.8, "seed": 4, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    {"temperature": 1.0, "seed": 5, "logit_bias": {"100": 4, "200": -100}},
    {"temperature": 1.0, "seed": 6, "guided_regex": "(yes|no), [a-z ]{5,30}"},
)
ABANDONED = 0.2
"""Share of the requests that their clients abandon."""


@dataclass
class Run:
    """What happened so far."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first text of streamed answers."""
    total: list[float] = field(default_factory=list)
    """Seconds of complete answers."""
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Ended requests, and the server's memory in bytes, twice a second."""
    seconds: float = 0.0


class Expected:
    """The texts of `generate` alone, computed once per request."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model, tokenizer
        self._texts: dict[str, str] = {}

    def text(self, body: dict[str, Any]) -> str:
        """The text of a chat request."""
        key = json.dumps(body, sort_keys=True)
        if key not in self._texts:
            self._texts[key] = self._generate(**body)
        return self._texts[key]

    def _generate(
        self, messages: Any, max_tokens: int, temperature: float, *, stop: str | None = None, drafter: bool = True,
        guided_regex: str | None = None, logit_bias: dict[str, float] | None = None, **settings: Any,
    ) -> str:  # fmt: skip
        tokenizer = self._tokenizer
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        if temperature:
            settings |= {"do_sample": True, "temperature": temperature}
        if stop is not None:
            settings["stop_strings"] = stop
        if logit_bias is not None:
            settings["logit_bias"] = {int(token): float(bias) for token, bias in logit_bias.items()}
        if guided_regex is not None:
            vocabulary = self._model.config.vocab_size
            settings["logits_processor"] = [make_processor(tokenizer, vocabulary, regex=guided_regex)]
        out = generate(self._model, None, [ids], tokenizer=tokenizer, max_new_tokens=max_tokens, **settings)
        return out.texts[0] if stop is None else out.texts[0].partition(stop)[0]


def drawn(
    count: int, prompts: Sequence[str] = PROMPTS, *, seed: int = 0
) -> list[tuple[dict[str, Any], bool, float | None]]:
    """Requests: the body, whether to stream, and if it is abandoned, at which multiple of the mean latency."""
    generator = random.Random(seed)
    lengths = {prompt: generator.choice((8, 12, 16, 24)) for prompt in prompts}
    found = []
    for _ in range(count):
        prompt = generator.choice(prompts)
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": lengths[prompt], **generator.choice(SETTINGS)}
        abandoned = 0.8 * generator.random() if generator.random() < ABANDONED else None
        found.append((body, generator.random() < 0.5, abandoned))
    return found


async def answer(client: httpx.AsyncClient, body: dict[str, Any], run: Run, *, stream: bool) -> str:
    """The text of one chat.  Raises ValueError if the server reports an error."""
    begin = time.perf_counter()
    if not stream:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise ValueError(response.text)
        text: str = response.json()["choices"][0]["message"]["content"]
    else:
        text, chunk = "", None
        async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            if response.status_code != 200:
                raise ValueError((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(line)
                piece = chunk["choices"][0]["delta"].get("content")
                if piece and not text:
                    run.first.append(time.perf_counter() - begin)
                text += piece or ""
        if chunk is None or chunk["choices"][0]["finish_reason"] is None:
            raise ValueError("The stream ended early.")
    run.total.append(time.perf_counter() - begin)
    return text


async def load(url: str, process: psutil.Process, requests: Any, clients: int, expected: Expected) -> Run:
    """Sends the requests from concurrent clients."""
    run, begin = Run(), time.perf_counter()
    left = iter(requests)

    async def one_client(client: httpx.AsyncClient) -> None:
        for body, stream, abandoned in left:
            patience = None if abandoned is None else abandoned * (statistics.mean(run.total[-100:] or [1.0]))
            try:
                async with asyncio.timeout(patience):
                    text = await answer(client, body, run, stream=stream)
            except TimeoutError:
                run.ended["abandoned"] += 1
            except (ValueError, httpx.HTTPError) as error:
                run.ended["failed"] += 1
                run.errors.append(f"{type(error).__name__}: {error}")
            else:
                run.ended["completed"] += 1
                if text != expected.text(body):
                    run.wrong.append(f"{json.dumps(body)}: {text!r} instead of {expected.text(body)!r}")

    async def watch() -> None:
        while True:
            run.memory.append((run.ended.total(), process.memory_info().rss))
            await asyncio.sleep(0.5)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*[one_client(client) for _ in range(clients)])
        watcher.cancel()
    run.seconds = time.perf_counter() - begin
    return run


def server_counts(url: str) -> dict[str, float]:
    """The server's own counts, once abandoned requests have left their slots."""
    for _ in range(100):
        text = httpx.get(f"{url}/metrics", timeout=60).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        counts = {
            sample.labels.get("finished_reason", sample.name.removeprefix("vllm:")): sample.value
            for sample in samples
            if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:request_success_total",
                               "vllm:generation_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
        }  # fmt: skip
        if not counts["num_requests_running"] and not counts["num_requests_waiting"]:
            break
        time.sleep(0.1)
    return counts


def memory_by_quarter(run: Run) -> list[float]:
    """Median memory in MiB in each quarter of the requests."""
    total = max(1, run.ended.total())
    quarters: list[list[int]] = [[] for _ in range(4)]
    for ended, size in run.memory:
        quarters[min(3, 4 * ended // total)].append(size)
    return [statistics.median(quarter or [0]) / 2**20 for quarter in quarters]


def checks(run: Run, counts: dict[str, float], requests: int) -> dict[str, bool]:
    """What must hold at the end."""
    _, second, _, last = memory_by_quarter(run)
    ended = sum(counts[reason] for reason in ("stop", "length", "abort", "error"))
    return {
        "every request has ended": run.ended.total() == requests,
        "no request has failed": not run.errors and counts["error"] == 0,
        "every text is that of generate alone": not run.wrong,
        "no slot is taken": counts["num_requests_running"] == counts["num_requests_waiting"] == 0,
        "the server's own counts agree": run.ended["completed"] <= ended <= requests,
        "memory is flat": last <= 1.05 * second,
    }


def report(run: Run, counts: dict[str, float], requests: int, clients: int) -> dict[str, Any]:
    """All figures; prints them."""
    figures: dict[str, Any] = {"requests": requests, "clients": clients, **run.ended}
    figures |= {"wrong texts": len(run.wrong), "seconds": run.seconds, "requests/s": requests / run.seconds}
    accepted, tokens = counts["spec_decode_num_accepted_tokens_total"], counts["generation_tokens_total"]
    figures |= {"tokens/s": tokens / run.seconds, "share of accepted drafts in the text": accepted / tokens}
    for name, values in (("first text, s", run.first), ("complete answer, s", run.total)):
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100)
            figures |= {f"{name}, median": cuts[49], f"{name}, 99th percentile": cuts[98]}
    figures |= {f"memory in quarter {i}, MiB": size for i, size in enumerate(memory_by_quarter(run), start=1)}
    results = checks(run, counts, requests)
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    for name, holds in results.items():
        table.add_row(name, "yes" if holds else "NO")
    Console().print(table)
    for line in [*run.errors, *run.wrong][:10]:
        print(line, file=sys.stderr)
    return {"figures": figures, "checks": results, "server": counts}


@contextmanager
def served(slots: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server process; it must end with status 0 after SIGTERM."""
    command = [sys.executable, "-m", "redrafter", "serve", "--demo", "--port", "0", "--slots", str(slots)]
    process = subprocess.Popen([*command, "--max-length", "256"], stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"curl (http://[\d.:]+)", line)))
        yield url, psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit("The server did not end with status 0 after SIGTERM.")
    finally:
        process.kill()


def main() -> None:
    """Runs the load and exits with status 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("requests", 2000), ("clients", 64), ("slots", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    demo = files("redrafter") / "assets/demo/redrafter-demo-12m"
    expected = Expected(AutoModelForCausalLM.from_pretrained(demo), AutoTokenizer.from_pretrained(demo))
    requests = drawn(options.requests)
    for body, _, _ in requests:  # before the run, so that it is not delayed
        expected.text(body)
    with served(options.slots) as (url, process):
        run = asyncio.run(load(url, process, requests, options.clients, expected))
        found = report(run, server_counts(url), options.requests, options.clients)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(found["checks"].values()) else 1)


if __name__ == "__main__":
    main()
