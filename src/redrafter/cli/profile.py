"""`redrafter profile`: where the time of a step goes on this machine, and what bounds it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.loading import (
    AnyTarget,
    Budget,
    Compile,
    Device,
    DoSample,
    DrafterOrModel,
    Dtype,
    Length,
    Width,
)
from redrafter.errors import RedrafterError, reason
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from redrafter.core.shapes import DraftShape
    from redrafter.evaluation.profiling import Measurement, StepProfiler
    from redrafter.proposers import Drafter

CONTEXT = 2000


def profile(
    model: Annotated[str | None, typer.Option(help="The target: a folder or hub id.")] = None,
    drafter: Annotated[
        str | None, typer.Option(help=f"{DrafterOrModel}  \\[default: a fresh one of the released form]")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights instead of a model: llama-7b, llama-8b, llama-1b or tiny.")
    ] = None,
    exit_dim: Annotated[int | None, typer.Option(min=1, help="Width of a fresh drafter's blocks.")] = None,
    draft_vocab: Annotated[int | None, typer.Option(min=1, help="Tokens that a fresh drafter scores.")] = None,
    beam_width: Width = None,
    beam_length: Length = None,
    node_budget: Budget = None,
    nodes: Annotated[str, typer.Option(help="Sizes of trees to verify.")] = "1,8,16,32,64",
    widths: Annotated[str, typer.Option(help="Beams to draft.")] = "1,4,10,50",
    context: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens in the cache.  \\[default: {CONTEXT}, or what fits]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    do_sample: DoSample = False,
    any_target: AnyTarget = False,
    repeats: Annotated[int, typer.Option(min=1, help="Times to measure each; the median is shown.")] = 50,
    compile: Compile = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Time the step and its parts, beside the bandwidth that bounds them; ends with a line of JSON."""
    from redrafter.cli.loading import whole_numbers

    if (model is None) == (shape is None):
        raise RedrafterError("Give either --model or --shape.")
    if shape is not None and drafter is not None:
        raise RedrafterError("A --drafter goes with its --model, not with --shape.")
    if drafter is not None and (exit_dim or draft_vocab):
        raise RedrafterError("--exit-dim and --draft-vocab are for a fresh drafter, not with --drafter.")
    sizes, beams = whole_numbers(nodes, "--nodes"), whole_numbers(widths, "--widths")

    check_model_path(model)
    check_drafter_path(drafter)
    from rich.console import Console

    from redrafter.cli.loading import load_drafter, load_model
    from redrafter.evaluation.profiling import bandwidth, device_name, measurements
    from redrafter.heads.synthetic import random_drafter
    from redrafter.proposers.base import describe_drafts

    target = load_model(model, dtype, device)[0] if model else _stand_in(str(shape), dtype, device)
    if drafter:
        method = load_drafter(drafter, target, any_target=any_target)
    else:
        method = random_drafter(target, exit_dim, draft_vocab)
    bench, drafting, wider = _bench(
        target,
        method,
        (beam_width, beam_length, node_budget),
        widths=beams,
        nodes=max(sizes),
        context=context,
        batch=batch,
        do_sample=do_sample,
        repeats=repeats,
        compile=compile,
    )
    console = Console(highlight=False, soft_wrap=True)
    ceiling, where = bandwidth(target.device, repeats), device_name(target.device)
    console.print(f"{where}: one pass over a large array reads and writes {ceiling / 1e9:,.1f} GB/s")
    console.print(
        f"a step reads {bench.weight_bytes / 1e6:,.1f} MB of weights and {bench.cache_bytes / 1e6:,.1f} MB of keys and "
        f"values ({batch} x {bench.context:,} tokens): at least {_floor(bench, ceiling):.3f} ms"
    )
    found = list(measurements(bench, drafting, nodes=sizes, widths=[one.beam_width for one in wider]))
    _table(console, found, describe_drafts(bench.proposer(drafting), drafting))
    told = {"target": model or shape, "device": where, "shape": drafting.model_dump(exclude={"batch"})}
    typer.echo(json.dumps(told | _plain(bench, ceiling, found), ensure_ascii=False))


def _floor(bench: StepProfiler, bytes_per_second: float) -> float:
    """Milliseconds of a step that does nothing but read."""
    return 1e3 * (bench.weight_bytes + bench.cache_bytes) / bytes_per_second


def _stand_in(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """A random model of a well-known shape."""
    import torch

    from redrafter.cli.loading import check_dtype, chosen_device
    from redrafter.heads.synthetic import random_model

    check_dtype(dtype)
    place = chosen_device(device)
    kind = ("float32" if place == "cpu" else "bfloat16") if dtype == "auto" else dtype
    try:
        return random_model(shape, dtype=getattr(torch, kind), device=torch.device(place))
    except (RuntimeError, AssertionError) as error:
        raise RedrafterError(f"The model cannot be put on --device {device}: {reason(error)}.") from error


def _bench(
    model: PreTrainedModel,
    drafter: Drafter,
    told: tuple[int | None, int | None, int | None],
    *,
    widths: list[int],
    nodes: int,
    context: int | None,
    batch: int,
    do_sample: bool,
    repeats: int,
    compile: bool,
) -> tuple[StepProfiler, DraftShape, list[DraftShape]]:
    """Rows of random tokens; the shape that is drafted, as told, as tuned, or as the drafter was made for; and the same
    of all `widths` that it can be drafted in.
    """
    import torch

    from redrafter.cli.loading import check_context
    from redrafter.core.shapes import ShapeOverrides
    from redrafter.decoding.settings import ONE_TEXT
    from redrafter.engine.request import request
    from redrafter.evaluation.profiling import StepProfiler
    from redrafter.proposers import method_of
    from redrafter.proposers.base import draftable, measured_shape

    check_context(context, model)
    config = model.config.get_text_config()
    length = context or min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT)
    method = method_of(drafter)
    shape = measured_shape(method, batch, ShapeOverrides(*told))
    texts = torch.randint(config.vocab_size, (batch, length)).tolist()
    asked = request(model, drafter, texts, do_sample=do_sample, stop_strings=(), **ONE_TEXT, shape=shape)
    wider, _ = draftable(method, asked.target, [shape.model_copy(update={"beam_width": one}) for one in widths])
    nodes = max(nodes, *(one.max_nodes for one in (shape, *wider)))
    return StepProfiler(asked, method, nodes=nodes, repeats=repeats, compile=compile), shape, wider


def _plain(bench: StepProfiler, ceiling: float, found: list[Measurement]) -> dict[str, Any]:
    """For JSON."""
    alone = found[0].milliseconds
    return {
        "dtype": str(bench.target.dtype).removeprefix("torch."),
        "batch": bench.batch,
        "context": bench.context,
        "bytes_per_second": round(ceiling),
        "weight_bytes": bench.weight_bytes,
        "cache_bytes": bench.cache_bytes,
        "floor_ms": round(_floor(bench, ceiling), 5),
        "pieces": [
            {
                "name": one.name,
                "size": one.size,
                "ms": round(one.milliseconds, 5),
                "ratio": round(one.milliseconds / alone, 4),
            }
            for one in found
        ],
    }


def _table(console: Console, found: list[Measurement], drafted: str) -> None:
    """Every piece beside the autoregressive step."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("", "ms", "x autoregressive"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        size = "" if one.size is None else str(one.size)
        ratio = one.milliseconds / found[0].milliseconds
        table.add_row(one.name, size, f"{one.milliseconds:.3f}", f"{ratio:.3f}")
    console.print(table)
    console.print(f"rest and drafted step: {drafted}")
