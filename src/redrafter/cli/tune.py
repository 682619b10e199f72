"""`redrafter tune`: measures the fastest draft shape for each batch size and stores it in the drafter's folder."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_drafter_folder, locked
from redrafter.utils.paths import check_drafter_path, check_model_path, may_be_on_the_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from redrafter.core.shapes import DraftShape
    from redrafter.evaluation.tuning import Tuned
    from redrafter.proposers import Drafter


@dataclass(kw_only=True)
class TuneOptions(opt.SamplingOptions, opt.LoadingOptions):
    """Options of `redrafter tune`."""

    model: opt.Model
    drafter: Annotated[str, typer.Option(help=f"{opt.DRAFTER}  These two need --dry-run.")]
    prompts: opt.Prompts
    output: Annotated[
        Path | None, typer.Option(help="Write a tuned copy of the drafter here, instead of changing its folder.")
    ] = None
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to tune for.")] = "1,2,4,8"
    widths: Annotated[str, typer.Option(help="Beam widths to try.")] = "1,2,4,10"
    lengths: Annotated[str, typer.Option(help="Beam lengths to try.")] = "2,3,4,5,6"
    budgets: Annotated[str, typer.Option(help="Node budgets to try, besides complete beams.")] = "8,16,32,64"
    limit: Annotated[int, typer.Option(min=1, help="Measure acceptance on the first N prompts.")] = 32
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 128
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens in the KV cache while parts of a step are timed.  \\[default: the texts' length]"
        ),
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Measurements per part of a step; the median is used.")] = 20
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the results and write nothing.")] = False
    compile: opt.Compile = False

    def shapes(self) -> tuple[list[int], list[DraftShape]]:
        """The batch sizes and the shapes to try.  Raises RedrafterError for a bad list."""
        from redrafter.cli.parsing import whole_numbers

        batches, widths, lengths, budgets = (
            whole_numbers(getattr(self, name), f"--{name.replace('_', '-')}")
            for name in ("batch_sizes", "widths", "lengths", "budgets")
        )
        self.check()
        from redrafter.evaluation import tuning

        return batches, tuning.shapes(widths, lengths, budgets)

    def check(self) -> None:
        """Raises RedrafterError for paths that cannot be read or written."""
        check_model_path(self.model)
        check_drafter_path(self.drafter)
        if not self.dry_run and self.output is None and may_be_on_the_hub(self.drafter):
            raise RedrafterError(f"{self.drafter} is not a local folder: give an --output for the tuned drafter.")
        if self.output is not None:
            check_drafter_folder(self.output, overwrite=False, inputs=[self.model, self.drafter, *self.prompts])


@command("Measure")
def tune(options: TuneOptions) -> None:
    """Find the fastest draft shape for each batch size and store it as the drafter's default.

    The decision rests on complete calls of `generate` with and without the drafter, alternating.  Drafting is turned on
    only if its gain exceeds the variation between calls.
    """
    batches, shapes = options.shapes()
    from redrafter.cli.loading import check_context, load_drafter, load_model, tokenized_prompts
    from redrafter.data.prompts import read_prompts
    from redrafter.evaluation import tuning
    from redrafter.proposers.loading import kind_of
    from redrafter.utils import hub

    folder = options.output or Path(options.drafter)
    if not options.dry_run:
        if kind_of(options.drafter) is None:
            raise RedrafterError(f"{options.drafter} has no drafter config to store shapes in: add --dry-run.")
        check_drafter_folder(folder, inputs=[options.model])
    with nullcontext() if options.dry_run else locked(folder):
        records = read_prompts(*options.prompts, limit=options.limit)
        ids = tokenized_prompts(records, options.model, options.template_kwargs)
        model, tokenizer = load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)
        check_context(options.context, model)
        drafter = load_drafter(options.drafter, model, any_target=options.any_target)
        tuned = _measure(options, model, tokenizer, drafter, ids, batches, shapes)
        _print_table(tuned)
        about = _conditions(options, model)
        if options.dry_run:
            typer.echo(f"Measured on {about}; nothing is written.")
            return
        folder = tuning.record(hub.fetch(options.drafter), [one.shape for one in tuned], about, options.output)
        typer.echo(f"Wrote the shapes to {folder}: {about}.")


def _measure(
    options: TuneOptions,
    model: PreTrainedModel,
    tokenizer: Any,
    drafter: Drafter,
    ids: list[list[int]],
    batches: list[int],
    shapes: list[DraftShape],
) -> list[Tuned]:
    """The fastest shape for each batch size that fits into memory.  Raises RedrafterError if none does."""
    from redrafter.cli.parsing import read_settings
    from redrafter.decoding.settings import with_stop_strings
    from redrafter.evaluation import tuning
    from redrafter.evaluation.profiling import StepProfiler
    from redrafter.proposers import method_of
    from redrafter.proposers.base import draftable
    from redrafter.targets.target import Target
    from redrafter.utils.progress import Progress, track

    method = method_of(drafter)
    candidates, rejected = draftable(method, Target(model, method.layers), shapes)
    if not candidates:
        raise RedrafterError(f"The drafter supports none of the shapes: {rejected[0]}")
    for message in rejected:
        typer.echo(f"not tried: {message}", err=True)
    candidates = [one.with_lookup(bool(method.shape(0).lookup)) for one in candidates]  # as `generate` drafts
    settings = read_settings(None, **opt.values_of(options, opt.SamplingOptions))
    settings = with_stop_strings(model, settings, tokenizer) | {"max_new_tokens": options.max_new_tokens}
    _print_estimate(tuning.estimate(model, ids, batches, compile=options.compile, **settings))
    with Progress("texts", len(ids)) as progress:
        texts = tuning.Texts.written(model, drafter, ids, on_row=progress.advance, **settings)
    length, nodes = options.context or texts.length, max(shape.max_nodes for shape in candidates)
    tokens_per_step = {shape: texts.tokens_per_step(shape) for shape in track(candidates, "shapes measured")}
    tuned: list[Tuned] = []
    failed: dict[int, RedrafterError] = {}
    for batch in track(batches, "batch sizes timed"):
        try:
            rows = texts.again(batch, length)
            profiler = StepProfiler(rows, method, nodes=nodes, repeats=options.repeats, compile=options.compile)
            finalists = tuning.promising(profiler, tokens_per_step)
            del profiler  # frees its cache
            speed = partial(texts.tokens_per_second, batch=batch, compile=options.compile)
            tuned.append(tuning.tune(finalists, tokens_per_step, speed))
        except RedrafterError as error:  # the other batch sizes may fit
            failed[batch] = error
    if not tuned:
        raise failed[batches[0]]
    for batch, reason in failed.items():
        typer.echo(f"not measured: batches of {batch}: {reason}", err=True)
    return tuned


def _conditions(options: TuneOptions, model: PreTrainedModel) -> str:
    """What the measurements depend on, for the drafter's config."""
    from redrafter.evaluation.profiling import device_name
    from redrafter.targets.target import Target

    dtype, mode = str(model.dtype).removeprefix("torch."), "sampled" if options.do_sample else "greedy"
    calls = f"complete calls of up to {options.max_new_tokens} tokens"
    compiled = ", compiled layers" if options.compile and Target(model).tree_kernels else ""
    return f"{device_name(model.device)}, {dtype}, {mode}, {calls}{compiled}"


def _print_estimate(seconds: float) -> None:
    from redrafter.core.shapes import counted

    minutes = seconds >= 90
    about = counted(round(seconds / 60), "minute") if minutes else counted(max(1, round(seconds)), "second")
    typer.echo(
        f"This takes at most about {about}.  To shorten it, give fewer --batch-sizes, fewer --max-new-tokens or a "
        "smaller --limit.",
        err=True,
    )


def _print_table(tuned: list[Tuned]) -> None:
    """The fastest shape of every batch size, its speed-up, and whether drafting is turned on."""
    from redrafter.cli.tables import print_figures
    from redrafter.evaluation.tuning import CONFIDENCE, PAIRS

    columns = ("batch", "fastest drafts", "tokens/step", "tokens/s", "undrafted", "speed-up", "interval", "drafting")
    rows = [
        (
            str(one.candidate.batch),
            one.candidate.with_lookup(False).description,
            f"{one.tokens_per_step:.2f}",
            f"{statistics.median(one.drafted):,.0f}",
            f"{statistics.median(one.undrafted):,.0f}",
            f"{one.speed_up:.2f}",
            "{:.2f} to {:.2f}".format(*one.interval),
            "on" if one.pays else "off",
        )
        for one in tuned
    ]
    print_figures(columns, rows, left=("fastest drafts", "drafting"))
    typer.echo(
        f"tokens/s: complete calls, prompts included; speed-up: median of {PAIRS} pairs of a drafted and an undrafted "
        f"call, with its {CONFIDENCE:.0%} interval"
    )
