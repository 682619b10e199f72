"""`redrafter distill`: makes training rows from the target's own answers.

Heavy modules are imported inside functions, so that invalid options are reported at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.cli.distill_options import DistillOptions
from redrafter.cli.loading import config_value, load_drafter, load_model, load_tokenizer
from redrafter.cli.parsing import read_settings, skipping
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_rows_file, locked
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from rich.console import Console

    from redrafter.data.files import Skip
    from redrafter.training.distillation import DistillProgress, Prompt, Work
    from redrafter.utils.journal import Journal
    from redrafter.utils.progress import Progress


@command("Train a drafter")
def distill(options: DistillOptions) -> None:
    """Let the target answer prompts, for a drafter to learn from.

    Finished answers are saved during the run, and on Ctrl-C or SIGTERM (exit status 130 or 143).  `distill` resumes
    when you run the same command again; FILE.state beside the file records its progress.
    """
    check_rows_file(options.output, inputs=[options.model, options.drafter, options.template, *options.files])
    options.check()
    check_model_path(options.model)
    check_drafter_path(options.drafter)
    with locked(options.output, is_file=True):
        _distill(options)


def _distill(options: DistillOptions) -> None:
    from rich.console import Console

    from redrafter.training.distillation import saved
    from redrafter.utils.interrupt import StoppedRun, interruptible
    from redrafter.utils.journal import Journal

    if options.endpoint is not None:
        teacher = _endpoint_teacher(options)
    elif options.continuations is not None:
        teacher = _continuation_teacher(options)
    else:
        teacher = _model_teacher(options)
    journal = Journal(options.output, teacher.options, overwrite=options.overwrite)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with interruptible():
            summary = _run(console, options, teacher, journal)
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


def _model_teacher(options: DistillOptions) -> _Teacher:
    """Answers of a model in this process."""
    from redrafter.training.answers import ModelAnswers
    from redrafter.training.dialogues import check_prompt
    from redrafter.training.distillation import smallest

    assert options.model is not None
    path, sampling, reading = options.model, options.sampling(), options.reading()
    free = {
        "batch_size": options.batch_size,
        **opt.values_of(options, opt.ShapeOptions),
    }  # the text does not depend on these
    fixed = dict.fromkeys(("temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_length"))
    settings = read_settings(options.settings, **fixed, **free)
    if "do_sample" in settings:
        raise RedrafterError("--set do_sample: use --temperature, which may be repeated.")
    tokenizer = load_tokenizer(path, options.template, reading["template_kwargs"])

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        target, _ = load_model(path, options.dtype, options.device, dequantize=options.dequantize)
        drafter = (
            None if options.drafter is None else load_drafter(options.drafter, target, any_target=options.any_target)
        )
        more: dict[str, Any] = {"reading": reading, "settings": settings, "progress": progress, "skip": skip}
        seeds = sampling.seeds(total)
        return ModelAnswers(target, tokenizer, drafter, sampling, seeds, options.chunk, options.max_length, **more)

    limit = smallest(options.max_length, config_value(path, "max_position_embeddings"))
    checked: dict[str, Any] = {"limit": limit, "vocab_size": config_value(path, "vocab_size"), **reading}
    recorded = {"model": path, "dtype": options.dtype, "chat_template": tokenizer.chat_template}
    recorded |= {**_recorded(reading), **asdict(sampling), "max_length": options.max_length}
    recorded["set"] = {name: value for name, value in settings.items() if name not in free}
    return _Teacher(recorded, lambda prompt: check_prompt(prompt, tokenizer, **checked), start)


def _continuation_teacher(options: DistillOptions) -> _Teacher:
    """Continuations of given text by a model in this process."""
    from redrafter.data.examples import tokenized_rows
    from redrafter.training.continuations import continue_rows

    assert options.model is not None
    path, depth, variables = options.model, options.continuations, options.reading()["template_kwargs"]
    tokenizer = load_tokenizer(path, options.template, variables)
    checked: dict[str, Any] = {"template_kwargs": variables, "vocab_size": config_value(path, "vocab_size")}

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        target, _ = load_model(path, options.dtype, options.device, dequantize=options.dequantize)
        sizes: dict[str, Any] = {"depth": depth, "chunk": options.chunk, "batch_size": options.batch_size}
        more = {"limit": options.max_length, "template_kwargs": variables, "progress": progress}
        return lambda prompts: continue_rows(prompts, target, tokenizer, **sizes, **more)

    recorded = {"model": path, "dtype": options.dtype, "chat_template": tokenizer.chat_template, "continuations": depth}
    recorded |= {"template_kwargs": variables or None, "max_length": options.max_length}
    return _Teacher(recorded, lambda prompt: tokenized_rows(prompt.record, tokenizer, prompt.where, **checked), start)


def _endpoint_teacher(options: DistillOptions) -> _Teacher:
    """Answers of a served model."""
    from redrafter.training.dialogues import plan_answers
    from redrafter.training.endpoint import Endpoint
    from redrafter.training.endpoint_answers import EndpointAnswers

    assert options.endpoint is not None
    assert options.endpoint_model is not None
    sampling, reading, key = options.sampling(), options.reading(), os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(options.endpoint, options.endpoint_model, key, options.timeout, options.insecure_endpoint)

    def start(total: int, progress: DistillProgress, skip: Skip | None) -> Work:
        return EndpointAnswers(
            endpoint, sampling, sampling.seeds(total), options.concurrency, reading, progress=progress, skip=skip
        )

    recorded = {"endpoint": endpoint.url, "model": endpoint.model, **_recorded(reading), **asdict(sampling)}
    return _Teacher(recorded, lambda prompt: plan_answers(prompt.record, prompt.where, **reading), start)


def _run(console: Console, options: DistillOptions, teacher: _Teacher, journal: Journal) -> str:
    """Checks all rows, works on those that the file lacks, and returns a summary."""
    from redrafter.training.distillation import DistillProgress, distil, saved, survey

    progress = DistillProgress()
    with skipping(options.bad_rows) as skip:
        with console.status("Reading all rows …"):
            found = survey(options.sources, teacher.check, journal, limit=options.limit, skip=skip)
        if journal.done == found.total:
            return f"Nothing is left to do: {options.output} holds the results of all {found.total:,} rows."
        if journal.done or journal.ahead:
            console.print(f"Continuing after {saved(journal):,} of {found.total:,} rows.")
        work = teacher.start(found.total, progress, skip)
        saving: dict[str, Any] = {"save_seconds": options.save_seconds, "save_rows": options.save_rows}
        with _display(found.total, journal.done, progress) as display:
            for done in distil(options.sources, found, journal, work, limit=options.limit, progress=progress, **saving):
                display.update(done)
    counts = journal.counts
    steps = f", {counts['tokens'] / counts['steps']:.2f} per step" if counts["steps"] else ""
    cut = f"; {counts['cut']:,} of {counts['answers']:,} answers were cut at the limit" if counts["cut"] else ""
    return f"{counts['rows']:,} rows, {counts['tokens']:,} tokens{steps}{cut}. Wrote {options.output}."


def _display(total: int, done: int, progress: DistillProgress) -> Progress:
    """A display of finished rows, with the number of tokens and their rate."""
    from redrafter.utils.progress import Progress

    begin = time.monotonic()

    def details() -> str:
        speed = f"{progress.tokens:,} tokens, {progress.tokens / max(1e-9, time.monotonic() - begin):,.0f} tokens/s"
        return speed + (f", {progress.tokens / progress.steps:.2f} per step" if progress.steps else "")

    return Progress("rows", total, done=done, details=details, always=True)
