"""`redrafter eval`: how far a drafter's drafts are accepted, greedy and sampled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import (
    PROMPT_ROWS,
    AnyTarget,
    Budget,
    Device,
    DrafterOrModel,
    Dtype,
    Length,
    Limit,
    Model,
    NewTokens,
    Sources,
    TemplateKwargs,
    Width,
)
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.evaluation.acceptance import Acceptance, Measured

FIGURES = ("decoding", "walked", "teacher_forced")


def evaluate(
    model: Model,
    drafter: Annotated[str, typer.Option(help=DrafterOrModel)],
    prompts: Annotated[list[str], typer.Option("--prompts", "--data", metavar="FILE", help=f"{PROMPT_ROWS} {Sources}")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More of the same.")] = None,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 128,
    beam_width: Width = None,
    beam_length: Length = None,
    node_budget: Budget = None,
    temperature: Annotated[float, typer.Option(help="Of the law, where sampled.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    limit: Limit = None,
    by: Annotated[str | None, typer.Option(metavar="KEY", help="Also by the rows' values of this key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Count how far drafts are accepted: in decoding, the same walked over the texts, and at every place of them."""
    check_model_path(model)
    check_drafter_path(drafter)
    from redrafter.cli.loading import load_drafter, load_model, tokenized_prompts
    from redrafter.data.prompts import read_prompts
    from redrafter.evaluation.acceptance import Measured
    from redrafter.evaluation.acceptance import evaluate as measure
    from redrafter.utils.progress import Progress

    records = read_prompts(*prompts, *(more or []), limit=limit)
    groups = {} if by is None else _grouped(records, by)
    ids = tokenized_prompts(records, model, template_kwargs)
    target, tokenizer = load_model(model, dtype, device)
    head = load_drafter(drafter, target, any_target=any_target)
    with Progress("texts", 2 * len(ids)) as progress:
        found = measure(
            target,
            head,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            beam_width=beam_width,
            beam_length=beam_length,
            node_budget=node_budget,
            tokenizer=tokenizer,
            on_row=progress.advance,
        )
    otherwise = {way: sum(one.walked != one.decoding for one in texts) for way, texts in found.items()}
    whole = {way: Measured.total(texts) for way, texts in found.items()}
    parts = {
        name: {way: Measured.total([texts[row] for row in rows]) for way, texts in found.items()}
        for name, rows in groups.items()
    }
    if as_json:
        record = {"prompts": len(records), "temperature": temperature, "seed": seed, **_plain(whole)}
        record |= {"walked_otherwise": otherwise}
        if by is not None:
            record["by"] = {by: {name: {"prompts": len(groups[name]), **_plain(part)} for name, part in parts.items()}}
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        for name, part in parts.items():
            _table(f"{by} {name}: {len(groups[name])} prompts", part)
        _table(f"{len(records)} prompts", whole)
    precise = str(target.dtype).removeprefix("torch.")
    for way, count in otherwise.items():
        if count:
            reason = "only scores that are all but equal explain" if precise == "float32" else "rounding may explain"
            typer.echo(
                f"{way}: {count} of {len(records)} texts walk otherwise than they were decoded; in {precise} {reason} "
                "that.",
                err=as_json,
            )


def _grouped(records: list[tuple[str, dict[str, Any]]], by: str) -> dict[str, list[int]]:
    """The rows that hold each value of a key."""
    groups: dict[str, list[int]] = {}
    for row, (where, record) in enumerate(records):
        if by not in record:
            raise RedrafterError(f'{where}: --by {by}: the row has no "{by}".')
        groups.setdefault(str(record[by]), []).append(row)
    return groups


def _plain(measured: dict[str, Measured]) -> dict[str, Any]:
    """For JSON."""

    def counts(one: Acceptance) -> dict[str, Any]:
        return {
            "drafts": one.drafts,
            "draft_tokens": one.draft_tokens,
            "accepted_tokens": one.accepted,
            "mean_acceptance_length": round(one.mean_acceptance_length, 4),
            "accepted_by_position": one.by_position,
            "acceptance_by_position": [round(rate, 4) for rate in one.rates],
        }

    return {
        way: {"tokens": one.tokens} | {name: counts(getattr(one, name)) for name in FIGURES}
        for way, one in measured.items()
    }


def _table(title: str, measured: dict[str, Measured]) -> None:
    """Each way of choosing tokens with its three figures."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    positions = len(next(iter(measured.values())).decoding.by_position)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    table.add_column("")
    for name in (
        "drafts",
        "draft\ntokens",
        "accepted\ntokens",
        "acceptance\nlength",
        *map(str, range(1, positions + 1)),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for way, one in measured.items():
        for name in FIGURES:
            found: Acceptance = getattr(one, name)
            table.add_row(
                way if name == FIGURES[0] else "",
                name.replace("_", "-"),
                f"{found.drafts:,}",
                f"{found.draft_tokens:,}",
                f"{found.accepted:,}",
                f"{found.mean_acceptance_length:.2f}",
                *(f"{rate:.0%}" for rate in found.rates),
                end_section=name == FIGURES[-1],
            )
    console = Console(highlight=False)
    console.width = max(console.width, 64 + 6 * positions)  # a narrow terminal wraps lines rather than loses digits
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)
