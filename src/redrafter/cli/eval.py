"""`redrafter eval`: how many drafted tokens are accepted, greedy and sampled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.evaluation.acceptance import Acceptance, Measured

FIGURES = ("decoding", "walked", "teacher_forced")


@dataclass(kw_only=True)
class EvalOptions(opt.ShapeOptions, opt.LoadingOptions):
    """Options of `redrafter eval`."""

    model: opt.Model
    drafter: opt.Drafter
    prompts: Annotated[list[str], typer.Option("--prompts", "--data", metavar="FILE", help=opt.PROMPT_ROWS)]
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="Further files of prompts.")] = None
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 128
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled texts.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the sampled texts.")] = 0
    batch_size: opt.BatchSize = 8
    limit: opt.Limit = None
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Also report separately for every value of this key of the rows.")
    ] = None
    as_json: opt.AsJson = False


@command("Measure", "eval")
def evaluate(options: EvalOptions) -> None:
    """Measure how many drafted tokens the target accepts, greedy and sampled.

    `decoding`: counted while generating; `walked`: recomputed from the texts, as a check; `teacher-forced`: with a
    draft at every position of the texts.
    """
    check_model_path(options.model)
    check_drafter_path(options.drafter)
    from redrafter.cli.loading import load_drafter, load_model, tokenized_prompts
    from redrafter.data.prompts import read_prompts
    from redrafter.evaluation.acceptance import evaluate as measure
    from redrafter.utils.progress import Progress

    records = read_prompts(*options.prompts, *(options.more or []), limit=options.limit)
    groups = {} if options.by is None else _grouped(records, options.by)
    ids = tokenized_prompts(records, options.model, options.template_kwargs)
    target, tokenizer = load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)
    drafter = load_drafter(options.drafter, target, any_target=options.any_target)
    with Progress("texts", 2 * len(ids)) as progress:
        results = measure(
            target,
            drafter,
            ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
            **opt.values_of(options, opt.ShapeOptions),
            tokenizer=tokenizer,
            on_row=progress.advance,
        )
    _report(options, results, groups)
    rounding = "only almost equal scores explain" if target.dtype.itemsize == 4 else "rounding may explain"
    dtype = str(target.dtype).removeprefix("torch.")
    for mode, count in _num_differences(results).items():
        if count:
            typer.echo(
                f"{mode}: for {count} of {len(ids)} texts the recomputed counts differ from those of decoding; in "
                f"{dtype} {rounding} that.",
                err=options.as_json,
            )


def _grouped(records: list[tuple[str, dict[str, Any]]], by: str) -> dict[str, list[int]]:
    """Row numbers by their value of a key."""
    groups: dict[str, list[int]] = {}
    for row, (where, record) in enumerate(records):
        if by not in record:
            raise RedrafterError(f'{where}: --by {by}: the row has no "{by}".')
        groups.setdefault(str(record[by]), []).append(row)
    return groups


def _num_differences(results: dict[str, list[Measured]]) -> dict[str, int]:
    """Number of texts whose recomputed counts differ from those of decoding, by mode."""
    return {mode: sum(text.walked != text.decoding for text in texts) for mode, texts in results.items()}


def _report(options: EvalOptions, results: dict[str, list[Measured]], groups: dict[str, list[int]]) -> None:
    """Prints the totals of all rows and of each group, as tables or as JSON."""
    from redrafter.evaluation.acceptance import Measured

    count = len(next(iter(results.values())))
    totals = {mode: Measured.total(texts) for mode, texts in results.items()}
    parts = {
        name: {mode: Measured.total([texts[row] for row in rows]) for mode, texts in results.items()}
        for name, rows in groups.items()
    }
    if not options.as_json:
        for name, part in parts.items():
            _print_table(f"{options.by} {name}: {len(groups[name])} prompts", part)
        _print_table(f"{count} prompts", totals)
        return
    record = {"prompts": count, "temperature": options.temperature, "seed": options.seed, **_as_dict(totals)}
    record["walked_otherwise"] = _num_differences(results)
    if options.by is not None:
        record["by"] = {
            options.by: {name: {"prompts": len(groups[name]), **_as_dict(part)} for name, part in parts.items()}
        }
    typer.echo(json.dumps(record, ensure_ascii=False))


def _as_dict(measured: dict[str, Measured]) -> dict[str, Any]:
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
        mode: {"tokens": one.tokens} | {name: counts(getattr(one, name)) for name in FIGURES}
        for mode, one in measured.items()
    }


def _print_table(title: str, measured: dict[str, Measured]) -> None:
    """Three rows for greedy decoding and three for sampling."""
    from redrafter.cli.tables import print_figures

    positions = len(next(iter(measured.values())).decoding.by_position)
    columns = ["mode", "counted", "drafts", "draft\ntokens", "accepted\ntokens", "acceptance\nlength"]
    rows: list[list[str]] = []
    for mode, one in measured.items():
        for name in FIGURES:
            figures: Acceptance = getattr(one, name)
            counts = (figures.drafts, figures.draft_tokens, figures.accepted)
            rates = [f"{figures.mean_acceptance_length:.2f}", *(f"{rate:.0%}" for rate in figures.rates)]
            first = mode if name == FIGURES[0] else ""
            rows.append([first, name.replace("_", "-"), *(f"{count:,}" for count in counts), *rates])
        rows.append([])
    typer.echo(f"\n{title}")
    print_figures([*columns, *map(str, range(1, positions + 1))], rows, left=columns[:2])
