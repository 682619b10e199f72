"""Throughput and latency of an `Engine` on one device, without HTTP: saturation, arrivals, one row, long prompts.

    python benchmarks/serving.py [--shape smollm2] [--slots 32 128] [--parts saturation one delay clients] [--out FILE]

Models with random weights in the shape of a public one, in bfloat16 on a GPU.  End tokens are disabled; prompts have 16
to 96 tokens and answers 1 to 256, drawn with a fixed seed.

- `saturation`: more requests than slots from the start.  Tokens per second while all slots are busy, divided by those
  of as many requests of equal length that start together.
- `one`: one request in an engine of many slots, and in an engine of one: milliseconds per step.
- `clients`: the bundled pair, 48 chats of up to 96 new tokens: an engine of 16 slots beside one call of `generate`
  after another, both with the drafter.
- `delay`: 16 prompts of 1,000 tokens arrive while 16 requests are being decoded: the longest time between two steps,
  divided by the median.

Prints a table; `--out` writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from redrafter import Engine, RecurrentDrafter, generate
from redrafter.cli.loading import demo_folder

ASKS = ("Tell me about", "Write a story about", "Why do people like")

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(shape: str) -> PreTrainedModel:
    """A model with random weights, in bfloat16 on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, **SHAPES[shape])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else None).eval()


def prompt(generator: random.Random, tokens: int) -> list[int]:
    """Random tokens."""
    return [generator.randrange(1, 500) for _ in range(tokens)]


def rate(engine: Engine, requests: list[tuple[list[int], int]], *, until_waiting: int) -> float:
    """Tokens per second from when all requests are submitted until fewer than `until_waiting` of them wait."""
    before = engine.statistics().generated_tokens
    submissions = [engine.submit(ids, max_new_tokens=new, eos_token_id=()) for ids, new in requests]
    total = sum(new for _, new in requests)
    samples: list[tuple[float, int]] = []
    while True:
        now = engine.statistics()
        samples.append((time.perf_counter(), now.generated_tokens - before))
        if not now.running and not now.waiting:
            break
        if now.waiting < until_waiting and samples[-1][1] > total / 4:
            break
        time.sleep(0.005)
    begin = next(one for one in samples if one[1] > total / 50)
    for one in submissions:
        one.cancel()
    for one in submissions:
        one.result(120)
    return (samples[-1][1] - begin[1]) / (samples[-1][0] - begin[0])


def saturation(model: PreTrainedModel, slots: int) -> dict[str, float]:
    """Continuous batching beside a batch without admission."""
    generator = random.Random(0)
    with Engine(model, slots=slots, max_length=512, max_waiting=100 * slots) as engine:
        equal = [(prompt(generator, 56), 256) for _ in range(slots)]
        mixed = [(prompt(generator, generator.randint(16, 96)), generator.randint(1, 256)) for _ in range(8 * slots)]
        rate(engine, mixed[: 3 * slots], until_waiting=0)  # captures
        found = {"equal": [], "mixed": []}
        for _ in range(3):
            found["equal"].append(rate(engine, equal, until_waiting=-1))
            found["mixed"].append(rate(engine, mixed, until_waiting=1))
    equal_rate, mixed_rate = (statistics.median(found[name]) for name in ("equal", "mixed"))
    return {"equal, tokens/s": equal_rate, "mixed, tokens/s": mixed_rate, "mixed / equal": mixed_rate / equal_rate}


def gaps(engine: Engine, tokens: int, *, skip: int = 16) -> Iterator[float]:
    """Seconds between the steps of one request."""
    last = None
    for number, _ in enumerate(engine.submit([5, 6, 7, 8], max_new_tokens=tokens, eos_token_id=())):
        now = time.perf_counter()
        if last is not None and number > skip:
            yield now - last
        last = now


def one_row(model: PreTrainedModel, slots: int) -> dict[str, float]:
    """Milliseconds per step of one request."""
    found: dict[str, float] = {}
    for count in (1, slots):
        with Engine(model, slots=count, max_length=512) as engine:
            list(gaps(engine, 100))
            found[f"{count} slots, ms"] = 1e3 * statistics.median(gaps(engine, 300))
    one, many = found.values()
    return {**found, "ratio": many / one}


def delay(model: PreTrainedModel) -> dict[str, float]:
    """How long prompts of others delay a running request."""
    generator = random.Random(0)
    found: list[float] = []
    with Engine(model, slots=32, max_length=2048) as engine:
        for _ in range(3):
            others = [engine.submit(prompt(generator, 20), max_new_tokens=400, eos_token_id=()) for _ in range(15)]
            times: list[float] = []
            late = []
            for number, _ in enumerate(engine.submit(prompt(generator, 20), max_new_tokens=300, eos_token_id=())):
                times.append(time.perf_counter())
                if number == 100:
                    late = [
                        engine.submit(prompt(generator, 1000), max_new_tokens=200, eos_token_id=()) for _ in range(16)
                    ]
            between = [b - a for a, b in itertools.pairwise(times)]
            found.append(max(between[101:]) / statistics.median(between[30:100]))
            for one in (*others, *late):
                one.cancel()
                one.result(60)
    return {"median step, ms": 1e3 * statistics.median(between[30:100]), "longest / median": min(found[1:])}


def clients(slots: int = 16) -> dict[str, float]:
    """Many clients at once beside one after another."""
    folder = demo_folder()
    model = AutoModelForCausalLM.from_pretrained(folder / "redrafter-demo-12m")
    tokenizer = AutoTokenizer.from_pretrained(folder / "redrafter-demo-12m")
    drafter = RecurrentDrafter.from_pretrained(folder / "drafter", target=model)
    words = "sea sun moon cat dog tree car road house king boat fish bird snow rain fire".split()
    chats = [[{"role": "user", "content": f"{ask} the {word}."}] for word in words for ask in ASKS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    alone: list[float] = []
    together: list[float] = []
    with Engine(model, drafter, slots=slots, max_length=512) as engine:
        for _ in range(3):
            begin = time.perf_counter()
            texts = [generate(model, drafter, [ids], max_new_tokens=96).new_tokens[0] for ids in prompts]
            alone.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            submissions = [engine.submit(ids, max_new_tokens=96) for ids in prompts]
            same = [one.result().new_tokens == text for one, text in zip(submissions, texts, strict=True)]
            together.append(time.perf_counter() - begin)
    one, many = statistics.median(alone), statistics.median(together)
    return {"one at a time, s": one, "together, s": many, "ratio": one / many, "equal texts": sum(same)}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2")
    parser.add_argument("--slots", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--parts", nargs="+", default=["saturation", "one", "delay"])
    parser.add_argument("--out")
    options = parser.parse_args()
    model = random_model(options.shape)
    gc.freeze()  # as the server does: a full garbage collection stops the engine for about 0.25 s
    figures: dict[str, Any] = {}
    if "saturation" in options.parts:
        for slots in options.slots:
            figures[f"saturation, {slots} slots"] = saturation(model, slots)
    if "clients" in options.parts:
        figures["clients"] = clients()
    if "one" in options.parts:
        figures["one row"] = one_row(model, 32)
    if "delay" in options.parts:
        figures["delay"] = delay(model)
    for name, values in figures.items():
        print(f"{options.shape}: {name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in values.items()))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
