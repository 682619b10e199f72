"""What the benchmarks of speed share: prompts, runs whose steps are timed, rounds, tables.

Promises that what is timed are steps alone: prompts, and the first steps of a call, in which what is built on first use
is built and a GPU's graph is captured, are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recipes.common.answers import contexts, prompt_of
from recipes.target.shape import CATEGORIES, corpus

from redrafter import Event, RedrafterError
from redrafter.prompts import prompt_ids, read_prompts

UNTIMED = 3  # steps of a call until a graph is captured
UNDRAFTED = "undrafted"


class Shape(NamedTuple):
    """How drafts are made; what is not told is as the drafter's folder says."""

    name: str
    settings: dict[str, int]

    @classmethod
    def read(cls, text: str) -> Shape:
        """`10`: a beam width; `10:21`: and a node budget; `10:21:5`: and a length; `tuned`: what the folder says."""
        if text == "tuned":
            return cls(text, {})
        names = ("beam_width", "node_budget", "beam_length")
        return cls(text, dict(zip(names, map(int, text.split(":")), strict=False)))


@dataclass
class Run:
    """What one call wrote, and the time of its steps."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    prompts: list[float] = field(default_factory=list)
    """Seconds until each first token."""
    times: list[float] = field(default_factory=list)
    """Seconds of each timed step."""
    tokens: int = 0
    """That those wrote."""
    rows: int = 1
    """Decoded together."""
    memory: int = 0
    """Bytes of a GPU that torch held at most."""

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / sum(self.times)

    @property
    def tokens_per_step(self) -> float:
        """Of one row."""
        return self.tokens / len(self.times) / self.rows

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, all else that a call does between two steps included."""
        return 1e3 * sum(self.times) / len(self.times)


def pooled(runs: list[list[Run]]) -> list[Run]:
    """One run for each round, of the steps of all jobs that were measured in it."""
    return [
        Run(times=[one for run in each for one in run.times], tokens=sum(run.tokens for run in each))
        for each in zip(*runs, strict=False)
    ]


def timed(events: Iterator[Event], rows: int = 1) -> Run:
    """Follows a stream of so many rows together, each step an event a row.

    One row after another (`rows=1`) to the end of all; several until the first of them ends, its last step left out.
    Raises RedrafterError where there is no step to time.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run, steps, last = Run(rows=rows), 0, time.perf_counter()
    for step in zip(*[events] * rows, strict=False):
        took = time.perf_counter() - last
        if step[0].row not in run.texts:
            run.prompts.append(took)
        elif rows > 1 and any(event.finish_reason for event in step):
            break
        else:
            steps += 1
            if steps > UNTIMED:
                run.times.append(took)
                run.tokens += sum(len(event.tokens) for event in step)
        for event in step:
            run.texts.setdefault(event.row, []).extend(event.tokens)
        last = time.perf_counter()
    events.close()  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        run.memory = torch.cuda.max_memory_allocated()
    if not run.times:
        raise RedrafterError("The texts end before a step can be timed: let more tokens be written.")
    return run


def prompts_of(paths: list[Path], tokenizer: Any, count: int) -> dict[str, list[list[int]]]:
    """Token ids of `count` prompts at most of each category: of recipes/target where a folder is told, else a file."""
    found: dict[str, list[list[int]]] = {}
    for path in paths:
        if path.is_dir():
            data = corpus(path)
            for category, name in CATEGORIES.items():
                held_out = True if name in data.chat else None  # the other files are there to be evaluated on
                rows = contexts(data, name, tokenizer, held_out=held_out, count=count)
                found[category] = [prompt_of(row) for row in rows]
        else:
            found[path.stem] = [prompt_ids(one, tokenizer, where) for where, one in read_prompts(path)[:count]]
    return found


def in_rounds(jobs: dict[Any, Callable[[], Run]], rounds: int, until: float) -> tuple[dict[Any, list[Run]], list[str]]:
    """The runs of each job, all in turn and round by round while there is time, and what failed, which goes no further.

    `until`: by `time.monotonic`; no job is begun after it.
    """
    runs: dict[Any, list[Run]] = {name: [] for name in jobs}
    failed: dict[Any, str] = {}
    for number in range(rounds):
        for name, job in jobs.items():
            if name in failed or time.monotonic() > until:
                continue
            try:
                runs[name].append(run := job())
            except Exception as error:  # out of memory, say: the others are still wanted
                if not isinstance(error, RedrafterError):
                    traceback.print_exc()
                failed[name] = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
                print(failed[name], file=sys.stderr, flush=True)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                print(f"round {number + 1}, {name}: {run.speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return runs, list(failed.values())


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; what is nested is left to the JSON line."""
    if not records:
        return "Nothing was measured."
    names = [name for name, value in records[0].items() if not isinstance(value, dict)]
    lines = [names, ["---"] * len(names), *([str(record.get(name, "")) for name in names] for record in records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(model: torch.nn.Module) -> dict[str, Any]:
    """The model, the device and torch, for the JSON line."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def parser(described: str) -> argparse.ArgumentParser:
    """The options that all have."""
    options = argparse.ArgumentParser(description=described)
    options.add_argument("--model", required=True)
    options.add_argument("--drafter", required=True)
    options.add_argument("--data", type=Path, nargs="+", required=True, help="the folder of recipes/target, or files")
    options.add_argument("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32")
    options.add_argument("--device", default="auto")
    options.add_argument("--widths", type=Shape.read, nargs="+", default=[Shape("10", {"beam_width": 10})])
    options.add_argument("--compile", action="store_true", help="the target's layers, both ways")
    options.add_argument("--prompts", type=int, default=8, help="of each category")
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=300, help="after which nothing is begun")
    options.add_argument("--output", type=Path, help="a file for the JSON line, which is printed otherwise")
    return options


def put(record: dict[str, Any], output: Path | None) -> None:
    """One JSON line, into a file where there is one to be."""
    line = json.dumps(record)
    if output:
        output.write_text(line + "\n")
    else:
        print("\n" + line)
