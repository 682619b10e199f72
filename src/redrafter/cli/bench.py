"""`redrafter bench` and `redrafter sweep`: ways to draft side by side, and one of them in many shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.demo import PROMPTS
from redrafter.cli.loading import (
    PROMPT_ROWS,
    AnyTarget,
    Compile,
    Device,
    Dtype,
    NewTokens,
    Sources,
    TemplateKwargs,
    claim,
)
from redrafter.errors import RedrafterError
from redrafter.utils.outputs import check_bench_folder
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from redrafter.bench.comparing import Setting, Tell
    from redrafter.bench.contenders import Contender, Told
    from redrafter.bench.tables import Results
    from redrafter.bench.units import Unit

TASKS = ("dialogue", "dialogue", "dialogue", "dialogue", "maths", "code", "code", "open question")
"""Of the demo's prompts."""

BUNDLED = {"recurrent": "drafter", "Medusa": "medusa", "EAGLE": "eagle", "two models": "draft"}
"""Folders beside the demo's model, by what they are called in its report."""

Target = Annotated[
    str | None, typer.Option("--model", help="The target: a folder or hub id of a Hugging Face causal language model.")
]
Prompts = Annotated[list[str] | None, typer.Option(metavar="FILE", help=f"{PROMPT_ROWS} {Sources}")]
Output = Annotated[Path, typer.Option(help="A folder for measurements.jsonl, results.json, report.md and report.html.")]
By = Annotated[
    str, typer.Option(metavar="KEY", help="The rows' key that names their category; without it a file is one.")
]
Rounds = Annotated[int, typer.Option(min=1, help="Times that everything is measured, in turn; medians are shown.")]
SeedOfAll = Annotated[int, typer.Option(min=0, help="Of all draws.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Throw away what the folder's measurements.jsonl holds, and begin anew.")
]
Minutes = Annotated[
    float | None, typer.Option(min=0, help="After which nothing more is begun; the report is of what there is by then.")
]
ROUNDS = 3
ANSWERS = "64,128,512"
DEMO_ANSWERS, DEMO_ROUNDS, DEMO_REQUESTS = "64", 2, 3
"""What `bench --demo` measures unless an option says otherwise, so that it takes less than two minutes on two cores."""

Demo = Annotated[bool, typer.Option("--demo", help="Measure all that is bundled on the demo's eight prompts.")]
MethodHelp = (
    "NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES: what to call it, where it lies, and perhaps how it drafts: "
    "@10x4 is 10 whole beams of 4 tokens, @10x4:32 the 32 most probable nodes of what they weigh, @:32 the same with "
    "the folder's own beams; @uncoupled or @10x4,coupled says whether drafts are ranked by the noise of the draws."
)


def bench(
    context: typer.Context,
    output: Output,
    model: Target = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", metavar="METHOD", help=f"Once or more: {MethodHelp}")
    ] = None,
    prompts: Prompts = None,
    by: By = "category",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use N prompts of each category, evenly spaced.  \\[default: all]")
    ] = None,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 128,
    temperatures: Annotated[str, typer.Option(help="0 is greedy decoding.")] = "0,1",
    answers: Annotated[
        str | None,
        typer.Option(
            help="Tokens of complete calls, timed end to end, or none.  "
            f"\\[default: {ANSWERS}; with --demo {DEMO_ANSWERS}]"
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Times that everything is measured; medians are shown.  "
            f"\\[default: {ROUNDS}; with --demo {DEMO_ROUNDS}]",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    batches: Annotated[
        str | None, typer.Option(help="Also throughput against latency with so many rows together, as 1,2,4,8.")
    ] = None,
    transformers: Annotated[
        bool, typer.Option(help="Also measure transformers' own generate, without a drafter.")
    ] = True,
    seed: SeedOfAll = 0,
    compile: Compile = False,
    overwrite: Overwrite = False,
    minutes: Minutes = None,
    demo: Demo = False,
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare drafting methods: complete calls, decoding alone, acceptance and equality of texts, in one report.

    Run again with the same arguments, it goes on where it was stopped.
    """
    from redrafter.bench import plots
    from redrafter.bench.contenders import read_methods
    from redrafter.bench.units import REQUESTS
    from redrafter.cli.loading import numbers, template_variables, whole_numbers

    kinds = numbers(temperatures, "--temperatures")
    together = [] if batches is None else whole_numbers(batches, "--batches")
    lengths = answers or (DEMO_ANSWERS if demo else ANSWERS)
    calls = [] if lengths == "none" else whole_numbers(lengths, "--answers")
    rounds = rounds or (DEMO_ROUNDS if demo else ROUNDS)
    told = read_methods([*_demo_methods(demo, model), *(method or [])])
    plots.required()
    shared = Shared(
        output=output,
        model=model,
        prompts=prompts,
        by=by,
        limit=limit,
        template_kwargs=template_variables(template_kwargs),
        max_new_tokens=max_new_tokens,
        seed=seed,
        compile=compile,
        overwrite=overwrite,
        minutes=minutes,
        demo=demo,
        any_target=any_target,
        dtype=dtype,
        device=device,
    )
    setting, methods = shared.setting(
        context,
        told,
        [batch_size, *together],
        command="bench",
        batch_size=batch_size,
        batches=together,
        transformers=transformers,
        temperatures=kinds,
        answers=calls,
        requests=DEMO_REQUESTS if demo and answers is None else REQUESTS,
        rounds=rounds,
    )
    from redrafter.bench.comparing import compare

    with _telling() as tell:
        found = compare(
            setting,
            methods,
            transformers=transformers,
            temperatures=kinds,
            batch=batch_size,
            batches=together,
            rounds=rounds,
            answers=calls,
            tell=tell,
        )
    _written(found, output)


def sweep(
    context: typer.Context,
    output: Output,
    model: Target = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help=f"The first goes through all axes, further ones are measured beside it as they are. {MethodHelp}",
        ),
    ] = None,
    prompts: Prompts = None,
    by: By = "category",
    limit: Annotated[int, typer.Option(min=1, help="Use N prompts of each category, evenly spaced.")] = 2,
    template_kwargs: TemplateKwargs = None,
    max_new_tokens: NewTokens = 64,
    widths: Annotated[str, typer.Option(help="Beams to draft.")] = "1,2,4,8,16,32,64",
    lengths: Annotated[str, typer.Option(help="Tokens of a beam.")] = "1,2,3,4,5,6,7,8",
    budgets: Annotated[str, typer.Option(help="Most probable nodes, of the method's own beams.")] = "4,8,16,32,64",
    batches: Annotated[
        str, typer.Option(help="Rows decoded together, in the method's own shape.")
    ] = "1,2,4,8,16,32,64",
    temperatures: Annotated[
        str, typer.Option(help="Of the method's own shape, coupled to the draws' noise and not; 0 is greedy.")
    ] = "0,0.3,0.7,1",
    temperature: Annotated[float, typer.Option(min=0.0, help="At which all other axes are measured.")] = 0.0,
    rounds: Rounds = 3,
    seed: SeedOfAll = 0,
    compile: Compile = False,
    overwrite: Overwrite = False,
    minutes: Minutes = None,
    demo: Demo = False,
    any_target: AnyTarget = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure one way to draft in many shapes, batches and temperatures, perhaps beside others: heat maps and curves.

    Run again with the same arguments, it goes on where it was stopped.
    """
    from redrafter.bench import plots
    from redrafter.bench.contenders import read_methods
    from redrafter.cli.loading import numbers, template_variables, whole_numbers

    lists = {"--widths": widths, "--lengths": lengths, "--budgets": budgets, "--batches": batches}
    beams, depths, nodes, together = (whole_numbers(value, option) for option, value in lists.items())
    kinds = numbers(temperatures, "--temperatures")
    told = read_methods([*_demo_methods(demo, model), *(method or [])])
    plots.required()
    shared = Shared(
        output=output,
        model=model,
        prompts=prompts,
        by=by,
        limit=limit,
        template_kwargs=template_variables(template_kwargs),
        max_new_tokens=max_new_tokens,
        seed=seed,
        compile=compile,
        overwrite=overwrite,
        minutes=minutes,
        demo=demo,
        any_target=any_target,
        dtype=dtype,
        device=device,
    )
    setting, methods = shared.setting(
        context,
        told,
        [1, *together],
        command="sweep",
        batch_size=1,
        axes={"widths": beams, "lengths": depths, "budgets": nodes, "batches": together},
        temperature=temperature,
        temperatures=kinds,
        rounds=rounds,
    )
    from redrafter.bench.comparing import Axes
    from redrafter.bench.comparing import sweep as measure

    axes = Axes(beams, depths, nodes, together, kinds)
    with _telling() as tell:
        found = measure(setting, methods, axes, temperature=temperature, rounds=rounds, tell=tell)
    _written(found, output)


def _demo_methods(demo: bool, model: str | None) -> list[str]:
    """Every bundled way to draft, the recurrent drafter first, and prompt lookup, which needs no folder."""
    from redrafter.cli.loading import demo_folder

    if demo and model is not None:
        raise RedrafterError("--demo brings its own model: leave --model out.")
    if not demo:
        return []
    bundled = (f"{name}={demo_folder() / folder}" for name, folder in BUNDLED.items())
    return [*bundled, "prompt lookup=prompt-lookup"]


def _is_bundled(one: Told) -> bool:
    from redrafter.cli.loading import demo_folder

    return Path(one.path).is_relative_to(demo_folder())


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The options that both commands have and that what they measure depends on."""

    output: Path
    model: str | None
    prompts: list[str] | None
    by: str
    limit: int | None
    template_kwargs: dict[str, Any]
    max_new_tokens: int
    seed: int
    compile: bool
    overwrite: bool
    minutes: float | None
    demo: bool
    any_target: bool
    dtype: str
    device: str

    def setting(
        self, context: typer.Context, told: list[Told], sizes: list[int], **asked: Any
    ) -> tuple[Setting, list[Contender]]:
        """Everything loaded and checked, for `sizes` of rows together; nothing is measured or written yet.

        `asked`: the command's own options, for the journal and the report.
        """
        if self.model is None and not self.demo:
            raise RedrafterError("Give a --model, or --demo for the bundled pair.")
        if not told:
            raise RedrafterError("Give a --method, as ours=drafter_folder.")
        if not self.prompts and not self.demo:
            raise RedrafterError("Give --prompts: a file of prompts.")
        path = str(self.model)
        if self.demo:
            from redrafter.cli.loading import demo_folder

            path = str(demo_folder() / "redrafter-demo-12m")
        check_model_path(path)
        for one in told:
            check_drafter_path(one.path)
        check_bench_folder(self.output, inputs=[path, *(self.prompts or []), *(one.path for one in told)])
        claim(context, self.output)

        from redrafter.bench.comparing import Setting
        from redrafter.bench.contenders import load
        from redrafter.bench.tasks import by_category, file_names, read
        from redrafter.bench.units import REQUESTS, Asked
        from redrafter.cli.loading import config_value, load_model, load_tokenizer

        records = read(self.prompts, self.by) if self.prompts else _demo_rows(self.by)
        positions = config_value(path, "max_position_embeddings")
        tasks = by_category(
            records,
            load_tokenizer(path, variables=self.template_kwargs),
            key=self.by,
            count=self.limit,
            room=None if positions is None else positions - self.max_new_tokens,
            template_kwargs=self.template_kwargs,
            vocab_size=config_value(path, "vocab_size"),
        )
        target, _ = load_model(path, self.dtype, self.device)
        methods = load(told, target, sizes, any_target=self.any_target)
        arguments = asked | {
            "model": "the bundled pair's" if self.demo else path,
            "methods": {one.label: "the bundled pair's" if _is_bundled(one) else one.shown for one in told},
            "data": file_names(self.prompts) if self.prompts else ["the demo's prompts"],
            "by": self.by,
            "prompts": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "compile": self.compile,
        }
        common = Asked(self.max_new_tokens, self.seed, self.compile, asked.get("requests", REQUESTS))
        return Setting(target, tasks, common, arguments, self.output, self.overwrite, self.minutes), methods


def _demo_rows(by: str) -> list[tuple[str, dict[str, Any]]]:
    """The demo's prompts as rows of a file."""
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [("--demo", {"messages": chat, by: task}) for chat, task in zip(chats, TASKS, strict=True)]


@contextmanager
def _telling() -> Iterator[Tell]:
    """Progress on stderr that says what is being measured."""
    from redrafter.bench.tables import law
    from redrafter.utils.progress import Progress

    current = [""]
    with ExitStack() as until:
        progress = Progress("measurements", 0, details=lambda: current[0])

        def tell(unit: Unit, number: int, of: int) -> None:
            rows = f", {unit.batch} rows" if unit.batch > 1 else ""
            rows += f", calls of {unit.new_tokens} tokens" if unit.new_tokens else ""
            current[0] = f"{unit.method}: {unit.category}, {law(unit.temperature)}{rows}"
            progress.update(number, of)
            if not number:  # whatever is refused is refused before
                until.enter_context(progress)

        yield tell
        current[0] = ""
        progress.update(progress.total)


def _written(found: Results, output: Path) -> None:
    """Writes the report and says what came of it, and what failed; the times of complete calls last."""
    from redrafter.bench.report import lead, write
    from redrafter.bench.tables import calls, temperatures

    files = write(found, output)
    for sentence in lead(found):
        typer.echo(sentence)
    for sentence in found["failed"]:
        typer.echo(f"not measured: {sentence}", err=True)
    typer.echo(f"Wrote {', '.join(str(one) for one in files)}.")
    for temperature in temperatures(found.get("calls", [])):
        table = calls(found, temperature)
        typer.echo(f"\n{table.title}, end to end:\n{table.markdown}")
