"""Options of `redrafter train` that all methods share: one dataclass per group of options.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer
from typer import Option

from redrafter.cli import options as opt
from redrafter.cli.train_methods import EagleOptions, MedusaOptions, RecurrentOptions, TrainingMethod
from redrafter.errors import RedrafterError
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.utils.outputs import check_drafter_folder, check_states_folder


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the options of a YAML file the defaults of the command.  Raises RedrafterError for unknown options."""
    if file is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RedrafterError(f"--config {file} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise RedrafterError(f"--config {file} is not YAML: {error}.") from None
    if not isinstance(content, dict):
        raise RedrafterError(f"--config {file} must hold options as NAME: VALUE.")
    values: dict[str, Any] = {str(name).replace("-", "_"): value for name, value in content.items()}
    known = {parameter.name for parameter in context.command.params} - {"config", "help", "more"}
    if unknown := sorted(values.keys() - known):
        raise RedrafterError(f"--config {file}: {', '.join(unknown)} is not an option of this command.")
    context.default_map = {**(context.default_map or {}), **values}
    return file


@dataclass(kw_only=True)
class DataOptions:
    """The target and the rows to train on."""

    PANEL: ClassVar[str] = "Model and data"

    model: opt.Model
    data: Annotated[list[str], Option(metavar="FILE", help=f"Rows to train on. {opt.SOURCES}")]
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More files like --data.")] = None
    config: Annotated[
        Path | None,
        Option(is_eager=True, callback=read_config, help="YAML of these options; the command line overrides it."),
    ] = None
    limit: opt.Limit = None
    template: opt.Template = None
    template_kwargs: opt.TemplateKwargs = None
    bad_rows: opt.BadRows = "stop"
    max_length: Annotated[int, Option(min=3, help="Maximum tokens of a row; the rest is cut off.")] = 1024
    held_out: Annotated[
        int | None, Option(min=0, help="Rows to measure on instead of training.  \\[default: 1 in 20, at most 64]")
    ] = None
    shard_target: Annotated[
        bool, Option("--shard-target", help="Shard the model over the processes, if it does not fit on one GPU.")
    ] = False
    dtype: opt.Dtype = "auto"
    device: opt.Device = "auto"
    dequantize: opt.Dequantize = False

    @property
    def sources(self) -> list[str]:
        """All files and data sets."""
        return [*self.data, *(self.more or [])]


@dataclass(kw_only=True)
class RecipeOptions:
    """Hyperparameters."""

    PANEL: ClassVar[str] = "Training"

    packing: Annotated[bool, Option("--packing", help="Pack short rows together, up to --max-length.")] = False
    window_share: Annotated[
        float, Option(help="Fraction of the draft positions that a step learns from, drawn at random.")
    ] = 1.0
    cache_states: Annotated[
        Path | None, Option(help="Folder that keeps the target's hidden states for all epochs and later runs.")
    ] = None
    cross_entropy: Annotated[float, Option(help="Weight of the cross-entropy of the data's tokens.")] = 1.0
    kl: Annotated[float, Option(help="Weight of the KL divergence from the target's distribution.")] = 0.0
    total_variation: Annotated[
        float, Option(help="Weight of the total variation distance from the target's distribution.")
    ] = 0.0
    coupled: Annotated[
        float, Option(help="Weight of the cross-entropy of tokens that the target samples with shared noise.")
    ] = 0.0
    decay: Annotated[float, Option(help="Weight of each draft position relative to the previous one.")] = 1.0
    epochs: Annotated[
        float | None,
        Option(help="Passes over the data.  \\[default: 2; for few rows enough for 600 steps, at most 20]"),
    ] = None
    max_steps: Annotated[int, Option(help="Optimiser steps, instead of epochs if positive.")] = -1
    minutes: Annotated[
        float | None,
        Option(
            help="Wall-clock time from the loaded model to the written drafter, instead of epochs; it includes steps, "
            "measurements and checkpoints.  The last step and writing files may exceed it by a few seconds."
        ),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Rows per process and batch.")] = 8
    accumulation: Annotated[int, Option(min=1, help="Batches per optimiser step.")] = 1
    learning_rate: Annotated[float, Option(help="Peak rate of AdamW; warm-up, then cosine to zero.")] = 1e-3
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="Data type of the drafter's matrix products; auto: bfloat16 on CUDA, else float32."),
    ] = "auto"
    save_minutes: Annotated[float, Option(min=0, help="Minutes between checkpoints.")] = 2.0
    save_steps: Annotated[
        int | None,
        Option(min=1, help="Steps between measurements, with a checkpoint.  \\[default: a sixth of the run]"),
    ] = None
    report_to: Annotated[list[str] | None, Option(help="Logger: tensorboard, wandb, trackio, …")] = None
    seed: Annotated[int, Option(min=0, help="Seed of the initial weights and the order of rows.")] = 0

    @property
    def choose_epochs(self) -> bool:
        """Whether the number of epochs depends on the data."""
        return self.epochs is None and self.max_steps < 1 and self.minutes is None

    def recipe(self, max_length: int, feature_weight: float) -> Recipe:
        """The recipe.  Raises RedrafterError for invalid values."""
        weights = (self.cross_entropy, self.kl, self.total_variation, self.coupled, self.decay, feature_weight)
        return Recipe(
            2.0 if self.epochs is None else self.epochs,
            self.max_steps,
            self.batch_size,
            self.learning_rate,
            save_steps=self.save_steps,
            save_seconds=60 * self.save_minutes,
            seed=self.seed,
            objective=Objective(*weights),
            accumulation=self.accumulation,
            precision=self.precision,
            packing=max_length if self.packing else None,
            window_share=self.window_share,
            report_to=tuple(self.report_to or ()),
            cache_states=self.cache_states,
            seconds=None if self.minutes is None else 60 * self.minutes,
        )


@dataclass(kw_only=True)
class TrainOptions(DataOptions, RecipeOptions, RecurrentOptions, MedusaOptions, EagleOptions):
    """Options of `redrafter train`."""

    output: Annotated[Path, Option(help="Folder to write the drafter to.")]
    method: Annotated[
        TrainingMethod,
        Option(help="recurrent (the paper's head), medusa (parallel heads) or eagle (a layer over features)."),
    ] = "recurrent"
    licence: Annotated[str | None, Option("--license", help="License of the data, for the model card.")] = None
    push_to_hub: Annotated[str | None, Option(metavar="OWNER/NAME", help="Upload the drafter after training.")] = None
    public: Annotated[
        bool, Option("--public", help="Make a repository that --push-to-hub creates visible to everyone.")
    ] = False
    resume: Annotated[bool, Option("--resume", help="Continue from the last checkpoint in the folder.")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing drafter.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Print the expected cost and train nothing.")] = False

    def check_folders(self) -> None:
        """Raises RedrafterError if the command must not write its folders."""
        inputs, states = [self.model, *self.sources, self.template, self.config], self.cache_states
        if states is not None:
            check_states_folder(states, inputs=inputs)
            if self.output.resolve().is_relative_to(states.resolve()):
                raise RedrafterError(f"--output {self.output} lies in --cache-states {states}: choose another folder.")
        advice = opt.OVERWRITE
        check_drafter_folder(self.output, overwrite=self.overwrite, inputs=inputs, own=[states], advice=advice)
