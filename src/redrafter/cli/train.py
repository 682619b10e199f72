"""`redrafter train`: trains a drafter for a model from rows of text.

Heavy modules are imported inside functions, so that invalid options are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from redrafter.cli.app import command
from redrafter.cli.loading import config_value, load_model, load_tokenizer
from redrafter.cli.parsing import skipping, template_variables
from redrafter.cli.train_methods import select_method
from redrafter.cli.train_options import TrainOptions
from redrafter.errors import RedrafterError
from redrafter.training.recipe import Recipe, is_first_process
from redrafter.utils.outputs import CHECKPOINTS, locked
from redrafter.utils.paths import check_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from redrafter.cli.train_methods import HeadOptions
    from redrafter.data.examples import Row
    from redrafter.heads.base import Head
    from redrafter.training.card import TrainingResult
    from redrafter.training.defaults import Default

Log = Callable[[str], None]


@command("Train a drafter")
def train(options: TrainOptions) -> None:
    """Train a drafter for a model; the model itself is not changed.

    Ctrl-C and SIGTERM save a checkpoint and stop (exit status 130 or 143); --resume continues.
    """
    if options.public and not options.push_to_hub:
        raise RedrafterError("--public applies to a repository that --push-to-hub creates: leave it out.")
    writes = is_first_process() and not options.dry_run
    if writes:
        options.check_folders()
    head = select_method(options.method, options)
    recipe = options.recipe(options.max_length, head.feature_weight)
    check_model_path(options.model)
    with locked(options.output) if writes else nullcontext():
        _train(options, head, recipe, writes=writes)


def _train(options: TrainOptions, head: HeadOptions, recipe: Recipe, *, writes: bool) -> None:
    import torch
    from rich.console import Console

    from redrafter.training.outcome import advice
    from redrafter.utils import hub

    log = Console(stderr=True, soft_wrap=True, quiet=not is_first_process()).print
    if options.push_to_hub and writes:
        hub.check_login(options.push_to_hub)
    inputs = _load(options)
    chosen = [_default_epochs(inputs.rows, recipe)] if options.choose_epochs else []
    if chosen:
        recipe = replace(recipe, epochs=float(chosen[0].value or recipe.epochs))
    torch.manual_seed(options.seed)
    drafter, more = head.build(inputs.model, inputs.rows)
    _print_summary(log, drafter, inputs, [*chosen, *more])
    if options.dry_run:
        _print_estimate(log, drafter, inputs, recipe)
        return
    result = _fit(log, drafter, inputs, recipe, options)
    log(advice(result.measured, recipe))
    log(f"Loss {recipe.objective.describe_loss(result.loss, options.beam_length)}. Wrote {options.output}.")
    if options.push_to_hub and writes:
        log(f"Uploaded to {hub.push(options.output, options.push_to_hub, public=options.public)}.")


@dataclass(frozen=True)
class _Inputs:
    """The target, and rows to train on and to measure on."""

    model: PreTrainedModel
    rows: list[Row]
    held_out: list[Row]


def _load(options: TrainOptions) -> _Inputs:
    """Reads the rows, then loads the model, which may take long."""
    from redrafter.data.examples import read_rows, split
    from redrafter.targets.target import Target

    variables = template_variables(options.template_kwargs)
    with skipping(options.bad_rows) as skip:
        rows = read_rows(
            options.sources,
            load_tokenizer(options.model, options.template, variables),
            max_length=options.max_length,
            limit=options.limit,
            template_kwargs=variables,
            vocab_size=config_value(options.model, "vocab_size"),
            skip=skip,
        )
    model, _ = load_model(
        options.model, options.dtype, options.device, divided=options.shard_target, dequantize=options.dequantize
    )
    positions = Target(model).context_length
    rows = rows if positions is None else [row.cut(positions) for row in rows]
    held_out = min(64, len(rows) // 20) if options.held_out is None else options.held_out
    return _Inputs(model, *split(rows, held_out, seed=options.seed))


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


def _fit(log: Log, drafter: Head, inputs: _Inputs, recipe: Recipe, options: TrainOptions) -> TrainingResult:
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
                options.output,
                recipe,
                held_out=inputs.held_out,
                fewer_held_out=options.held_out is None,
                sources=[
                    name if "/" in name and not Path(name).exists() else Path(name).name for name in options.sources
                ],
                licence=options.licence,
                report=log,
                resume=options.resume,
            )
    except KeyboardInterrupt as error:
        last = newest_checkpoint(options.output / CHECKPOINTS)
        message = "Interrupted before the first step; run the same command again."
        if last is not None:
            message = f"Interrupted; run it again with --resume to continue from {last.name} in {last.parent}."
        raise StoppedRun(message, error) from None
