"""`redrafter demo`: compares a model with and without its drafter on this machine, by default the bundled pair."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import AUTO, check_drafter_path, check_model_path

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


@dataclass(kw_only=True)
class DemoOptions(opt.ShapeOptions, opt.LoadingOptions):
    """Options of `redrafter demo`."""

    model: Annotated[str | None, typer.Option(help=f"{opt.MODEL}  \\[default: the bundled model, on the CPU]")] = None
    drafter: Annotated[
        str | None, typer.Option(help=f"{opt.DRAFTER}  \\[default: the bundled drafter; with --model: auto]")
    ] = None
    prompt: Annotated[
        list[str] | None, typer.Option(help="Your own prompt instead of the built-in ones; may be repeated.")
    ] = None
    max_new_tokens: opt.NewTokens = 96
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed calls per prompt, each with and without the drafter; medians are shown.")
    ] = 3
    as_json: opt.AsJson = False

    def check(self) -> None:
        """Raises RedrafterError for options that do not go together."""
        if self.model is None and self.drafter is not None:
            raise RedrafterError("--drafter needs a --model.")
        check_model_path(self.model)
        check_drafter_path(self.drafter)


@command("Generate text")
def demo(options: DemoOptions) -> None:
    """Generate with a model, with and without its drafter: the same text, sooner.

    Times and speed-ups are end to end: complete calls of `generate`, prompts included.
    """
    from rich.console import Console

    from redrafter.cli.loading import demo_folder, load_drafter, load_model
    from redrafter.data.prompts import prompt_ids
    from redrafter.proposers import method_of
    from redrafter.proposers.base import resolved_shape

    options.check()
    loading: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "dequantize": options.dequantize}
    if options.model is None:
        bundled = demo_folder()
        model, tokenizer = load_model(str(bundled / "redrafter-demo-12m"), **loading | {"device": "cpu"})
        drafter = load_drafter(str(bundled / "drafter"), model)
    else:
        model, tokenizer = load_model(options.model, **loading)
        drafter = load_drafter(options.drafter or AUTO, model, any_target=options.any_target)
    pair = _Pair(model, tokenizer, drafter, options)
    console = Console(highlight=False)
    if not options.as_json:
        console.print("[green]Green[/green]: drafted and accepted; plain: chosen by the model itself.")
    rows, accepted = [], [0] * resolved_shape(method_of(pair.drafter), 1, options.overrides()).depth
    for text in options.prompt or PROMPTS:
        ids = prompt_ids({"messages": [{"role": "user", "content": text}]}, tokenizer, "--prompt")
        if not options.as_json:
            pair.show(console, text, ids)
        row, stats = pair.measure(text, ids)
        rows.append(row)
        accepted = [a + b for a, b in zip(accepted, stats.accepted_by_position, strict=True)]
    speed_up = statistics.median(row["seconds_autoregressive"] / row["seconds_drafted"] for row in rows)
    if options.as_json:
        typer.echo(json.dumps({"prompts": rows, "median_speedup": round(speed_up, 4)}, ensure_ascii=False))
    else:
        _print_table(rows, accepted, speed_up)
    if not all(row["same_text"] for row in rows):
        if pair.rounds:
            typer.echo(
                f"In {str(model.dtype).removeprefix('torch.')} texts may differ where two tokens are nearly tied.",
                err=True,
            )
        else:
            raise typer.Exit(1)


class _Pair:
    """A model and its drafter, with the settings of `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter: Drafter,
        options: DemoOptions,
    ):
        self.model, self.tokenizer, self.drafter, self.repeats = model, tokenizer, drafter, options.repeats
        self.settings: dict[str, Any] = opt.values_of(options, opt.ShapeOptions)
        self.settings["max_new_tokens"] = options.max_new_tokens

    @property
    def rounds(self) -> bool:
        """Whether the model computes in less than float32."""
        return bool(self.model.dtype.itemsize < 4)

    def show(self, console: Console, text: str, ids: list[int]) -> None:
        """Streams the answer, with accepted draft tokens in green."""
        from rich.text import Text

        from redrafter.engine.generate import stream
        from redrafter.engine.text import Detokenizer

        console.print(Text(f"\n> {text}", style="bold"), soft_wrap=True)
        pieces = Detokenizer(self.tokenizer)
        for event in stream(self.model, self.drafter, [ids], **self.settings):
            for index, token in enumerate(event.tokens):
                style = "green" if index < event.accepted else ""
                console.print(Text(pieces.push(token), style=style), end="", soft_wrap=True)
        console.print(Text(pieces.rest()), soft_wrap=True)

    def measure(self, text: str, ids: list[int]) -> tuple[dict[str, Any], Stats]:
        """Times complete calls of `generate` with and without the drafter.

        The two alternate, so that a machine whose speed drifts favours neither.  The first round only warms up.
        """
        from redrafter.engine.generate import generate

        seconds: dict[bool, list[float]] = {False: [], True: []}
        outputs = {}
        for _ in range(1 + self.repeats):
            for drafted in (False, True):
                begin = time.perf_counter()
                outputs[drafted] = generate(self.model, self.drafter if drafted else None, [ids], **self.settings)
                seconds[drafted].append(time.perf_counter() - begin)
        new, stats = outputs[True].new_tokens[0], outputs[True].stats
        row = {
            "prompt": text,
            "text": self.tokenizer.decode(new, skip_special_tokens=True),
            "same_text": new == outputs[False].new_tokens[0],
            "tokens": stats.tokens,
            "steps": stats.steps,
            "tokens_per_step": round(stats.tokens_per_step, 4),
            "seconds_autoregressive": round(statistics.median(seconds[False][1:]), 5),
            "seconds_drafted": round(statistics.median(seconds[True][1:]), 5),
        }
        return row, stats


def _print_table(rows: list[dict[str, Any]], accepted: list[int], speed_up: float) -> None:
    from redrafter.cli.tables import print_figures

    cells = []
    for row in rows:
        undrafted, drafted = row["seconds_autoregressive"], row["seconds_drafted"]
        prompt = row["prompt"] if len(row["prompt"]) <= 20 else row["prompt"][:19] + "…"
        times = (f"{undrafted:.2f} s", f"{drafted:.2f} s", f"{undrafted / drafted:.2f}x")
        same = "yes" if row["same_text"] else "NO"
        cells.append((prompt, str(row["tokens"]), f"{row['tokens_per_step']:.2f}", *times, same))
    columns = ("prompt", "tokens", "tokens/step", "undrafted", "drafted", "speed-up", "same")
    print_figures(columns, cells, left=("prompt", "same"))
    tokens, steps = sum(row["tokens"] for row in rows), sum(row["steps"] for row in rows)
    shares = ", ".join(f"{count / max(1, steps):.0%}" for count in accepted)
    typer.echo(f"tokens per step: {tokens / steps:.2f}")
    typer.echo(f"drafts accepted at positions 1 to {len(accepted)}: {shares}")
    typer.echo(f"median end-to-end speed-up on this machine: {speed_up:.2f}x (complete calls, prompts included)")
    typer.echo(f"same text: {'yes' if all(row['same_text'] for row in rows) else 'NO'}")
