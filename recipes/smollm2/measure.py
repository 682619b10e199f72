"""Tokens per step and per second of a drafter with and without lookup, by category of public benchmarks.

    python -m recipes.smollm2.measure --model MODEL --drafter DRAFTER --data DATA [--compile] [--temperature T …]

DATA holds spec_bench.jsonl.xz (https://github.com/hemingkx/Spec-Bench), humaneval.jsonl.xz
(https://github.com/openai/human-eval) and alpaca_eval_prompts.jsonl.xz (https://github.com/tatsu-lab/alpaca_eval); rows
have `turns` or `messages`, of which the first is answered, and perhaps a `category`.

Rates are those of complete calls of `generate` for one prompt each, prompts included.  Methods alternate within a
category.  The model runs in bfloat16 on a GPU, in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from recipes.common.corpus import data_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redrafter import generate
from redrafter.proposers.loading import load_drafter

FILES = ("spec_bench", "humaneval", "alpaca_eval_prompts")

METHODS: dict[str, dict[str, Any]] = {
    "undrafted": {},
    "head": {"lookup": False},
    "head+lookup": {},
    "head+lookup, 48 nodes": {"node_budget": 48},
    "head+lookup, 24 nodes": {"node_budget": 24},
    "prompt lookup": {},
}
"""Arguments of `generate`."""

LONGEST = 3500
"""Tokens of a prompt that are kept, from its end."""


def prompts(folder: Path, per_category: int) -> dict[str, list[str]]:
    """Evenly spaced prompts by category; a file whose rows have none is one category."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in FILES:
        with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                first = row["turns"][0] if "turns" in row else row["messages"][0]["content"]
                found[row.get("category", name)].append(first)
    return {name: texts[:: max(1, len(texts) // per_category)][:per_category] for name, texts in found.items()}


class Counts:
    """Sums over calls."""

    def __init__(self) -> None:
        self.tokens = self.steps = self.equal = 0
        self.seconds = 0.0

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __str__(self) -> str:
        return f"{self.tokens / self.steps:8.2f}{self.tokens / self.seconds:8.0f}"


def measured(
    model: PreTrainedModel, drafters: dict[str, Any], asked: list[list[int]], warm: set[str], **settings: Any
) -> dict[str, Counts]:
    """All methods on the same prompts.  `warm` are the methods that have been run before."""
    texts: list[list[int]] = []
    found = {name: Counts() for name in METHODS}
    for name, options in METHODS.items():
        if name not in warm:
            for _ in range(3):
                generate(model, drafters[name], asked[:1], **(settings | {"max_new_tokens": 24}), **options)
            warm.add(name)
        for index, ids in enumerate(asked):
            begin = time.perf_counter()
            out = generate(model, drafters[name], [ids], **settings, **options)
            found[name].seconds += time.perf_counter() - begin
            found[name].tokens += out.stats.tokens
            found[name].steps += out.stats.steps
            if name == "undrafted":
                texts.append(out.new_tokens[0])
            found[name].equal += out.new_tokens[0] == texts[index]
    return found


def main() -> None:
    """Prints a table for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--data", type=data_folder, required=True)
    parser.add_argument("--per-category", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    head = load_drafter(given.drafter, model, any_target=True)
    drafters = dict.fromkeys(METHODS, head) | {"undrafted": None, "prompt lookup": "prompt-lookup"}
    gc.freeze()
    asked = {
        category: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"][-LONGEST:]
            for text in texts
        ]
        for category, texts in prompts(given.data, given.per_category).items()
    }
    for temperature in given.temperature:
        settings: dict[str, Any] = {"max_new_tokens": given.max_new_tokens, "compile": given.compile}
        settings |= {"do_sample": True, "temperature": temperature, "seed": 1} if temperature else {"do_sample": False}
        print(f"temperature {temperature:g}, {sum(map(len, asked.values()))} prompts: tokens per step, tokens/s")
        print(" " * 24 + "".join(f"{name:>24s}" for name in METHODS))
        total, warm = {name: Counts() for name in METHODS}, set[str]()
        for category, ids in asked.items():
            found = measured(model, drafters, ids, warm, **settings)
            print(f"{category:24s}" + "".join(f"{found[name]!s:>24s}" for name in METHODS), flush=True)
            for name, counts in found.items():
                total[name] += counts
        print(f"{'all':24s}" + "".join(f"{total[name]!s:>24s}" for name in METHODS))
        print("equal texts: " + ", ".join(f"{name} {counts.equal}" for name, counts in total.items()), flush=True)


if __name__ == "__main__":
    main()
