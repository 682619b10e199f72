"""`redrafter train`: trains a drafter for a model from rows of text.

Heavy modules are imported inside functions, so that invalid options are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from redrafter.cli.loading import claim, config_value, load_model, load_tokenizer, skipping, template_variables
from redrafter.cli.options import command
from redrafter.cli.train_methods import EagleOptions, HeadOptions, MedusaOptions, RecurrentOptions, select_method
from redrafter.cli.train_options import DataOptions, OutputOptions, RecipeOptions
from redrafter.training.recipe import Recipe, is_first_process
from redrafter.utils.outputs import CHECKPOINTS
from redrafter.utils.paths import check_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from redrafter.data.examples import Row
    from redrafter.heads.base import Head
    from redrafter.training.card import TrainingResult
    from redrafter.training.defaults import Default

Log = Callable[[str], None]


@command
def train(
    context: typer.Context,
    data: DataOptions,
    output: OutputOptions,
    head: HeadOptions,
    recurrent: RecurrentOptions,
    medusa: MedusaOptions,
    eagle: EagleOptions,
    hyper: RecipeOptions,
) -> None:
    """Train a drafter for a model; the model itself is not changed.

    Ctrl-C and SIGTERM save a checkpoint and stop (exit status 130 or 143); --resume continues.
    """
    writes = is_first_process() and not output.dry_run
    output.check(hyper.cache_states, [data.model, *data.sources, data.template, data.config], writes=writes)
    method = select_method(head, recurrent, medusa, eagle)
    recipe = hyper.recipe(data.max_length, method.feature_weight)
    check_model_path(data.model)
    if writes:
        claim(context, output.output)

    import torch
    from rich.console import Console

    from redrafter.training.outcome import advice
    from redrafter.utils import hub

    log = Console(stderr=True, soft_wrap=True, quiet=not is_first_process()).print
    if output.push_to_hub and writes:
        hub.check_login(output.push_to_hub)
    inputs = _load(data, hyper.seed)
    chosen = [_default_epochs(inputs.rows, recipe)] if hyper.choose_epochs else []
    if chosen:
        recipe = replace(recipe, epochs=float(chosen[0].value or recipe.epochs))
    torch.manual_seed(hyper.seed)
    drafter, more = method.build(head, inputs.model, inputs.rows)
    _print_summary(log, drafter, inputs, [*chosen, *more])
    if output.dry_run:
        _print_estimate(log, drafter, inputs, recipe)
        return
    result = _fit(log, drafter, inputs, recipe, data, output)
    log(advice(result.measured, recipe))
    log(f"Loss {recipe.objective.describe_loss(result.loss, head.beam_length)}. Wrote {output.output}.")
    if output.push_to_hub and is_first_process():
        log(f"Uploaded to {hub.push(output.output, output.push_to_hub, public=output.public)}.")


@dataclass(frozen=True)
class _Inputs:
    """The target, and rows to train on and to measure on."""

    model: PreTrainedModel
    rows: list[Row]
    held_out: list[Row]


def _load(data: DataOptions, seed: int) -> _Inputs:
    """Reads the rows, then loads the model, which may take long."""
    from redrafter.data.examples import read_rows, split
    from redrafter.targets.target import Target

    variables = template_variables(data.template_kwargs)
    with skipping(data.bad_rows) as skip:
        rows = read_rows(
            data.sources,
            load_tokenizer(data.model, data.template, variables),
            max_length=data.max_length,
            limit=data.limit,
            template_kwargs=variables,
            vocab_size=config_value(data.model, "vocab_size"),
            skip=skip,
        )
    model, _ = load_model(data.model, data.dtype, data.device, divided=data.shard_target)
    positions = Target(model).context_length
    rows = rows if positions is None else [row.cut(positions) for row in rows]
    held_out = min(64, len(rows) // 20) if data.held_out is None else data.held_out
    return _Inputs(model, *split(rows, held_out, seed=seed))


def _default_epochs(rows: list[Row], recipe: Recipe) -> Default:
    from redrafter.data.examples import pack
    from redrafter.training.defaults import default_epochs

    groups = len(pack(rows, recipe.packing)) if recipe.packing else len(rows)
    return default_epochs(groups, recipe.batch_size, recipe.accumulation)


def _print_summary(log: Log, drafter: Head, inputs: _Inputs, chosen: list[Default]) -> None:
    from redrafter.data.examples import coverage
    from redrafter.utils.hub import count_parameters

    rows, vocabulary = inputs.rows, drafter.draft_vocabulary
    learned, parameters = sum(row.learnt for row in rows), count_parameters(drafter)
    log(
        f"{len(rows):,} rows, {learned:,} tokens to learn, {len(inputs.held_out)} rows held out; "
        f"{parameters:,} parameters."
    )
    if chosen:
        log(f"Chosen: {'; '.join(default.reason for default in chosen)}.")
    if vocabulary is not None:
        covered = coverage(rows, vocabulary)
        log(f"The draft vocabulary of {len(vocabulary):,} covers {covered:.2%} of the tokens to learn.")


def _print_estimate(log: Log, drafter: Head, inputs: _Inputs, recipe: Recipe) -> None:
    from redrafter.training.estimating import estimate

    cost = estimate(inputs.model, drafter, inputs.rows, recipe)
    parts = [f"{cost.weights / 2**30:.2f} GiB of weights and moments"]
    parts += [] if cost.peak is None else [f"at most {cost.peak / 2**30:.2f} GiB with a batch"]
    parts += [] if cost.states is None else [f"{cost.states / 2**30:.2f} GiB of states on disk"]
    log(f"{cost.steps:,} steps, about {cost.seconds:,.0f} s; {', '.join(parts)}.")


def _fit(
    log: Log, drafter: Head, inputs: _Inputs, recipe: Recipe, data: DataOptions, output: OutputOptions
) -> TrainingResult:
    """Trains; a signal ends the command with a message that says how to continue."""
    from redrafter.training.checks import newest_checkpoint
    from redrafter.training.trainer import run
    from redrafter.utils.interrupt import StoppedRun, interruptible

    try:
        with interruptible():
            return run(
                inputs.model,
                drafter,
                inputs.rows,
                output.output,
                recipe,
                held_out=inputs.held_out,
                fewer_held_out=data.held_out is None,
                sources=[name if "/" in name and not Path(name).exists() else Path(name).name for name in data.sources],
                licence=output.licence,
                report=log,
                resume=output.resume,
            )
    except KeyboardInterrupt as error:
        last = newest_checkpoint(output.output / CHECKPOINTS)
        message = "Interrupted before the first step; run the same command again."
        if last is not None:
            message = f"Interrupted; run it again with --resume to continue from {last.name} in {last.parent}."
        raise StoppedRun(message, error) from None
