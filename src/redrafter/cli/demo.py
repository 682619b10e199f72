"""`redrafter demo`: the bundled pair, drafted and undrafted, side by side on this machine."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import Budget, Length, NewTokens, Width

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from redrafter.engine.results import Stats
    from redrafter.proposers import Drafter

PROMPTS = (
    "I want to book a table for two at Gusto Pizzeria in San Jose at 7 pm tonight.",
    "Please find me a hotel in New York with a good rating.",
    "I need a bus from Los Angeles to San Diego on March 3rd at 10 am for two people.",
    "I am looking for a two bedroom apartment in San Jose.",
    "Ben had 20 marbles and lost 5 of them. How many marbles does he have left?",
    "Write a Java method that returns the sum of an array.",
    "Write a Python function that counts the vowels in a string.",
    "You are an astronaut. Describe the view of the Earth.",
)


def demo(
    prompt: Annotated[list[str] | None, typer.Option(help="Your own prompt, once or more, instead of ours.")] = None,
    max_new_tokens: NewTokens = 96,
    beam_width: Width = None,
    beam_length: Length = None,
    node_budget: Budget = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times to measure each way; the medians are shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Watch the bundled model write with and without its drafter: the same text, sooner.

    Times and speed-ups are end to end: of complete calls of `generate`, prompts included.
    """
    from rich.console import Console

    from redrafter.cli.loading import demo_folder, load_drafter, load_model
    from redrafter.core.shapes import ShapeOverrides
    from redrafter.data.prompts import prompt_ids
    from redrafter.proposers import method_of
    from redrafter.proposers.base import resolved_shape

    model, tokenizer = load_model(str(demo_folder() / "redrafter-demo-12m"), device="cpu")
    drafter = load_drafter(str(demo_folder() / "drafter"), model)
    console = Console(highlight=False)
    if not as_json:
        console.print("[green]Green[/green]: drafted and accepted; plain: written by the model itself.")
    settings = {
        "max_new_tokens": max_new_tokens,
        "beam_width": beam_width,
        "beam_length": beam_length,
        "node_budget": node_budget,
    }
    draft = resolved_shape(method_of(drafter), 1, ShapeOverrides(beam_width, beam_length, node_budget))
    rows, by_position = [], [0] * draft.beam_length
    for text in prompt or PROMPTS:
        ids = prompt_ids({"messages": [{"role": "user", "content": text}]}, tokenizer, "--prompt")
        if not as_json:
            _show(console, model, tokenizer, drafter, text, ids, settings)
        row, stats = _measure(model, tokenizer, drafter, text, ids, settings, repeats)
        rows.append(row)
        by_position = [a + b for a, b in zip(by_position, stats.accepted_by_position, strict=True)]
    speed_up = statistics.median(r["seconds_autoregressive"] / r["seconds_drafted"] for r in rows)
    if as_json:
        typer.echo(json.dumps({"prompts": rows, "median_speedup": round(speed_up, 4)}, ensure_ascii=False))
    else:
        _table(console, rows, by_position, speed_up)
    if not all(r["same_text"] for r in rows):
        raise typer.Exit(1)


def _show(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter,
    text: str,
    ids: list[int],
    settings: dict[str, Any],
) -> None:
    """Streams the drafted answer: accepted drafts in green, the target's own tokens in the usual colour."""
    from rich.text import Text

    from redrafter.engine.generate import stream
    from redrafter.engine.text import Detokenizer

    console.print(Text(f"\n> {text}", style="bold"), soft_wrap=True)
    pieces = Detokenizer(tokenizer)
    for event in stream(model, drafter, [ids], **settings):
        for index, token in enumerate(event.tokens):
            drafted = index < event.accepted
            console.print(Text(pieces.push(token), style="green" if drafted else ""), end="", soft_wrap=True)
    console.print(Text(pieces.rest()), soft_wrap=True)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter,
    text: str,
    ids: list[int],
    settings: dict[str, Any],
    repeats: int,
) -> tuple[dict[str, Any], Stats]:
    """Complete calls of `generate`, drafted and undrafted in turn so that a machine that drifts favours neither.

    Their seconds are end to end: checks, prompt and decoding.  The first round only warms up.
    """
    from redrafter.engine.generate import generate

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + repeats):
        outputs = {}
        for drafted in (False, True):
            begin = time.perf_counter()
            outputs[drafted] = generate(model, drafter if drafted else None, [ids], **settings)
            seconds[drafted].append(time.perf_counter() - begin)
    new, stats = outputs[True].new_tokens[0], outputs[True].stats
    row = {
        "prompt": text,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "same_text": new == outputs[False].new_tokens[0],
        "tokens": stats.tokens,
        "steps": stats.steps,
        "tokens_per_step": round(stats.tokens_per_step, 4),
        "seconds_autoregressive": round(statistics.median(seconds[False][1:]), 5),
        "seconds_drafted": round(statistics.median(seconds[True][1:]), 5),
    }
    return row, stats


def _table(console: Console, rows: list[dict[str, Any]], by_position: list[int], speed_up: float) -> None:
    """The short table and what it comes to."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("prompt", no_wrap=True, max_width=20)
    for name in ("tokens", "tokens/step", "alone", "drafted", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same", no_wrap=True)
    for row in rows:
        alone, drafted = row["seconds_autoregressive"], row["seconds_drafted"]
        table.add_row(
            row["prompt"],
            str(row["tokens"]),
            f"{row['tokens_per_step']:.2f}",
            f"{alone:.2f} s",
            f"{drafted:.2f} s",
            f"{alone / drafted:.2f}x",
            "yes" if row["same_text"] else "NO",
        )
    console.print(table)
    tokens, steps = sum(r["tokens"] for r in rows), sum(r["steps"] for r in rows)
    drafts = steps - len(rows)  # the prompt's own run drafts nothing
    shares = ", ".join(f"{count / max(1, drafts):.0%}" for count in by_position)
    console.print(f"tokens per step: {tokens / steps:.2f}")
    console.print(f"drafts accepted at positions 1 to {len(by_position)}: {shares}")
    console.print(f"median end-to-end speed-up on this machine: {speed_up:.2f}x (complete calls, prompts included)")
    console.print(f"same text: {'yes' if all(r['same_text'] for r in rows) else 'NO'}")
