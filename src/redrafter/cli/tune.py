"""`redrafter tune`: the fastest drafts for each batch size, measured here and kept in the drafter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli.loading import (
    Compile,
    Device,
    DoSample,
    DrafterOrModel,
    Dtype,
    MinP,
    Model,
    NewTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from redrafter.tuning import Tuned


def tune(
    model: Model,
    drafter: Annotated[str, typer.Option(help=f"{DrafterOrModel} The last two with --dry-run.")],
    prompts: Annotated[Path, typer.Option(help="JSONL rows of `prompt`, `messages` or `turns`.")],
    output: Annotated[Path | None, typer.Option(help="Write a copy of the drafter here, instead of into it.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together.")] = "1,2,4,8",
    widths: Annotated[str, typer.Option(help="Beams to try.")] = "1,2,4,10",
    lengths: Annotated[str, typer.Option(help="Tokens of a beam to try.")] = "2,3,4,5,6",
    budgets: Annotated[str, typer.Option(help="Budgets of nodes to try, beside whole beams.")] = "8,16,32,64",
    limit: Annotated[int, typer.Option(min=1, help="Measure acceptance on the first N prompts.")] = 32,
    max_new_tokens: NewTokens = 128,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the cache while timing.  \\[default: as long as the texts are]")
    ] = None,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times to measure each; the median counts.")] = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is fastest, and write nothing.")] = False,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Find the fastest drafts for each batch size; `generate` then takes them, unless told a shape."""
    from redrafter.cli.loading import check_context, check_output, load_method, load_model, read_settings, whole_numbers

    batches, beams = whole_numbers(batch_sizes, "--batch-sizes"), whole_numbers(widths, "--widths")
    depths, sizes = whole_numbers(lengths, "--lengths"), whole_numbers(budgets, "--budgets")

    from redrafter import hub, tuning
    from redrafter.profiling import Bench, device_name
    from redrafter.progress import Progress, track
    from redrafter.prompts import prompt_ids, read_prompts
    from redrafter.proposers.base import draftable
    from redrafter.proposers.loading import kind_of
    from redrafter.target import Target

    if not dry_run and output is None and hub.may_be_on_the_hub(drafter):
        raise RedrafterError(f"{drafter} is not a folder to write into: give an --output for the tuned drafter.")
    if not dry_run and kind_of(drafter) is None:
        raise RedrafterError(f"{drafter} has no config that shapes could be kept in: add --dry-run.")
    if output is not None:
        check_output(output)
    records = read_prompts(prompts)[:limit]
    target, tokenizer = load_model(model, dtype, device)
    check_context(context, target)
    method = load_method(drafter, target)
    candidates, refused = draftable(method, Target(target, method.layers), tuning.shapes(beams, depths, sizes))
    if not candidates:
        raise RedrafterError(f"None of the shapes can be drafted: {refused[0]}")
    for sentence in refused:
        typer.echo(f"not tried: {sentence}", err=True)
    law = read_settings(
        None, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    ids = [prompt_ids(record, tokenizer, where) for where, record in records]
    with Progress("texts", len(ids)) as progress:
        texts = tuning.Texts.written(target, method, ids, on_row=progress.advance, max_new_tokens=max_new_tokens, **law)
    length = context or texts.length
    writes = {shape: texts.tokens_per_step(shape) for shape in track(candidates, "shapes measured")}
    found: list[Tuned] = []
    unfit: dict[int, RedrafterError] = {}
    for batch in track(batches, "batch sizes timed"):
        try:
            bench = Bench.of(texts.again(batch, length), method, candidates, repeats=repeats, compile=compile)
            found.append(tuning.tune(bench, writes))
        except RedrafterError as error:  # what fits is still wanted
            unfit[batch] = error
    if not found:
        raise unfit[batches[0]]
    for batch, reason in unfit.items():
        typer.echo(f"not measured: batches of {batch}: {reason}", err=True)
    _table(found)
    kind = str(target.dtype).removeprefix("torch.")
    way = "sampled" if do_sample else "greedy"
    tuned_on = f"{device_name(target.device)}, {kind}, {way}, {length} tokens of context"
    tuned_on += ", compiled layers" if compile and Target(target).packs else ""
    if dry_run:
        typer.echo(f"Measured on {tuned_on}; nothing is written.")
        return
    folder = tuning.record(hub.fetch(drafter), [one.best.shape for one in found], tuned_on, output)
    typer.echo(f"Wrote the shapes into {folder}: {tuned_on}.")


def _table(found: list[Tuned]) -> None:
    """The fastest shape of every batch size."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch", justify="right")
    table.add_column("shape", no_wrap=True)
    for name in ("tokens/step", "ms/step", "tokens/s", "x autoregressive"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        best = one.best
        table.add_row(
            str(best.shape.batch),
            best.shape.in_words,
            f"{best.tokens_per_step:.2f}",
            f"{best.milliseconds:.3f}",
            f"{best.tokens_per_second:,.0f}",
            f"{one.speed_up:.2f}",
        )
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a narrow terminal wraps lines rather than loses figures
    console.print(table)
