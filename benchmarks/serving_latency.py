"""Latency of an `Engine` under Poisson arrivals, and its throughput with and without a drafter, without HTTP.

    python benchmarks/serving_latency.py --model M --drafter D --prompts FILE [--parts clients arrivals] [--out OUT]

- `clients`: 1, 8, 32 and 64 clients, each of which sends its next request when the last one has ended: tokens per
  second without and with the drafter.
- `arrivals`: requests arrive at random times, at 0.3, 0.6 and 0.9 of the rate at which 64 clients are answered without
  the drafter.  Time to first token, and between tokens (those of one step share its time equally), at the median and
  the 99th percentile.

Requests are greedy, with up to `--max-new-tokens` tokens.  Writes serving.json and serving.png to `--out`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter import Engine
from redrafter.data.prompts import prompt_ids, read_prompts
from redrafter.proposers.loading import load_drafter

CLIENTS = (1, 8, 32, 64)
LOADS = (0.3, 0.6, 0.9)
SLOTS = 64


@dataclass
class Latencies:
    """Seconds of all requests of a run."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Milliseconds at two percentiles, and throughput."""
        found = {"tokens/s": self.tokens / self.seconds}
        for name, values in (("first token", self.first), ("between tokens", self.between)):
            for percent in (50, 99):
                found[f"{name}, p{percent}, ms"] = 1e3 * percentile(values, percent)
        return found


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


async def answered(engine: Engine, prompt: list[int], new: int, found: Latencies) -> None:
    """One request."""
    last = time.perf_counter()
    first = True
    async for event in engine.submit(prompt, max_new_tokens=new):
        now = time.perf_counter()
        if not event.tokens:
            continue
        if first:
            found.first.append(now - last)
        else:
            found.between += [(now - last) / len(event.tokens)] * len(event.tokens)
        first, last = False, now
        found.tokens += len(event.tokens)


async def by_clients(engine: Engine, prompts: Iterator[list[int]], clients: int, seconds: float, new: int) -> Latencies:
    """Clients that send one request after another."""
    found = Latencies()
    begin = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            await answered(engine, next(prompts), new, found)

    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds = time.perf_counter() - begin
    return found


async def by_arrivals(engine: Engine, prompts: Iterator[list[int]], rate: float, seconds: float, new: int) -> Latencies:
    """Requests that arrive as a Poisson process of `rate` per second."""
    found, draw = Latencies(), random.Random(0)
    begin = due = time.perf_counter()
    running: list[asyncio.Task[None]] = []
    while due - begin < seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.append(asyncio.create_task(answered(engine, next(prompts), new, found)))
        due += draw.expovariate(rate)
    await asyncio.gather(*running)
    found.seconds = time.perf_counter() - begin
    return found


def plot(figures: dict[str, Any], file: Path) -> None:
    """Throughput by clients, and latency by load."""
    import matplotlib.pyplot as plt

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, rows in figures.get("clients", {}).items():
        left.plot([*map(int, rows)], [row["tokens/s"] for row in rows.values()], marker="o", label=name)
    left.set(xlabel="clients", ylabel="tokens/s", xscale="log", ylim=(0, None), title="Throughput")
    for name, rows in figures.get("arrivals", {}).items():
        for latency, style in (("first token", "-"), ("between tokens", "--")):
            values = [row[f"{latency}, p99, ms"] for row in rows.values()]
            right.plot([*map(float, rows)], values, style, marker="o", label=f"{latency}, {name}")
    right.set(xlabel="requests per second", ylabel="ms, 99th percentile", yscale="log", title="Latency")
    for axes in (left, right):
        if axes.lines:
            axes.legend()
    picture.tight_layout()
    picture.savefig(file, dpi=120)


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--parts", nargs="+", choices=["clients", "arrivals"], default=["clients", "arrivals"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto" if device == "cuda" else None).to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompts = [prompt_ids(row, tokenizer, where) for where, row in read_prompts(given.prompts)]
    random.Random(0).shuffle(prompts)
    gc.freeze()  # as the server does
    figures: dict[str, Any] = {}
    requests_per_second = 0.0
    methods: dict[str, Any] = {"undrafted": None}
    if given.drafter:
        methods["drafted"] = load_drafter(given.drafter, model, any_target=True)
    for name, drafter in methods.items():
        with Engine(model, drafter, slots=SLOTS, max_length=2048, max_waiting=10_000) as engine:
            measured = lambda run, *words: asyncio.run(  # noqa: E731
                run(engine, itertools.cycle(prompts), *words, given.max_new_tokens)
            )
            for clients in CLIENTS:  # steps of all sizes are captured
                measured(by_clients, clients, 1.0)
            for clients in CLIENTS if "clients" in given.parts else CLIENTS[-1:]:
                found = measured(by_clients, clients, given.seconds)
                figures.setdefault("clients", {}).setdefault(name, {})[clients] = found.figures()
            requests_per_second = requests_per_second or len(found.first) / found.seconds
            for load in LOADS if "arrivals" in given.parts else ():
                rate = load * requests_per_second  # the same for both
                found = measured(by_arrivals, rate, given.seconds)
                figures.setdefault("arrivals", {}).setdefault(name, {})[round(rate, 2)] = found.figures()
    for part, methods in figures.items():
        for name, rows in methods.items():
            for key, row in rows.items():
                print(f"{part} {key}, {name}: " + ", ".join(f"{what} {value:,.1f}" for what, value in row.items()))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "serving.json").write_text(json.dumps(figures, indent=2))
        plot(figures, given.out / "serving.png")


if __name__ == "__main__":
    main()
