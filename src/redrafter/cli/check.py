"""`redrafter check`: compares drafted with undrafted text on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.utils.paths import check_drafter_path, check_model_path


@dataclass(kw_only=True)
class CheckOptions(opt.ShapeOptions, opt.SamplingOptions, opt.LoadingOptions):
    """Options of `redrafter check`."""

    model: opt.Model
    drafter: opt.Drafter
    prompts: opt.Prompts
    limit: opt.Limit = None
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 128
    batch_size: opt.BatchSize = 8
    settings: opt.Set = None


@command("Measure")
def check(options: CheckOptions) -> None:
    """Generate with and without the drafter and compare the texts.

    Exit status 1 if texts differ and rounding does not explain it.
    """
    check_model_path(options.model)
    check_drafter_path(options.drafter)
    from redrafter.cli.loading import load_drafter, load_model, tokenized_prompts
    from redrafter.cli.parsing import read_settings
    from redrafter.data.prompts import read_prompts
    from redrafter.decoding.settings import with_stop_strings
    from redrafter.evaluation.checking import compare
    from redrafter.utils.progress import Progress

    values = opt.values_of(options, opt.ShapeOptions, opt.SamplingOptions)
    sizes = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    settings = read_settings(options.settings, **values, **sizes)
    records = read_prompts(*options.prompts, limit=options.limit)
    ids = tokenized_prompts(records, options.model, options.template_kwargs)
    target, tokenizer = load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)
    drafter = load_drafter(options.drafter, target, any_target=options.any_target)
    settings = with_stop_strings(target, settings, tokenizer)
    with Progress("texts", 2 * len(ids)) as progress:
        report = compare(target, drafter, ids, on_row=progress.advance, **settings)
    for one in report.divergences:
        verdict = "within rounding" if one.explained else "NOT explained by rounding"
        typer.echo(
            f"prompt {one.row + 1}: the texts differ from new token {one.position + 1} on; the two largest logits are "
            f"{one.margin:.3g} apart, rounding explains {one.rounding:.3g}: {verdict}"
        )
    unexplained = sum(not one.explained for one in report.divergences)
    verdict = "drafting changes nothing"
    if report.divergences:
        verdict = f"{unexplained} differ beyond rounding" if unexplained else "the others differ within rounding"
    typer.echo(
        f"{len(ids) - len(report.divergences)} of {len(ids)} texts equal, {report.tokens} tokens, "
        f"{report.tokens_per_step:.2f} per step: {verdict}."
    )
    if unexplained:
        raise typer.Exit(1)
