"""`redrafter generate`: text for one prompt or a file of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import (
    PROMPT_ROWS,
    AnyTarget,
    Budget,
    Compile,
    Device,
    DoSample,
    DrafterOrModel,
    Dtype,
    Fast,
    Length,
    Limit,
    MinP,
    Model,
    NewTokens,
    Seed,
    Set,
    Sources,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
    Width,
)
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.engine.results import Finished


def generate(
    model: Model,
    drafter: Annotated[str | None, typer.Option(help=DrafterOrModel)] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, as plain text.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(metavar="FILE", help=f"{PROMPT_ROWS} {Sources}")] = None,
    limit: Limit = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use plain prompts as the user's turn of a chat.")] = False,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 256,
    beam_width: Width = None,
    beam_length: Length = None,
    node_budget: Budget = None,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    more: Set = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    no_drafter: Annotated[bool, typer.Option("--no-drafter", help="Decode autoregressively, for comparison.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line for every prompt.")] = False,
    any_target: AnyTarget = False,
    fast: Fast = True,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Write a model's continuation of prompts, greedy or sampled, drafted unless told otherwise."""
    if (prompt is None) == (not prompts):
        raise RedrafterError("Give either --prompt or --prompts.")
    if limit is not None and not prompts:
        raise RedrafterError("--limit is for --prompts.")
    if drafter is None and not no_drafter:
        raise RedrafterError("Give a --drafter, or --no-drafter to decode without one.")
    check_model_path(model)
    check_drafter_path(None if no_drafter else drafter)

    from redrafter.cli.loading import (
        load_drafter,
        load_model,
        read_settings,
        show_log,
        template_variables,
        tokenized_prompts,
    )
    from redrafter.core.shapes import ShapeOverrides
    from redrafter.data.prompts import asked, read_prompts
    from redrafter.data.rows import Text, metadata, parse_row
    from redrafter.decoding.settings import ONE_TEXT, with_stop_strings
    from redrafter.engine.generate import stream
    from redrafter.engine.results import finished
    from redrafter.proposers import method_of
    from redrafter.proposers.base import resolved_shape

    if compile:
        show_log()
    settings = read_settings(
        more,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        beam_width=beam_width,
        beam_length=beam_length,
        node_budget=node_budget,
        fast=fast,
        compile=compile,
    )
    records = read_prompts(*prompts, limit=limit) if prompts else [("--prompt", {"prompt": prompt})]
    ids = tokenized_prompts(records, model, template_kwargs, chat=chat)
    variables = template_variables(template_kwargs)
    target, tokenizer = load_model(model, dtype, device)
    head = None if no_drafter or drafter is None else load_drafter(drafter, target, any_target=any_target)

    settings = with_stop_strings(target, settings, tokenizer) | ONE_TEXT
    shape = (beam_width, beam_length, node_budget)
    positions = 0
    if head is not None:
        rows = min(batch_size, len(ids))
        positions = resolved_shape(method_of(head), rows, ShapeOverrides(*shape)).beam_length
    events = stream(target, head, ids, **settings)

    begin, total = time.perf_counter(), [0, 0]
    for one in _in_order(finished(events, rows=len(ids), positions=positions)):
        where, record = records[one.row]
        stats, text = one.stats, tokenizer.decode(one.new_tokens, skip_special_tokens=True)
        total = [total[0] + stats.tokens, total[1] + stats.steps]
        if not as_json:
            typer.echo(text)
            continue
        row = parse_row(record, where, chat=chat, template_kwargs=variables)  # the line can be trained on as it is
        if isinstance(row, Text):
            read: dict[str, Any] = {"prompt": row.prompt}
        else:
            row = asked(row, where)
            read = row.columns([*row.messages, {"role": "assistant", "content": text}])
        typer.echo(
            json.dumps(
                {
                    **metadata(record),
                    **read,
                    "text": text,
                    "finish_reason": one.finish_reason,
                    "tokens": stats.tokens,
                    "steps": stats.steps,
                    "tokens_per_step": round(stats.tokens_per_step, 4),
                    "drafted": stats.drafted,
                    "accepted": stats.accepted,
                    "accepted_by_position": stats.accepted_by_position,
                    "seconds": round(stats.seconds, 4),
                },
                ensure_ascii=False,
            )
        )
    seconds = time.perf_counter() - begin
    typer.echo(
        f"{total[0]} tokens, {total[0] / max(1, total[1]):.2f} per step, {seconds:.1f} s, "
        f"{total[0] / seconds:.0f} tokens/s",
        err=True,
    )


def _in_order(rows: Iterable[Finished]) -> Iterator[Finished]:
    """Rows in the order of their prompts, each as soon as those before it have ended."""
    held: dict[int, Finished] = {}
    following = 0
    for one in rows:
        held[one.row] = one
        while following in held:
            yield held.pop(following)
            following += 1
