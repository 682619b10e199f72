"""`redrafter check`: proves that drafting changes no text."""

from __future__ import annotations

from typing import Annotated

import typer

from redrafter.cli.loading import (
    AnyTarget,
    Budget,
    Device,
    DoSample,
    DrafterOrModel,
    Dtype,
    Length,
    Limit,
    MinP,
    Model,
    NewTokens,
    Prompts,
    Seed,
    Set,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
    Width,
)
from redrafter.utils.paths import check_drafter_path, check_model_path


def check(
    model: Model,
    drafter: Annotated[str, typer.Option(help=DrafterOrModel)],
    prompts: Prompts,
    limit: Limit = None,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 128,
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
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Decode with and without the drafter; exit status 1 if texts part where rounding does not explain it."""
    check_model_path(model)
    check_drafter_path(drafter)
    from redrafter.cli.loading import load_drafter, load_model, read_settings, tokenized_prompts
    from redrafter.data.prompts import read_prompts
    from redrafter.decoding.settings import with_stop_strings
    from redrafter.evaluation.checking import compare
    from redrafter.utils.progress import Progress

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
    )
    ids = tokenized_prompts(read_prompts(*prompts, limit=limit), model, template_kwargs)
    target, tokenizer = load_model(model, dtype, device)
    head = load_drafter(drafter, target, any_target=any_target)
    with Progress("texts", 2 * len(ids)) as progress:
        report = compare(target, head, ids, on_row=progress.advance, **with_stop_strings(target, settings, tokenizer))
    for parting in report.divergences:
        verdict = "within rounding" if parting.explained else "NOT explained by rounding"
        typer.echo(
            f"prompt {parting.row + 1} parts at new token {parting.position + 1}: the two best logits are "
            f"{parting.margin:.3g} apart, rounding reaches {parting.rounding:.3g}: {verdict}"
        )
    unexplained = sum(not p.explained for p in report.divergences)
    verdict = "drafting changes nothing"
    if report.divergences:
        verdict = f"{unexplained} part without excuse" if unexplained else "the others part within rounding"
    typer.echo(
        f"{len(ids) - len(report.divergences)} of {len(ids)} texts equal, {report.tokens} tokens, "
        f"{report.tokens_per_step:.2f} per step: {verdict}."
    )
    if unexplained:
        raise typer.Exit(1)
