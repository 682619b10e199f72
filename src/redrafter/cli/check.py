"""`redrafter check`: proves that drafting changes no text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redrafter.cli.loading import (
    Budget,
    Device,
    DoSample,
    DraftBits,
    DrafterOrModel,
    Dtype,
    Length,
    MinP,
    Model,
    NewTokens,
    Seed,
    Set,
    Temperature,
    TopK,
    TopP,
    Width,
)


def check(
    model: Model,
    drafter: Annotated[str, typer.Option(help=DrafterOrModel)],
    prompts: Annotated[Path, typer.Option(help="JSONL rows of `prompt`, `messages` or `turns`.")],
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
    draft_bits: DraftBits = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Decode with and without the drafter; exit status 1 if texts part where rounding does not explain it."""
    from redrafter.checking import compare
    from redrafter.cli.loading import check_bits, load_method, load_model, read_settings
    from redrafter.progress import Progress
    from redrafter.prompts import prompt_ids, read_prompts

    check_bits(draft_bits)
    settings = read_settings(
        more,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    target, tokenizer = load_model(model, dtype, device)
    head = load_method(drafter, target, draft_bits)
    ids = [prompt_ids(record, tokenizer, where) for where, record in read_prompts(prompts)]
    if "stop_strings" in settings:
        settings["tokenizer"] = tokenizer
    with Progress("texts", 2 * len(ids)) as progress:
        report = compare(
            target,
            head,
            ids,
            batch_size=batch_size,
            beam_width=beam_width,
            beam_length=beam_length,
            node_budget=node_budget,
            on_row=progress.advance,
            **settings,
        )
    for parting in report.partings:
        verdict = "within rounding" if parting.explained else "NOT explained by rounding"
        typer.echo(
            f"prompt {parting.row + 1} parts at new token {parting.position + 1}: the two best logits are "
            f"{parting.margin:.3g} apart, rounding reaches {parting.rounding:.3g}: {verdict}"
        )
    unexplained = sum(not p.explained for p in report.partings)
    verdict = "drafting changes nothing"
    if report.partings:
        verdict = f"{unexplained} part without excuse" if unexplained else "the others part within rounding"
    typer.echo(
        f"{len(ids) - len(report.partings)} of {len(ids)} texts equal, {report.tokens} tokens, "
        f"{report.tokens_per_step:.2f} per step: {verdict}."
    )
    if unexplained:
        raise typer.Exit(1)
