"""`redrafter profile`: times the parts of a decoding step on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from redrafter.cli import options as opt
from redrafter.cli.app import command
from redrafter.errors import RedrafterError, reason
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from redrafter.core.shapes import DraftShape
    from redrafter.evaluation.profiling import Measurement, StepProfiler
    from redrafter.proposers import Drafter

DEFAULT_CONTEXT = 2000


@dataclass(kw_only=True)
class ProfileOptions(opt.ShapeOptions, opt.LoadingOptions):
    """Options of `redrafter profile`."""

    model: Annotated[str | None, typer.Option(help="Target model: folder or Hub id.")] = None
    drafter: Annotated[
        str | None, typer.Option(help=f"{opt.DRAFTER}  \\[default: a recurrent drafter with random weights]")
    ] = None
    shape: Annotated[
        Literal["llama-7b", "llama-8b", "llama-1b", "tiny"] | None,
        typer.Option(help="Random weights of this shape, instead of --model."),
    ] = None
    exit_dim: Annotated[int | None, typer.Option(min=1, help="Width of the random drafter's residual blocks.")] = None
    draft_vocab: Annotated[int | None, typer.Option(min=1, help="Draft vocabulary size of the random drafter.")] = None
    nodes: Annotated[str, typer.Option(help="Tree sizes to verify.")] = "1,8,16,32,64"
    widths: Annotated[str, typer.Option(help="Beam widths to draft.")] = "1,4,10,50"
    context: Annotated[
        int | None,
        typer.Option(min=1, help=f"Tokens in the KV cache.  \\[default: {DEFAULT_CONTEXT}, or the model's maximum]"),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 1
    do_sample: opt.DoSample = False
    repeats: Annotated[int, typer.Option(min=1, help="Measurements per part; the median is shown.")] = 50
    compile: opt.Compile = False

    def check(self) -> None:
        """Raises RedrafterError for options that do not go together."""
        if (self.model is None) == (self.shape is None):
            raise RedrafterError("Give either --model or --shape.")
        if self.shape is not None and self.drafter is not None:
            raise RedrafterError("--drafter needs its --model instead of --shape.")
        if self.drafter is not None and (self.exit_dim or self.draft_vocab):
            raise RedrafterError("--exit-dim and --draft-vocab are for the random drafter: leave out --drafter.")
        check_model_path(self.model)
        check_drafter_path(self.drafter)


@command("Measure")
def profile(options: ProfileOptions) -> None:
    """Time a decoding step and its parts, next to the memory bandwidth that limits them.

    The last line is JSON.
    """
    from redrafter.cli.parsing import whole_numbers

    nodes, widths = whole_numbers(options.nodes, "--nodes"), whole_numbers(options.widths, "--widths")
    options.check()
    from rich.console import Console

    from redrafter.cli.loading import load_drafter, load_model
    from redrafter.evaluation.profiling import bandwidth, device_name, measurements
    from redrafter.heads.synthetic import random_drafter
    from redrafter.proposers.base import describe_drafts

    model = (
        load_model(options.model, options.dtype, options.device, dequantize=options.dequantize)[0]
        if options.model
        else _random_model(options)
    )
    if options.drafter:
        drafter = load_drafter(options.drafter, model, any_target=options.any_target)
    else:
        drafter = random_drafter(model, options.exit_dim, options.draft_vocab)
    profiler, shape, wider = _profiler(model, drafter, options, widths=widths, nodes=max(nodes))
    console = Console(highlight=False, soft_wrap=True)
    speed, device = bandwidth(model.device, options.repeats), device_name(model.device)
    console.print(f"{device}: one pass over a large array reads and writes {speed / 1e9:,.1f} GB/s")
    console.print(
        f"a step reads {profiler.weight_bytes / 1e6:,.1f} MB of weights and {profiler.cache_bytes / 1e6:,.1f} MB of "
        f"keys and values ({options.batch} x {profiler.context:,} tokens): at least {_floor_ms(profiler, speed):.3f} ms"
    )
    timed = list(measurements(profiler, shape, nodes=nodes, widths=[one.beam_width for one in wider]))
    _print_table(timed)
    backend = profiler.runner(shape).describe()
    for name, value in backend.items():
        console.print(f"{name}: {value}")
    console.print(f"rest and drafted step: {describe_drafts(profiler.proposer(shape), shape)}")
    about = {"target": options.model or options.shape, "device": device, "shape": shape.model_dump(exclude={"batch"})}
    about["backend"] = backend
    typer.echo(json.dumps(about | _as_dict(profiler, speed, timed), ensure_ascii=False))


def _floor_ms(profiler: StepProfiler, bytes_per_second: float) -> float:
    """Milliseconds that a step takes at least, for reading weights, keys and values."""
    return 1e3 * (profiler.weight_bytes + profiler.cache_bytes) / bytes_per_second


def _random_model(options: ProfileOptions) -> PreTrainedModel:
    """A model with random weights in the shape of `--shape`."""
    import torch

    from redrafter.cli.loading import chosen_device
    from redrafter.heads.synthetic import random_model

    device = chosen_device(options.device)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        return random_model(str(options.shape), dtype=getattr(torch, dtype), device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise RedrafterError(f"The model cannot be moved to --device {options.device}: {reason(error)}.") from error


def _profiler(
    model: PreTrainedModel, drafter: Drafter, options: ProfileOptions, *, widths: list[int], nodes: int
) -> tuple[StepProfiler, DraftShape, list[DraftShape]]:
    """A profiler with rows of random tokens, the shape of a drafted step, and the shapes with other `widths`.

    Widths that the drafter does not support are left out.
    """
    import torch

    from redrafter.cli.loading import check_context
    from redrafter.decoding.settings import ONE_TEXT
    from redrafter.engine.request import request
    from redrafter.evaluation.profiling import StepProfiler
    from redrafter.proposers import method_of
    from redrafter.proposers.base import draftable, measured_shape

    check_context(options.context, model)
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    texts = torch.randint(config.vocab_size, (options.batch, options.context or min(DEFAULT_CONTEXT, most))).tolist()
    method = method_of(drafter)
    shape = measured_shape(method, options.batch, options.overrides())
    made = request(model, drafter, texts, do_sample=options.do_sample, stop_strings=(), **ONE_TEXT, shape=shape)
    wider, _ = draftable(method, made.target, [shape.model_copy(update={"beam_width": one}) for one in widths])
    nodes = max(nodes, *(one.max_nodes for one in (shape, *wider)))
    profiler = StepProfiler(made, method, nodes=nodes, repeats=options.repeats, compile=options.compile)
    return profiler, shape, wider


def _as_dict(profiler: StepProfiler, bytes_per_second: float, timed: list[Measurement]) -> dict[str, Any]:
    plain_ms = timed[0].milliseconds
    return {
        "dtype": str(profiler.target.dtype).removeprefix("torch."),
        "batch": profiler.batch,
        "context": profiler.context,
        "bytes_per_second": round(bytes_per_second),
        "weight_bytes": profiler.weight_bytes,
        "cache_bytes": profiler.cache_bytes,
        "floor_ms": round(_floor_ms(profiler, bytes_per_second), 5),
        "pieces": [
            {
                "name": one.name,
                "size": one.size,
                "ms": round(one.milliseconds, 5),
                "ratio": round(one.milliseconds / plain_ms, 4),
            }
            for one in timed
        ],
    }


def _print_table(timed: list[Measurement]) -> None:
    """The times, also as multiples of the autoregressive step."""
    from redrafter.cli.tables import print_figures

    rows = []
    for one in timed:
        size = "" if one.size is None else str(one.size)
        rows.append((one.name, size, f"{one.milliseconds:.3f}", f"{one.milliseconds / timed[0].milliseconds:.3f}"))
    print_figures(("part", "size", "ms", "x autoregressive"), rows, left=("part",))
