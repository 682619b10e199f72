"""What one call of `generate` costs beside its steps, on one device.

    python benchmarks/calls.py [--shape smollm2] [--prompts 1024 4096 7000] [--out FILE]

- first token: milliseconds from the call of `stream` to its first event, and transformers' `generate` of one token, for
  prompts of several lengths; medians of 7 calls in turn after two that warm up;
- fixed cost: calls of 8 and 136 new tokens give the cost of a step; what is left of a call;
- drafts: the bundled pair, 16 prompts, 128 new tokens: speed-up of complete calls, and of their steps without the
  first.

Random weights in the shape of a public model, in bfloat16 on a GPU.  Prints a table; `--out` writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from redrafter import RecurrentDrafter, generate, stream
from redrafter.cli.loading import demo_folder
from serving import SHAPES, random_model


def median_ms(*functions: Callable[[], object], repeats: int = 7) -> list[float]:
    """Median durations of functions that are called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(repeats + 2):
        for function, own in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                own.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(own) for own in times]


def first_token(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Time to the first token of a prompt."""
    ids = torch.randint(1, 500, (1, tokens), device=model.device)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    ours, theirs = median_ms(
        lambda: next(iter(stream(model, None, ids, max_new_tokens=8, eos_token_id=()))),
        lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0, **settings),
    )
    return {"redrafter, ms": ours, "transformers, ms": theirs, "ratio": ours / theirs}


def fixed_cost(model: PreTrainedModel) -> dict[str, float]:
    """What a call costs beside its steps."""

    def call(tokens: int) -> Callable[[], object]:
        return lambda: generate(model, None, [[5, 6, 7, 8]], max_new_tokens=tokens, eos_token_id=())

    short, long = median_ms(call(8), call(136))
    step = (long - short) / 128
    return {"step, ms": step, "fixed, ms": short - 8 * step}


def drafted(device: str) -> dict[str, float]:
    """Speed-up by the bundled drafter."""
    folder = demo_folder()
    model = AutoModelForCausalLM.from_pretrained(folder / "redrafter-demo-12m").to(device)
    drafter = RecurrentDrafter.from_pretrained(folder / "drafter", target=model)
    torch.manual_seed(0)
    found: dict[bool, list[tuple[float, float, int]]] = {True: [], False: []}
    for number in range(18):
        ids = torch.randint(3, 400, (1, 24)).tolist()
        for uses in (True, False):
            begin, times, tokens = time.perf_counter(), [], []
            settings = {"max_new_tokens": 128, "eos_token_id": ()}
            for event in stream(model, drafter if uses else None, ids, **settings):
                times.append(time.perf_counter())
                tokens.append(len(event.tokens))
            if number >= 2:
                found[uses].append((times[-1] - begin, times[-1] - times[0], sum(tokens[1:])))
    calls, rates = {}, {}
    for uses, rows in found.items():
        calls[uses] = sum(row[0] for row in rows)
        rates[uses] = sum(row[2] for row in rows) / sum(row[1] for row in rows)
    return {"calls": calls[False] / calls[True], "steps": rates[True] / rates[False]}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 4096, 7000])
    parser.add_argument("--out")
    options = parser.parse_args()
    model = random_model(options.shape)
    figures: dict[str, Any] = {f"first token, {n} tokens": first_token(model, n) for n in options.prompts}
    figures["one call"] = fixed_cost(model)
    figures["drafted over undrafted"] = drafted(str(model.device))
    for name, values in figures.items():
        print(f"{options.shape}: {name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in values.items()))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
