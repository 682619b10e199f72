"""`redrafter distill`: rows to train on, of the target's own making."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import (
    AnyTarget,
    BadRows,
    Budget,
    Device,
    Dtype,
    Length,
    Limit,
    Prompts,
    Seed,
    Set,
    Template,
    TemplateKwargs,
    Width,
    claim,
    config_value,
    load_drafter,
    load_model,
    load_tokenizer,
    read_settings,
    skipping,
    template_variables,
)
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_rows_file
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.data.files import Skip
    from redrafter.training.answers import Law
    from redrafter.training.distillation import Done, Part, Prompt, Tally
    from redrafter.utils.progress import Progress

    Work = Callable[[Iterator[Prompt]], Iterator[Done | Part]]


def distill(
    context: typer.Context,
    prompts: Prompts,
    output: Annotated[Path, typer.Option(help="File of JSON lines to write, for `redrafter train --data`.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More of the same.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The target: a folder or hub id of a Hugging Face causal language model.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="A drafter for it, a folder or hub id: the same answers, sooner.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 is greedy.  May be repeated: every row is answered once at each.  \\[default: 0]"),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest that sum to P; greedy answers heed it not.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the K likeliest tokens; greedy answers heed it not.")
    ] = None,
    seed: Seed = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a whole conversation at most.  \\[default: the model's context]"),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use plain prompts as the user's turn of a chat.")] = False,
    template: Template = None,
    template_kwargs: TemplateKwargs = None,
    settings: Set = None,
    continuations: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="T",
            help="Answer nothing: after every token of true text write the target's T next ones, greedily (the paper's "
            "local distillation).  T is the tokens to draft and one more.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Ask an OpenAI-compatible server instead of --model; its key in OPENAI_API_KEY."
        ),
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(metavar="NAME", help="The model's name there.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to an endpoint at a time.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one answer of an endpoint.")] = 300.0,
    beam_width: Width = None,
    beam_length: Length = None,
    node_budget: Budget = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model works on together.")] = 32,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints; finished answers are saved at each.")
    ] = 30.0,
    save_rows: Annotated[
        int | None, typer.Option(min=1, help="Also save after each N finished rows.  \\[default: by time alone]")
    ] = None,
    limit: Limit = None,
    bad_rows: BadRows = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where the file holds rows.")] = False,
    insecure_endpoint: Annotated[
        bool,
        typer.Option("--insecure-endpoint", help="Send OPENAI_API_KEY unencrypted, to an http:// URL elsewhere."),
    ] = False,
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Let the target answer prompts, for a drafter to learn from.

    Finished answers are saved as the run goes on, and on Ctrl-C or SIGTERM (exit status 130 or 143).  Run the same
    command again to continue; FILE.state beside the file says how far it is.
    """
    sources = [*prompts, *(more or [])]
    files = [name for source in sources for name in (source, *glob.glob(source))]
    check_rows_file(output, inputs=[model, drafter, template, *files])
    if (model is None) == (endpoint is None):
        raise RedrafterError("Give either --model or --endpoint.")
    if (endpoint is None) != (endpoint_model is None):
        raise RedrafterError("--endpoint and --endpoint-model go together.")
    shape: dict[str, Any] = {"beam_width": beam_width, "beam_length": beam_length, "node_budget": node_budget}
    law: dict[str, Any] = {"top_p": top_p, "top_k": top_k, "seed": seed}
    if drafter is None:
        _refuse_idle("without --drafter", shape | {"any_target": any_target or None})
    if continuations is not None:
        _refuse_idle("with --continuations", {"temperature": temperature, **law, "set": settings, "drafter": drafter})
        _refuse_idle("with --continuations", {"chat": chat or None, "endpoint": endpoint})
    if endpoint is not None:
        own = {"drafter": drafter, "template": template, "set": settings, "max_length": max_length}
        _refuse_idle("with --endpoint", own)

    elif insecure_endpoint:
        raise RedrafterError("--insecure-endpoint means nothing without --endpoint.")
    check_model_path(model)
    check_drafter_path(drafter)
    claim(context, output, is_file=True)

    from redrafter.training.answers import Law

    drawn = Law(tuple(temperature or [0.0]), max_new_tokens=max_new_tokens, **law)
    chunk = 16 * batch_size
    reading: dict[str, Any] = {"chat": chat, "template_kwargs": template_variables(template_kwargs)}
    if endpoint is not None and endpoint_model is not None:
        way = _endpoint(endpoint, endpoint_model, drawn, reading, concurrency, timeout, insecure_endpoint)
    elif continuations is not None:
        assert model is not None
        variables = reading["template_kwargs"]
        way = _continuations(model, template, variables, continuations, chunk, batch_size, max_length, dtype, device)
    else:
        assert model is not None
        options = read_settings(
            settings,
            **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "max_new_tokens", "max_length")),
            batch_size=batch_size,
            **shape,
        )
        way = _target(model, drafter, template, drawn, reading, chunk, max_length, options, dtype, device, any_target)
    saving: dict[str, Any] = {"save_seconds": save_seconds, "save_rows": save_rows}
    _run(sources, output, way, limit=limit, bad_rows=bad_rows, overwrite=overwrite, saving=saving)


def _refuse_idle(when: str, options: dict[str, Any]) -> None:
    """Options that would go unheeded."""
    for name, value in options.items():
        if value is not None:
            raise RedrafterError(f"--{name.replace('_', '-')} means nothing {when}.")


@dataclass(frozen=True)
class _Way:
    """One of the ways to make rows."""

    told: dict[str, Any]
    """All that the rows depend on."""
    check: Callable[[Prompt], object]
    """Raises RedrafterError for a row that is not one of this way's."""
    start: Callable[[int, Tally, Skip | None], Work]
    """Loads what it takes to work on so many rows."""


def _target(
    model: str,
    drafter: str | None,
    template: Path | None,
    law: Law,
    reading: dict[str, Any],
    chunk: int,
    max_length: int | None,
    options: dict[str, Any],
    dtype: str,
    device: str,
    any_target: bool,
) -> _Way:
    from redrafter.training.answers import by_target, check_prompt
    from redrafter.training.distillation import least

    if "do_sample" in options:
        raise RedrafterError("--set do_sample: use --temperature, which may be repeated.")
    tokenizer = load_tokenizer(model, template, reading["template_kwargs"])
    free = ("batch_size", "beam_width", "beam_length", "node_budget")  # on which no text depends
    told = {"model": model, "dtype": dtype, "chat_template": tokenizer.chat_template, **_told(reading), **asdict(law)}
    told |= {"max_length": max_length, "set": {name: options[name] for name in options if name not in free}}

    def start(total: int, tally: Tally, skip: Skip | None) -> Work:
        target, _ = load_model(model, dtype, device)
        head = None if drafter is None else load_drafter(drafter, target, any_target=any_target)
        more: dict[str, Any] = {"limit": max_length, **reading, "tally": tally, "skip": skip, **options}
        return lambda rows: by_target(rows, target, tokenizer, head, law, seeds=law.seeds(total), chunk=chunk, **more)

    shortest = least(max_length, config_value(model, "max_position_embeddings"))
    vocabulary = config_value(model, "vocab_size")

    def check(prompt: Prompt) -> None:
        check_prompt(prompt, tokenizer, shortest, vocab_size=vocabulary, **reading)

    return _Way(told, check, start)


def _continuations(
    model: str,
    template: Path | None,
    variables: dict[str, Any],
    depth: int,
    chunk: int,
    batch_size: int,
    max_length: int | None,
    dtype: str,
    device: str,
) -> _Way:
    from redrafter.data.examples import tokenized_rows
    from redrafter.training.distillation import by_continuation

    tokenizer = load_tokenizer(model, template, variables)
    told = {"model": model, "dtype": dtype, "chat_template": tokenizer.chat_template, "continuations": depth}
    told |= {"template_kwargs": variables or None}
    vocabulary = config_value(model, "vocab_size")

    def start(total: int, tally: Tally, skip: Skip | None) -> Work:
        target, _ = load_model(model, dtype, device)
        sizes: dict[str, Any] = {"depth": depth, "chunk": chunk, "batch_size": batch_size, "limit": max_length}
        sizes["template_kwargs"] = variables
        return lambda rows: by_continuation(rows, target, tokenizer, tally=tally, **sizes)

    def check(prompt: Prompt) -> object:
        record, where = prompt.record, prompt.where
        return tokenized_rows(record, tokenizer, where, template_kwargs=variables, vocab_size=vocabulary)

    return _Way({**told, "max_length": max_length}, check, start)


def _endpoint(
    url: str, name: str, law: Law, reading: dict[str, Any], concurrency: int, timeout: float, insecure: bool
) -> _Way:
    from redrafter.training.answers import plan
    from redrafter.training.endpoint import Endpoint, by_endpoint

    endpoint = Endpoint(url, name, os.environ.get("OPENAI_API_KEY"), timeout, insecure)

    def start(total: int, tally: Tally, skip: Skip | None) -> Work:
        more: dict[str, Any] = {"concurrency": concurrency, **reading, "tally": tally, "skip": skip}
        return lambda rows: by_endpoint(rows, endpoint, law, seeds=law.seeds(total), **more)

    told = {"endpoint": endpoint.url, "model": name, **_told(reading), **asdict(law)}
    return _Way(told, lambda prompt: plan(prompt.record, prompt.where, **reading), start)


def _told(reading: dict[str, Any]) -> dict[str, Any]:
    """How rows are read, for the journal; one that was written before there were template variables has none."""
    return {**reading, "template_kwargs": reading["template_kwargs"] or None}


def _run(
    sources: list[str],
    output: Path,
    way: _Way,
    *,
    limit: int | None,
    bad_rows: str,
    overwrite: bool,
    saving: dict[str, Any],
) -> None:
    """Looks at all rows, then works on those that the file lacks, and says how far it is."""
    from rich.console import Console

    from redrafter.training.distillation import Tally, distil, saved, survey
    from redrafter.training.journal import Journal
    from redrafter.utils.interrupt import StoppedRun, interruptible

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    journal = Journal(output, way.told, overwrite=overwrite)
    tally = Tally()
    try:
        with interruptible(), skipping(bad_rows) as skip:
            with console.status("Looking at all rows …"):
                found = survey(sources, way.check, journal, limit=limit, skip=skip)
            if journal.done == found.total:
                console.print(f"Nothing is left to do: {output} holds what came of all {found.total:,} rows.")
                return
            if journal.done or journal.ahead:
                console.print(f"Going on after {saved(journal):,} of {found.total:,} rows.")
            work = way.start(found.total, tally, skip)
            with _progress(found.total, journal.done, tally) as progress:
                for finished in distil(sources, found, journal, work, limit=limit, tally=tally, **saving):
                    progress.update(finished)
    except KeyboardInterrupt as error:
        sentence = f"Interrupted; {saved(journal):,} finished rows are saved"
        raise StoppedRun(f"{sentence}: run the same command again to continue.", error) from None
    counts = journal.counts
    steps = f", {counts['tokens'] / counts['steps']:.2f} per step" if counts["steps"] else ""
    cut = f"; {counts['cut']:,} of {counts['answers']:,} answers were cut short" if counts["cut"] else ""
    console.print(f"{counts['rows']:,} rows, {counts['tokens']:,} tokens{steps}{cut}. Wrote {output}.")


def _progress(total: int, done: int, tally: Tally) -> Progress:
    """Rows, with the tokens written so far and their rate."""
    from redrafter.utils.progress import Progress

    begin = time.monotonic()

    def figures() -> str:
        speed = f"{tally.tokens:,} tokens, {tally.tokens / max(1e-9, time.monotonic() - begin):,.0f} tokens/s"
        return speed + (f", {tally.tokens / tally.steps:.2f} per step" if tally.steps else "")

    return Progress("rows", total, done=done, details=figures, always=True)
