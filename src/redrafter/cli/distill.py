"""`redrafter distill`: makes training rows from the target's own answers.

Heavy modules are imported inside functions, so that invalid options are reported at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from redrafter.cli.distill_options import (
    EndpointOptions,
    ModelOptions,
    ReadingOptions,
    RunOptions,
    SamplingOptions,
    ShapeOptions,
    check_options,
)
from redrafter.cli.loading import claim, config_value, load_drafter, load_model, load_tokenizer, read_settings, skipping
from redrafter.cli.options import command
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_rows_file
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from rich.console import Console

    from redrafter.data.files import Skip
    from redrafter.training.distillation import DistillProgress, Prompt, Work
    from redrafter.training.journal import Journal
    from redrafter.utils.progress import Progress


@command
def distill(
    context: typer.Context,
    run: RunOptions,
    model: ModelOptions,
    served: EndpointOptions,
    reading: ReadingOptions,
    sampling: SamplingOptions,
    shape: ShapeOptions,
) -> None:
    """Let the target answer prompts, for a drafter to learn from.

    Finished answers are saved during the run, and on Ctrl-C or SIGTERM (exit status 130 or 143).  `distill` resumes
    when you run the same command again; FILE.state beside the file records its progress.
    """
    check_rows_file(run.output, inputs=[model.model, model.drafter, reading.template, *run.files])
    check_options(reading, sampling, shape, model, served)
    check_model_path(model.model)
    check_drafter_path(model.drafter)
    claim(context, run.output, is_file=True)

    from rich.console import Console

    from redrafter.training.distillation import saved
    from redrafter.training.journal import Journal
    from redrafter.utils.interrupt import StoppedRun, interruptible

    if served.endpoint is not None:
        teacher = _endpoint_teacher(served, reading, sampling)
    elif model.continuations is not None:
        teacher = _continuation_teacher(model, reading)
    else:
        teacher = _model_teacher(model, reading, sampling, shape)
    journal = Journal(run.output, teacher.options, overwrite=run.overwrite)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with interruptible():
            summary = _run(console, run, teacher, journal)
    except KeyboardInterrupt as error:
        message = f"Interrupted; {saved(journal):,} finished rows are saved: run the same command again to continue."
        raise StoppedRun(message, error) from None
    console.print(summary)


@dataclass(frozen=True)
class _Teacher:
    """A source of training rows."""

    options: dict[str, Any]
    """Everything that the rows depend on, for the journal."""
    check: Callable[[Prompt], object]
    """Raises RedrafterError for a prompt row that it cannot use."""
    start: Callable[[int, DistillProgress, Skip | None], Work]
    """Loads what is needed to work on a number of prompts."""


def _recorded(reading: dict[str, Any]) -> dict[str, Any]:
    """Reading options for the journal; without template variables the value is None, as in older files."""
    return {**reading, "template_kwargs": reading["template_kwargs"] or None}


def _model_teacher(
    model: ModelOptions, reading: ReadingOptions, sampling: SamplingOptions, shape: ShapeOptions
) -> _Teacher:
    """Answers of a model in this process."""
    from redrafter.training.answers import ModelAnswers
    from redrafter.training.dialogues import check_prompt
    from redrafter.training.distillation import smallest

    assert model.model is not None
    path, config, arguments = model.model, sampling.config(), reading.arguments()
    free = {"batch_size": model.batch_size, **asdict(shape)}  # the text does not depend on these
    fixed = dict.fromkeys(("temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_length"))
    settings = read_settings(model.settings, **fixed, **free)
    if "do_sample" in settings:
        raise RedrafterError("--set do_sample: use --temperature, which may be repeated.")
    tokenizer = load_tokenizer(path, reading.template, arguments["template_kwargs"])

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        target, _ = load_model(path, model.dtype, model.device)
        drafter = None if model.drafter is None else load_drafter(model.drafter, target, any_target=model.any_target)
        more: dict[str, Any] = {"reading": arguments, "settings": settings, "progress": progress, "skip": skip}
        seeds = config.seeds(total)
        return ModelAnswers(target, tokenizer, drafter, config, seeds, model.chunk, model.max_length, **more)

    limit = smallest(model.max_length, config_value(path, "max_position_embeddings"))
    checked: dict[str, Any] = {"limit": limit, "vocab_size": config_value(path, "vocab_size"), **arguments}
    recorded = {"model": path, "dtype": model.dtype, "chat_template": tokenizer.chat_template}
    recorded |= {**_recorded(arguments), **asdict(config), "max_length": model.max_length}
    recorded["set"] = {name: value for name, value in settings.items() if name not in free}
    return _Teacher(recorded, lambda prompt: check_prompt(prompt, tokenizer, **checked), start)


def _continuation_teacher(model: ModelOptions, reading: ReadingOptions) -> _Teacher:
    """Continuations of given text by a model in this process."""
    from redrafter.data.examples import tokenized_rows
    from redrafter.training.continuations import continue_rows

    assert model.model is not None
    path, depth, variables = model.model, model.continuations, reading.arguments()["template_kwargs"]
    tokenizer = load_tokenizer(path, reading.template, variables)
    checked: dict[str, Any] = {"template_kwargs": variables, "vocab_size": config_value(path, "vocab_size")}

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        target, _ = load_model(path, model.dtype, model.device)
        sizes: dict[str, Any] = {"depth": depth, "chunk": model.chunk, "batch_size": model.batch_size}
        more = {"limit": model.max_length, "template_kwargs": variables, "progress": progress}
        return lambda prompts: continue_rows(prompts, target, tokenizer, **sizes, **more)

    recorded = {"model": path, "dtype": model.dtype, "chat_template": tokenizer.chat_template, "continuations": depth}
    recorded |= {"template_kwargs": variables or None, "max_length": model.max_length}
    return _Teacher(recorded, lambda prompt: tokenized_rows(prompt.record, tokenizer, prompt.where, **checked), start)


def _endpoint_teacher(served: EndpointOptions, reading: ReadingOptions, sampling: SamplingOptions) -> _Teacher:
    """Answers of a served model."""
    from redrafter.training.dialogues import plan_answers
    from redrafter.training.endpoint import Endpoint
    from redrafter.training.endpoint_answers import EndpointAnswers

    assert served.endpoint is not None
    assert served.endpoint_model is not None
    config, arguments, key = sampling.config(), reading.arguments(), os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(served.endpoint, served.endpoint_model, key, served.timeout, served.insecure_endpoint)

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        return EndpointAnswers(
            endpoint, config, config.seeds(total), served.concurrency, arguments, progress=progress, skip=skip
        )

    recorded = {"endpoint": endpoint.url, "model": endpoint.model, **_recorded(arguments), **asdict(config)}
    return _Teacher(recorded, lambda prompt: plan_answers(prompt.record, prompt.where, **arguments), start)


def _run(console: Console, run: RunOptions, teacher: _Teacher, journal: Journal) -> str:
    """Checks all rows, works on those that the file lacks, and returns a summary."""
    from redrafter.training.distillation import DistillProgress, distil, saved, survey

    progress = DistillProgress()
    with skipping(run.bad_rows) as skip:
        with console.status("Reading all rows …"):
            found = survey(run.sources, teacher.check, journal, limit=run.limit, skip=skip)
        if journal.done == found.total:
            return f"Nothing is left to do: {run.output} holds the results of all {found.total:,} rows."
        if journal.done or journal.ahead:
            console.print(f"Continuing after {saved(journal):,} of {found.total:,} rows.")
        work = teacher.start(found.total, progress, skip)
        saving: dict[str, Any] = {"save_seconds": run.save_seconds, "save_rows": run.save_rows}
        with _display(found.total, journal.done, progress) as display:
            for done in distil(run.sources, found, journal, work, limit=run.limit, progress=progress, **saving):
                display.update(done)
    counts = journal.counts
    steps = f", {counts['tokens'] / counts['steps']:.2f} per step" if counts["steps"] else ""
    cut = f"; {counts['cut']:,} of {counts['answers']:,} answers were cut at the limit" if counts["cut"] else ""
    return f"{counts['rows']:,} rows, {counts['tokens']:,} tokens{steps}{cut}. Wrote {run.output}."


def _display(total: int, done: int, progress: DistillProgress) -> Progress:
    """A display of finished rows, with the number of tokens and their rate."""
    from redrafter.utils.progress import Progress

    begin = time.monotonic()

    def details() -> str:
        speed = f"{progress.tokens:,} tokens, {progress.tokens / max(1e-9, time.monotonic() - begin):,.0f} tokens/s"
        return speed + (f", {progress.tokens / progress.steps:.2f} per step" if progress.steps else "")

    return Progress("rows", total, done=done, details=details, always=True)
