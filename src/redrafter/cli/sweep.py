"""`redrafter sweep`: measures one drafting method in many shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.cli.bench import SharedOptions, run
from redrafter.cli.parsing import numbers, whole_numbers

if TYPE_CHECKING:
    from redrafter.bench.units import Axes


@dataclass(kw_only=True)
class SweepOptions(SharedOptions):
    """Options of `redrafter sweep`."""

    limit: Annotated[int | None, typer.Option(min=1, help="Use N prompts per category, evenly spaced.")] = 2
    max_new_tokens: opt.NewTokens = 64
    widths: Annotated[str, typer.Option(help="Beam widths.")] = "1,2,4,8,16,32,64"
    lengths: Annotated[str, typer.Option(help="Beam lengths in tokens.")] = "1,2,3,4,5,6,7,8"
    budgets: Annotated[str, typer.Option(help="Node budgets, with the method's default beams.")] = "4,8,16,32,64"
    batches: Annotated[str, typer.Option(help="Batch sizes, in the method's default shape.")] = "1,2,4,8,16,32,64"
    temperatures: Annotated[
        str, typer.Option(help="Temperatures, in the default shape, coupled and uncoupled; 0 is greedy.")
    ] = "0,0.3,0.7,1"
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of all other axes.")] = 0.0
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds in which everything is measured; medians are reported.")
    ] = 3

    def axes(self) -> Axes:
        """What to measure.  Raises RedrafterError for a bad list."""
        from redrafter.bench.units import Axes

        names = ("widths", "lengths", "budgets", "batches")
        lists = {name: whole_numbers(getattr(self, name), f"--{name}") for name in names}
        temperatures = numbers(self.temperatures, "--temperatures")
        return Axes(**lists, temperatures=temperatures, temperature=self.temperature, rounds=self.rounds)


@command("Measure")
def sweep(options: SweepOptions) -> None:
    """Measure one drafting method in many shapes, batch sizes and temperatures: heat maps and curves.

    Run the same command again to resume an interrupted sweep.
    """
    from redrafter.bench.report import check_packages

    check_packages()
    axes = options.axes()
    names = ("widths", "lengths", "budgets", "batches")
    arguments = {
        "command": "sweep",
        "batch_size": 1,
        "axes": {name: getattr(axes, name) for name in names},
        "temperature": axes.temperature,
        "temperatures": axes.temperatures,
        "rounds": axes.rounds,
    }
    from redrafter.bench import comparing

    batches = [1, *axes.batches]
    run(options, batches, arguments, lambda setup, methods, on_unit: comparing.sweep(setup, methods, on_unit, axes))
