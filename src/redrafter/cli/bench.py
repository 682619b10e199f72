"""`redrafter bench`: compares drafting methods.  Also the parts that it shares with `redrafter sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.cli.demo import PROMPTS
from redrafter.cli.loading import config_value, demo_folder, load_model, load_tokenizer
from redrafter.cli.parsing import numbers, template_variables, whole_numbers
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_bench_folder, locked
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.bench.comparing import BenchSetup, OnUnit
    from redrafter.bench.methods import BenchMethod, MethodSpec
    from redrafter.bench.results import Results
    from redrafter.bench.tasks import Tasks
    from redrafter.bench.units import Comparison, Unit

    Measure = Callable[[BenchSetup, Sequence[BenchMethod], OnUnit], Results]

CATEGORIES = ("dialogue", "dialogue", "dialogue", "dialogue", "maths", "code", "code", "open question")
"""Categories of the demo's prompts."""

BUNDLED = {"recurrent": "drafter", "Medusa": "medusa", "EAGLE": "eagle", "two models": "draft"}
"""Folders of the bundled drafters by their labels."""

DEMO_REQUESTS = 3
"""Prompts of complete calls with `--demo`, so that it takes less than two minutes on two cores."""

METHOD = (
    "NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES: a label, a folder or Hub id, and optionally a draft shape: @10x4 for "
    "10 complete beams of 4 tokens, @10x4:32 for the 32 most probable candidates of that search, @:32 with the default "
    "beams.  @uncoupled or @10x4,coupled sets whether drafts are ranked with the sampling noise, "
    "@nolookup or @lookup whether prompt lookup joins them."
)


@dataclass(kw_only=True)
class SharedOptions(opt.LoadingOptions):
    """Options of `redrafter bench` and `redrafter sweep`."""

    output: Annotated[Path, typer.Option(help="Folder for measurements.jsonl, results.json, report.md, report.html.")]
    model: Annotated[str | None, typer.Option(help=opt.MODEL)] = None
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="METHOD", help=f"May be repeated; a sweep varies the first.  {METHOD}"),
    ] = None
    prompts: Annotated[list[str] | None, typer.Option(metavar="FILE", help=opt.PROMPT_ROWS)] = None
    by: Annotated[
        str, typer.Option(metavar="KEY", help="Key of a row's category; a file without this key is one category.")
    ] = "category"
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use N prompts per category, evenly spaced.  \\[default: all]")
    ] = None
    template_kwargs: opt.TemplateKwargs = None
    max_new_tokens: opt.NewTokens = 128
    seed: Annotated[int, typer.Option(min=0, help="Seed for sampling.")] = 0
    compile: opt.Compile = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the measurements in the output folder and start again.")
    ] = False
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no further measurement after this time, and write the report.")
    ] = None
    demo: Annotated[bool, typer.Option("--demo", help="Measure all bundled drafters on the demo's eight prompts.")] = (
        False
    )

    def methods(self) -> list[MethodSpec]:
        """The methods to measure: with `--demo` first the bundled ones.  Raises RedrafterError."""
        from redrafter.bench.methods import parse_methods

        if self.demo and self.model is not None:
            raise RedrafterError("--demo uses its own model: omit --model.")
        bundled = [f"{name}={demo_folder() / folder}" for name, folder in BUNDLED.items() if self.demo]
        specs = parse_methods([*bundled, *(["prompt lookup=prompt-lookup"] if self.demo else []), *(self.method or [])])
        if self.model is None and not self.demo:
            raise RedrafterError("Give a --model, or --demo for the bundled model and drafters.")
        if not specs:
            raise RedrafterError("Give a --method, such as ours=drafter_folder.")
        if not self.prompts and not self.demo:
            raise RedrafterError("Give --prompts: a file with prompts.")
        return specs

    def model_path(self) -> str:
        """Where the target is."""
        return str(demo_folder() / "redrafter-demo-12m") if self.demo else str(self.model)

    def tasks(self) -> Tasks:
        """The prompts.  Raises RedrafterError for bad rows."""
        from redrafter.bench.tasks import by_category, read

        if self.prompts:
            rows = read(self.prompts, self.by)
        else:
            chats = [[{"role": "user", "content": text}] for text in PROMPTS]
            rows = [("--demo", {"messages": one, self.by: name}) for one, name in zip(chats, CATEGORIES, strict=True)]
        path, variables = self.model_path(), template_variables(self.template_kwargs)
        positions = config_value(path, "max_position_embeddings")
        return by_category(
            rows,
            load_tokenizer(path, variables=variables),
            key=self.by,
            count=self.limit,
            max_tokens=None if positions is None else positions - self.max_new_tokens,
            template_kwargs=variables,
            vocab_size=config_value(path, "vocab_size"),
        )

    def arguments(self, specs: Sequence[MethodSpec]) -> dict[str, Any]:
        """The options that measurements depend on, for the journal and the report."""
        from redrafter.bench.tasks import file_names

        bundled, folder = "the bundled pair's", demo_folder()
        return {
            "model": bundled if self.demo else self.model,
            "methods": {s.label: bundled if Path(s.path).is_relative_to(folder) else s.location for s in specs},
            "data": file_names(self.prompts) if self.prompts else ["the demo's prompts"],
            "by": self.by,
            "prompts": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "compile": self.compile,
        }


@dataclass(kw_only=True)
class BenchOptions(SharedOptions):
    """Options of `redrafter bench`."""

    temperatures: Annotated[str, typer.Option(help="Temperatures; 0 is greedy decoding.")] = "0,1"
    answers: Annotated[
        str | None,
        typer.Option(
            help="Lengths of complete calls in tokens, or none.  \\[default: 64,128,512; with --demo 64]",
        ),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rounds in which everything is measured; medians are reported.  \\[default: 3; with --demo 2]"
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts decoded together.")] = 1
    batches: Annotated[
        str | None, typer.Option(help="Also measure throughput and latency at these batch sizes, such as 1,2,4,8.")
    ] = None
    transformers: Annotated[bool, typer.Option(help="Also measure transformers' generate without a drafter.")] = True

    def comparison(self) -> Comparison:
        """What to measure.  Raises RedrafterError for a bad list."""
        from redrafter.bench.units import Comparison

        lengths = self.answers or ("64" if self.demo else "64,128,512")
        return Comparison(
            temperatures=numbers(self.temperatures, "--temperatures"),
            batch=self.batch_size,
            batches=[] if self.batches is None else whole_numbers(self.batches, "--batches"),
            rounds=self.rounds or (2 if self.demo else 3),
            answers=[] if lengths == "none" else whole_numbers(lengths, "--answers"),
            transformers=self.transformers,
        )


@command("Measure")
def bench(options: BenchOptions) -> None:
    """Compare drafting methods: complete calls, decoding, acceptance and equality of texts, in one report.

    Run the same command again to resume an interrupted benchmark.
    """
    from redrafter.bench.report import check_packages
    from redrafter.bench.runner import MAX_REQUESTS

    check_packages()
    comparison = options.comparison()
    requests = DEMO_REQUESTS if options.demo and options.answers is None else MAX_REQUESTS
    arguments = {
        "command": "bench",
        "batch_size": comparison.batch,
        "batches": comparison.batches,
        "transformers": comparison.transformers,
        "temperatures": comparison.temperatures,
        "answers": comparison.answers,
        "requests": requests,
        "rounds": comparison.rounds,
    }
    from redrafter.bench.comparing import compare

    batches = [comparison.batch, *comparison.batches]
    run(options, batches, arguments, lambda setup, methods, on_unit: compare(setup, methods, on_unit, comparison))


def run(options: SharedOptions, batches: list[int], arguments: dict[str, Any], measure: Measure) -> None:
    """Loads everything, measures, and writes the report.  Raises RedrafterError for bad input before it measures.

    `batches` are the batch sizes that each method must support; `arguments` are the command's own options.
    """
    specs = options.methods()
    path = options.model_path()
    check_model_path(path)
    for spec in specs:
        check_drafter_path(spec.path)
    check_bench_folder(options.output, inputs=[path, *(options.prompts or []), *(spec.path for spec in specs)])
    with locked(options.output):
        from redrafter.bench.comparing import BenchSetup
        from redrafter.bench.methods import load_methods
        from redrafter.bench.runner import MAX_REQUESTS, RunOptions

        tasks = options.tasks()
        model, _ = load_model(path, options.dtype, options.device, dequantize=options.dequantize)
        methods = load_methods(specs, model, batches, any_target=options.any_target)
        run = RunOptions(options.max_new_tokens, options.seed, options.compile, arguments.get("requests", MAX_REQUESTS))
        arguments |= options.arguments(specs)
        setup = BenchSetup(model, tasks, run, arguments, options.output, options.overwrite, options.minutes)
        with _progress() as on_unit:
            results = measure(setup, methods, on_unit)
        _write(results, options.output)


@contextmanager
def _progress() -> Iterator[OnUnit]:
    """Shows on stderr what is being measured."""
    from redrafter.bench.tables import sampling_name
    from redrafter.utils.progress import Progress

    current = ""
    with ExitStack() as stack:
        progress = Progress("measurements", 0, details=lambda: current)

        def on_unit(unit: Unit, number: int, total: int) -> None:
            nonlocal current
            rows = f", {unit.batch} rows" if unit.batch > 1 else ""
            rows += f", calls of {unit.new_tokens} tokens" if unit.new_tokens else ""
            current = f"{unit.method}: {unit.category}, {sampling_name(unit.temperature)}{rows}"
            progress.update(number, total)
            if not number:  # errors in the input were raised before
                stack.enter_context(progress)

        yield on_unit
        current = ""
        progress.update(progress.total)


def _write(results: Results, output: Path) -> None:
    """Writes the report and prints its summary, what is missing, and last the table of complete calls."""
    from redrafter.bench.report import write
    from redrafter.bench.summary import lead
    from redrafter.bench.tables import calls, temperatures

    files = write(results, output)
    for sentence in lead(results):
        typer.echo(sentence)
    for sentence in results["failed"]:
        typer.echo(f"not measured: {sentence}", err=True)
    typer.echo(f"Wrote {', '.join(str(file) for file in files)}.")
    for temperature in temperatures(results.get("calls", [])):
        table = calls(results, temperature)
        typer.echo(f"\n{table.title}, end to end:\n{table.markdown}")
