"""`redrafter generate`: text for one prompt or a file of prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import AUTO, check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.engine.results import Finished


@dataclass(kw_only=True)
class GenerateOptions(opt.ShapeOptions, opt.SamplingOptions, opt.LoadingOptions):
    """Options of `redrafter generate`."""

    model: opt.Model
    drafter: opt.Drafter = AUTO
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Generate without drafting, for comparison.")] = False
    prompt: Annotated[str | None, typer.Option(help="One prompt, as plain text.")] = None
    prompts: Annotated[list[str] | None, typer.Option(metavar="FILE", help=opt.PROMPT_ROWS)] = None
    limit: opt.Limit = None
    chat: Annotated[bool, typer.Option("--chat", help="Treat a plain prompt as the user's message in a chat.")] = False
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 256
    batch_size: opt.BatchSize = 8
    settings: opt.Set = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per prompt.")] = False
    fast: opt.Fast = True
    compile: opt.Compile = False

    def check(self) -> None:
        """Raises RedrafterError for options that do not go together."""
        if (self.prompt is None) == (not self.prompts):
            raise RedrafterError("Give either --prompt or --prompts.")
        if self.limit is not None and not self.prompts:
            raise RedrafterError("--limit needs --prompts.")
        check_model_path(self.model)
        check_drafter_path(None if self.no_drafter else self.drafter)

    def generation_settings(self) -> dict[str, Any]:
        """What the options set of `generate`'s arguments.  Raises RedrafterError for a bad `--set`."""
        from redrafter.cli.parsing import read_settings

        names = ("max_new_tokens", "batch_size", "fast", "compile")
        values = {name: getattr(self, name) for name in names}
        return read_settings(self.settings, **opt.values_of(self, opt.ShapeOptions, opt.SamplingOptions), **values)


@command("Generate text")
def generate(options: GenerateOptions) -> None:
    """Generate text from one prompt or a file of prompts, with a drafter or without."""
    options.check()
    from redrafter.cli.loading import load_drafter, load_model, show_log, tokenized_prompts
    from redrafter.data.prompts import read_prompts
    from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
    from redrafter.engine.generate import stream
    from redrafter.engine.results import finished
    from redrafter.proposers import method_of
    from redrafter.proposers.base import resolved_shape

    if options.compile:
        show_log()
    settings = options.generation_settings()
    prompt = [("--prompt", {"prompt": options.prompt})]
    records = read_prompts(*options.prompts, limit=options.limit) if options.prompts else prompt
    ids = tokenized_prompts(records, options.model, options.template_kwargs, chat=options.chat)
    target, tokenizer = load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)
    drafter, positions = None, 0
    if not options.no_drafter:
        drafter = load_drafter(options.drafter, target, any_target=options.any_target)
        batch = min(options.batch_size, len(ids))
        positions = resolved_shape(method_of(drafter), batch, options.overrides()).depth
    settings = with_stop_strings(target, settings, tokenizer) | ONE_TEXT
    events = stream(target, drafter, ids, **settings)

    begin, tokens, steps = time.perf_counter(), 0, 0
    for row in _in_order(finished(events, rows=len(ids), positions=positions)):
        text = tokenizer.decode(row.new_tokens, skip_special_tokens=True)
        where, record = records[row.row]
        typer.echo(_json_line(row, text, where, record, options) if options.as_json else text)
        tokens, steps = tokens + row.stats.tokens, steps + row.stats.steps
    seconds = time.perf_counter() - begin
    typer.echo(
        f"{tokens} tokens, {tokens / max(1, steps):.2f} per step, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s",
        err=True,
    )


def _json_line(finished: Finished, text: str, where: str, record: dict[str, Any], options: GenerateOptions) -> str:
    """The prompt's row with its answer, in a format that `train` reads, and the counts of its generation."""
    from redrafter.cli.parsing import template_variables
    from redrafter.data.prompts import up_to_answer
    from redrafter.data.rows import Text, metadata, parse_row

    row = parse_row(record, where, chat=options.chat, template_kwargs=template_variables(options.template_kwargs))
    if isinstance(row, Text):
        columns: dict[str, Any] = {"prompt": row.prompt}
    else:
        row = up_to_answer(row, where)
        columns = row.columns([*row.messages, {"role": "assistant", "content": text}])
    stats = finished.stats
    counts = {
        "text": text,
        "finish_reason": finished.finish_reason,
        "tokens": stats.tokens,
        "steps": stats.steps,
        "tokens_per_step": round(stats.tokens_per_step, 4),
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "accepted_by_position": stats.accepted_by_position,
        "seconds": round(stats.seconds, 4),
    }
    return json.dumps({**metadata(record), **columns, **counts}, ensure_ascii=False)


def _in_order(rows: Iterable[Finished]) -> Iterator[Finished]:
    """Rows in the order of their prompts, each as soon as all rows before it have finished."""
    waiting: dict[int, Finished] = {}
    next_row = 0
    for row in rows:
        waiting[row.row] = row
        while next_row in waiting:
            yield waiting.pop(next_row)
            next_row += 1
