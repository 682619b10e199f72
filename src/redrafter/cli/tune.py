"""`redrafter tune`: the fastest drafts for each batch size, measured here and kept in the drafter's folder."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli.loading import (
    AnyTarget,
    Compile,
    Device,
    DoSample,
    DrafterOrModel,
    Dtype,
    MinP,
    Model,
    NewTokens,
    Prompts,
    Seed,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
)
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_drafter_folder
from redrafter.utils.paths import check_drafter_path, check_model_path, may_be_on_the_hub

if TYPE_CHECKING:
    from redrafter.evaluation.tuning import Tuned


def tune(
    ctx: typer.Context,
    model: Model,
    drafter: Annotated[str, typer.Option(help=f"{DrafterOrModel} The last two with --dry-run.")],
    prompts: Prompts,
    output: Annotated[Path | None, typer.Option(help="Write a copy of the drafter here, instead of into it.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together.")] = "1,2,4,8",
    widths: Annotated[str, typer.Option(help="Beams to try.")] = "1,2,4,10",
    lengths: Annotated[str, typer.Option(help="Tokens of a beam to try.")] = "2,3,4,5,6",
    budgets: Annotated[str, typer.Option(help="Budgets of nodes to try, beside whole beams.")] = "8,16,32,64",
    limit: Annotated[int, typer.Option(min=1, help="Measure acceptance on the first N prompts.")] = 32,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 128,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens in the cache while parts of a step are timed.  \\[default: as long as the texts are]"
        ),
    ] = None,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times to measure each part of a step; the median counts.")] = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is fastest, and write nothing.")] = False,
    any_target: AnyTarget = False,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Find the fastest drafts for each batch size; `generate` then uses them, unless it is given a shape.

    Complete calls of `generate` decide, drafted and undrafted in turn: drafting is switched on only where its gain
    exceeds their spread.
    """
    from redrafter.cli.loading import (
        check_context,
        claim,
        load_drafter,
        load_model,
        read_settings,
        tokenized_prompts,
        whole_numbers,
    )

    batches, beams = whole_numbers(batch_sizes, "--batch-sizes"), whole_numbers(widths, "--widths")
    depths, sizes = whole_numbers(lengths, "--lengths"), whole_numbers(budgets, "--budgets")

    check_model_path(model)
    check_drafter_path(drafter)
    if not dry_run and output is None and may_be_on_the_hub(drafter):
        raise RedrafterError(f"{drafter} is not a folder to write into: give an --output for the tuned drafter.")
    if output is not None:
        check_drafter_folder(output, overwrite=False, inputs=[model, drafter, *prompts])
    from redrafter.data.prompts import read_prompts
    from redrafter.decoding.settings import with_stop_strings
    from redrafter.evaluation import tuning
    from redrafter.evaluation.profiling import StepProfiler, device_name
    from redrafter.proposers import method_of
    from redrafter.proposers.base import draftable
    from redrafter.proposers.loading import kind_of
    from redrafter.targets.target import Target
    from redrafter.utils import hub
    from redrafter.utils.progress import Progress, track

    if not dry_run and kind_of(drafter) is None:
        raise RedrafterError(f"{drafter} has no config that shapes could be kept in: add --dry-run.")
    if not dry_run:
        check_drafter_folder(output or Path(drafter), inputs=[model])
        claim(ctx, output or Path(drafter))
    ids = tokenized_prompts(read_prompts(*prompts, limit=limit), model, template_kwargs)
    target, tokenizer = load_model(model, dtype, device)
    check_context(context, target)
    method = method_of(load_drafter(drafter, target, any_target=any_target))
    candidates, refused = draftable(method, Target(target, method.layers), tuning.shapes(beams, depths, sizes))
    if not candidates:
        raise RedrafterError(f"None of the shapes can be drafted: {refused[0]}")
    for sentence in refused:
        typer.echo(f"not tried: {sentence}", err=True)
    law = read_settings(
        None, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    law = with_stop_strings(target, law, tokenizer)
    _say_how_long(tuning.estimate(target, ids, batches, max_new_tokens=max_new_tokens, compile=compile, **law))
    with Progress("texts", len(ids)) as progress:
        texts = tuning.Texts.written(target, method, ids, on_row=progress.advance, max_new_tokens=max_new_tokens, **law)
    length, nodes = context or texts.length, max(shape.max_nodes for shape in candidates)
    writes = {shape: texts.tokens_per_step(shape) for shape in track(candidates, "shapes measured")}
    found: list[Tuned] = []
    unfit: dict[int, RedrafterError] = {}
    for batch in track(batches, "batch sizes timed"):
        try:
            rows = texts.again(batch, length)
            profiler = StepProfiler(rows, method, nodes=nodes, repeats=repeats, compile=compile)
            finalists = tuning.promising(profiler, writes)
            del profiler  # its cache
            speed = partial(texts.tokens_per_second, batch=batch, compile=compile)
            found.append(tuning.tune(finalists, writes, speed))
        except RedrafterError as error:  # what fits is still wanted
            unfit[batch] = error
    if not found:
        raise unfit[batches[0]]
    for batch, reason in unfit.items():
        typer.echo(f"not measured: batches of {batch}: {reason}", err=True)
    _table(found)
    kind = str(target.dtype).removeprefix("torch.")
    way = "sampled" if do_sample else "greedy"
    tuned_on = f"{device_name(target.device)}, {kind}, {way}, complete calls of up to {max_new_tokens} tokens"
    tuned_on += ", compiled layers" if compile and Target(target).tree_kernels else ""
    if dry_run:
        typer.echo(f"Measured on {tuned_on}; nothing is written.")
        return
    folder = tuning.record(hub.fetch(drafter), [one.shape for one in found], tuned_on, output)
    typer.echo(f"Wrote the shapes into {folder}: {tuned_on}.")


def _say_how_long(seconds: float) -> None:
    """Before anything is measured."""
    from redrafter.core.shapes import counted

    minutes = seconds >= 90
    about = counted(round(seconds / 60), "minute") if minutes else counted(max(1, round(seconds)), "second")
    typer.echo(
        f"This takes about {about} at most: less with fewer --batch-sizes or --max-new-tokens, or a smaller --limit.",
        err=True,
    )


def _table(found: list[Tuned]) -> None:
    """The fastest shape of every batch size, and whether it is kept."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from redrafter.evaluation.tuning import CONFIDENCE, PAIRS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch", justify="right")
    table.add_column("fastest drafts", no_wrap=True)
    for name in ("tokens/step", "tokens/s", "undrafted", "speed-up", "interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("drafting")
    for one in found:
        low, high = one.interval
        table.add_row(
            str(one.candidate.batch),
            one.candidate.description,
            f"{one.tokens_per_step:.2f}",
            f"{statistics.median(one.drafted):,.0f}",
            f"{statistics.median(one.undrafted):,.0f}",
            f"{one.speed_up:.2f}",
            f"{low:.2f} to {high:.2f}",
            "on" if one.pays else "off",
        )
    console = Console(highlight=False)
    console.width = max(console.width, 140)  # a narrow terminal wraps lines rather than loses figures
    console.print(table)
    console.print(
        f"tokens/s: complete calls, prompts included; speed-up: median of {PAIRS} pairs of a drafted and an undrafted "
        f"call, with its {CONFIDENCE:.0%} interval",
        soft_wrap=True,
    )
