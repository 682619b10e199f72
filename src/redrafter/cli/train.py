"""`redrafter train`: a drafter for a model, from rows of text."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from redrafter.cli.loading import (
    OVERWRITE,
    BadRows,
    Device,
    Dtype,
    Limit,
    Model,
    Sources,
    Template,
    TemplateKwargs,
    claim,
)
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import CHECKPOINTS, check_drafter_folder, check_states_folder
from redrafter.utils.paths import check_model_path

METHODS = ("recurrent", "medusa", "eagle")

FEATURES = 0.1
"""What the distance from the target's features counts where nobody says."""


def _configured(context: typer.Context, file: Path | None) -> Path | None:
    """Options from a YAML file, which the command line overrides; a key that is no option is refused."""
    if file is None:
        return None
    import yaml

    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RedrafterError(f"--config {file} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise RedrafterError(f"--config {file} is not YAML: {error}.") from None
    if not isinstance(told, dict):
        raise RedrafterError(f"--config {file} must hold options as NAME: VALUE.")
    values: dict[str, Any] = {str(name).replace("-", "_"): value for name, value in told.items()}
    known = {parameter.name for parameter in context.command.params} - {"config", "help", "more"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise RedrafterError(f"--config {file}: {', '.join(unknown)} is no option of this command.")
    context.default_map = {**(context.default_map or {}), **values}
    return file


def _check_method(method: str, told: dict[str, tuple[str, bool]]) -> None:
    """Raises RedrafterError for a method that is none, and for options told that are of other ones alone."""
    if method not in METHODS:
        raise RedrafterError(f"--method {method} is not one of {', '.join(METHODS)}.")
    for name, (methods, is_told) in told.items():
        if is_told and method not in methods.split():
            raise RedrafterError(f"{name} is an option of --method {' and '.join(methods.split())}, not of {method}.")


def _ranks(told: str, heads: int) -> list[int]:
    """What `--cartesian` lists.  Raises RedrafterError for what is no tree of so many heads."""
    from redrafter.heads.medusa import cartesian_nodes

    words = told.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise RedrafterError(f"--cartesian takes a number of tokens for each head, as 4,3,2, not {told!r}.")
    ranks = [int(word) for word in words]
    cartesian_nodes(ranks, heads)
    return ranks


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[list[str], typer.Option(metavar="FILE", help=f"Rows to learn from. {Sources}")],
    output: Annotated[Path, typer.Option(help="Folder to write the drafter to.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More of the same.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=_configured, help="YAML of these options; the command line overrides it."),
    ] = None,
    limit: Limit = None,
    template: Template = None,
    template_kwargs: TemplateKwargs = None,
    bad_rows: BadRows = "stop",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a row at most.")] = 1024,
    packing: Annotated[bool, typer.Option("--packing", help="Put short rows together, up to --max-length.")] = False,
    window_share: Annotated[
        float, typer.Option(help="Of the places to draft at, the share that a step learns from, drawn at random.")
    ] = 1.0,
    cache_states: Annotated[
        Path | None, typer.Option(help="Folder to keep the target's states in, for all epochs and later runs.")
    ] = None,
    shard_target: Annotated[
        bool, typer.Option("--shard-target", help="Divide the model among the processes: one GPU need not hold it.")
    ] = False,
    method: Annotated[
        str, typer.Option(help="recurrent (the paper's head), medusa (heads) or eagle (a layer over features).")
    ] = "recurrent",
    held_out: Annotated[
        int | None,
        typer.Option(min=0, help="Rows to measure on instead of training.  \\[default: 1 in 20, 64 at most]"),
    ] = None,
    beam_length: Annotated[int, typer.Option(min=1, help="Tokens to draft, the guaranteed one not counted.")] = 4,
    beam_width: Annotated[
        int,
        typer.Option(min=1, help="Beams to draft by default, and to measure with; medusa: tokens of a head at most."),
    ] = 10,
    node_budget: Annotated[
        int | None, typer.Option(min=2, help="Nodes to draft by default.  \\[default: beams; medusa: 64]")
    ] = None,
    cartesian: Annotated[
        str | None,
        typer.Option(
            metavar="4,3,2,…", help="medusa: a tree of all paths of so many tokens of each head.  \\[default: fitted]"
        ),
    ] = None,
    exit_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the head.  \\[default: 2 x hidden size; on a CPU perhaps 1 x]"),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=0, help="Residual blocks of the head.  \\[default: 2; medusa: 1 of each]")
    ] = None,
    rnn: Annotated[bool, typer.Option(help="The recurrence, or a running sum of embeddings.")] = True,
    gated: Annotated[bool, typer.Option("--gated", help="Give the recurrence a gate.")] = False,
    context_layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer of the target, from 1, that the drafter sees too; may be repeated."),
    ] = None,
    context_positions: Annotated[int, typer.Option(min=1, help="Last positions of which it sees the states.")] = 1,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Draft only the N most frequent tokens of the data; 0: all.  \\[default: all of up to 2,048, else as "
            "many as are 98 % of the tokens to learn on a CPU, 99.9 % on a GPU]",
        ),
    ] = None,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the loss on tokens.")] = 1.0,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the target's distribution.")] = 0.0,
    total_variation: Annotated[float, typer.Option(help="Weight of the distance from that distribution.")] = 0.0,
    coupled: Annotated[float, typer.Option(help="Weight of the loss on what the target draws by known noise.")] = 0.0,
    features: Annotated[
        float | None,
        typer.Option(help=f"eagle: weight of the distance from the target's features.  \\[default: {FEATURES}]"),
    ] = None,
    decay: Annotated[float, typer.Option(help="What a draft position counts of the one before.")] = 1.0,
    epochs: Annotated[
        float | None,
        typer.Option(help="Times to see the data.  \\[default: 2; for few rows as many as make 600 steps, 20 at most]"),
    ] = None,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps, instead of epochs where positive.")] = -1,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Wall-clock time from loaded model to written drafter, instead of epochs: steps, measurements and "
            "checkpoints count.  A step and the writing of files may exceed it by a few seconds."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that a process takes in at once.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches for each optimiser step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW; warm-up, then cosine to zero.")] = 1e-3,
    precision: Annotated[str, typer.Option(help="Of the drafter: auto, float32, bfloat16 or float16.")] = "auto",
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints.")] = 2.0,
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between measurements, with a checkpoint.  \\[default: a sixth of the run]"),
    ] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb, trackio, …")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    licence: Annotated[str | None, typer.Option("--license", help="Of the data, for the card.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the drafter in the end.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone see a repository that --push-to-hub creates.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a drafter that the folder holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train a drafter for a model; the model itself is not changed.

    Ctrl-C and SIGTERM save a checkpoint and stop (exit status 130 or 143); --resume continues.
    """
    first = os.environ.get("RANK", "0") == "0"
    if public and not push_to_hub:
        raise RedrafterError("--public is for a repository that --push-to-hub creates.")
    if not dry_run and first:
        inputs = [model, *data, *(more or []), template, config]
        if cache_states is not None:
            check_states_folder(cache_states, inputs=inputs)
            if output.resolve().is_relative_to(cache_states.resolve()):
                raise RedrafterError(f"--output {output} lies in --cache-states {cache_states}: choose another folder.")
        check_drafter_folder(output, overwrite=overwrite, inputs=inputs, own=[cache_states], advice=OVERWRITE)
    if gated and not rnn:
        raise RedrafterError("--gated needs the recurrence: leave out --no-rnn.")
    _check_method(
        method,
        {
            "--exit-dim": ("recurrent", exit_dim is not None),
            "--no-rnn": ("recurrent", not rnn),
            "--gated": ("recurrent", gated),
            "--context-layer": ("recurrent", bool(context_layer)),
            "--context-positions": ("recurrent", context_positions != 1),
            "--cartesian": ("medusa", cartesian is not None),
            "--blocks": ("recurrent medusa", blocks is not None),
            "--draft-vocabulary": ("recurrent medusa", draft_vocabulary is not None),
            "--features": ("eagle", features is not None),
        },
    )
    if features is None:
        features = FEATURES if method == "eagle" else 0.0
    if precision not in ("auto", "float32", "bfloat16", "float16"):
        raise RedrafterError(f"--precision {precision} is not one of auto, float32, bfloat16, float16.")
    ranks = None if cartesian is None else _ranks(cartesian, beam_length)
    check_model_path(model)
    if not dry_run and first:
        claim(context, output)

    import torch
    from rich.console import Console

    from redrafter.cli.loading import config_value, load_model, load_tokenizer, skipping, template_variables
    from redrafter.data.examples import coverage, most_frequent, pack, read_rows, split
    from redrafter.heads.base import Head
    from redrafter.heads.eagle import EagleHead
    from redrafter.heads.medusa import NODES, MedusaHeads
    from redrafter.heads.recurrent import RecurrentDrafter
    from redrafter.targets.target import Target
    from redrafter.training.checks import newest_checkpoint
    from redrafter.training.defaults import FEWEST, Choice, epochs_for, vocabulary_for, width_for
    from redrafter.training.estimating import estimate
    from redrafter.training.loss import Objective
    from redrafter.training.outcome import advice
    from redrafter.training.recipe import Recipe
    from redrafter.training.trainer import run
    from redrafter.utils import hub
    from redrafter.utils.interrupt import StoppedRun, interruptible

    recipe = Recipe(
        float(FEWEST) if epochs is None else epochs,
        max_steps,
        batch_size,
        learning_rate,
        save_steps=save_steps,
        save_seconds=60 * save_minutes,
        seed=seed,
        objective=Objective(cross_entropy, kl, total_variation, coupled, decay, features),
        accumulation=accumulation,
        precision=precision,  # type: ignore[arg-type]
        packing=max_length if packing else None,
        window_share=window_share,
        report_to=tuple(report_to or ()),
        cache_states=cache_states,
        seconds=None if minutes is None else 60 * minutes,
    )
    console = Console(stderr=True, soft_wrap=True, quiet=not first)
    if push_to_hub and first and not dry_run:
        hub.check_login(push_to_hub)  # what would be refused after the training is refused before it
    sources = [*data, *(more or [])]
    variables = template_variables(template_kwargs)
    with skipping(bad_rows) as skip:  # before the target is loaded, which may take long
        rows = read_rows(
            sources,
            load_tokenizer(model, template, variables),
            max_length=max_length,
            limit=limit,
            template_kwargs=variables,
            vocab_size=config_value(model, "vocab_size"),
            skip=skip,
        )
    target, _ = load_model(model, dtype, device, divided=shard_target)
    positions = Target(target).context_length
    rows = rows if positions is None else [row.cut(positions) for row in rows]
    rows, measured = split(rows, min(64, len(rows) // 20) if held_out is None else held_out, seed=seed)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"beam_width": beam_width, "node_budget": node_budget}
    choices: list[Choice] = []
    if epochs is None and max_steps < 1 and minutes is None:
        groups = len(pack(rows, recipe.packing)) if recipe.packing else len(rows)
        choices.append(epochs_for(groups, batch_size, accumulation))
        recipe = replace(recipe, epochs=float(choices[-1].value or FEWEST))
    if draft_vocabulary is None and method != "eagle":
        choices.append(vocabulary_for(rows, Target(target).vocab_size, target.device))
        draft_vocabulary = choices[-1].value
    if exit_dim is None and method == "recurrent":
        drafted = draft_vocabulary or Target(target).vocab_size
        choices.append(width_for(Target(target), 2 if blocks is None else blocks, drafted, target.device))
        exit_dim = choices[-1].value
    vocabulary = most_frequent(rows, draft_vocabulary) if draft_vocabulary else None
    drafter: Head
    if method == "medusa":
        drafter = MedusaHeads.fresh(
            target,
            heads=beam_length,
            blocks=1 if blocks is None else blocks,
            ranks=ranks,
            nodes=max(NODES, node_budget or 0),
            **shape,
            draft_vocabulary=vocabulary,
        )
    elif method == "eagle":
        drafter = EagleHead.fresh(target, beam_length=beam_length, **shape)
    else:
        drafter = RecurrentDrafter.for_target(
            target,
            exit_dim=exit_dim,
            num_draft_layers=2 if blocks is None else blocks,
            rnn=rnn,
            gated=gated,
            context_layers=sorted(context_layer or []),
            context_positions=context_positions,
            beam_length=beam_length,
            **shape,
            draft_vocabulary=vocabulary,
        )
    learnt = sum(row.learnt for row in rows)
    console.print(
        f"{len(rows):,} rows, {learnt:,} tokens to learn, {len(measured)} rows held out; "
        f"{hub.count_parameters(drafter):,} parameters."
    )
    if choices:
        console.print(f"Chosen: {'; '.join(choice.reason for choice in choices)}.")
    if drafter.draft_vocabulary is not None:
        covered = coverage(rows, drafter.draft_vocabulary)
        console.print(f"The draft vocabulary of {draft_vocabulary:,} covers {covered:.2%} of the tokens to learn.")
    if dry_run:
        needs = estimate(target, drafter, rows, recipe)
        peak = "" if needs.peak is None else f", {needs.peak / 2**30:.2f} GiB at most with a batch"
        weights = f"{needs.weights / 2**30:.2f} GiB of weights and moments"
        states = "" if needs.states is None else f", {needs.states / 2**30:.2f} GiB of states on disk"
        console.print(f"{needs.steps:,} steps, about {needs.seconds:,.0f} s; {weights}{peak}{states}.")
        return
    names = [source if "/" in source and not Path(source).exists() else Path(source).name for source in sources]
    about: dict[str, Any] = {"sources": names, "licence": licence, "tell": console.print, "resume": resume}
    try:
        with interruptible():
            found = run(
                target, drafter, rows, output, recipe, held_out=measured, fewer_held_out=held_out is None, **about
            )
    except KeyboardInterrupt as error:
        again = newest_checkpoint(output / CHECKPOINTS)
        if again is None:
            raise StoppedRun("Interrupted before the first step; run the same command again.", error) from None
        raise StoppedRun(
            f"Interrupted; run it again with --resume to go on from {again.name} in {again.parent}.", error
        ) from None
    console.print(advice(found.measured, recipe))
    console.print(f"Loss {recipe.objective.in_words(found.loss, beam_length)}. Wrote {output}.")
    if push_to_hub and first:
        console.print(f"Uploaded to {hub.push(output, push_to_hub, public=public)}.")
