"""`redrafter profile`: times the parts of a decoding step on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.cli.app import command
from redrafter.cli.options import DRAFTER, Compile, DoSample, LoadingOptions, ShapeOptions, values_of
from redrafter.errors import RedrafterError, reason
from redrafter.utils.paths import check_drafter_path, check_model_path

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from redrafter.core.shapes import DraftShape
    from redrafter.evaluation.profiling import Bench, Piece
    from redrafter.proposers import Method

DEFAULT_CONTEXT = 2000


@dataclass(kw_only=True)
class ProfileOptions(ShapeOptions, LoadingOptions):
    """Options of `redrafter profile`."""

    model: Annotated[str | None, typer.Option(help="Target model: folder or Hub id.")] = None
    drafter: Annotated[
        str | None, typer.Option(help=f"{DRAFTER}  \\[default: a recurrent drafter with random weights]")
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of this shape instead of --model: llama-7b, llama-8b, llama-1b or tiny."),
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
    do_sample: DoSample = False
    repeats: Annotated[int, typer.Option(min=1, help="Measurements per part; the median is shown.")] = 50
    compile: Compile = False

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

    from redrafter.cli.loading import load_method, load_model
    from redrafter.evaluation.profiling import bandwidth, device_name, pieces
    from redrafter.heads.synthetic import random_drafter
    from redrafter.proposers.trees import drafted_in_words

    model = load_model(options.model, options.dtype, options.device)[0] if options.model else _random_model(options)
    if options.drafter:
        method = load_method(options.drafter, model, any_target=options.any_target)
    else:
        method = random_drafter(model, options.exit_dim, options.draft_vocab)
    bench, drafted, wider = _bench(model, method, options, widths=widths, nodes=max(nodes))
    console = Console(highlight=False, soft_wrap=True)
    speed, device = bandwidth(model.device, options.repeats), device_name(model.device)
    console.print(f"{device}: one pass over a large array reads and writes {speed / 1e9:,.1f} GB/s")
    console.print(
        f"a step reads {bench.weight_bytes / 1e6:,.1f} MB of weights and {bench.cache_bytes / 1e6:,.1f} MB of keys and "
        f"values ({options.batch} x {bench.context:,} tokens): at least {_floor_ms(bench, speed):.3f} ms"
    )
    timed = list(pieces(bench, drafted, nodes=nodes, widths=[shape.beam_width for shape in wider]))
    console.print(_table(timed))
    console.print(f"rest and drafted step: {drafted_in_words(bench.proposer(drafted), drafted)}")
    about = {"target": options.model or options.shape, "device": device, "shape": drafted.model_dump(exclude={"batch"})}
    typer.echo(json.dumps(about | _as_dict(bench, speed, timed), ensure_ascii=False))


def _floor_ms(bench: Bench, bytes_per_second: float) -> float:
    """Milliseconds that a step takes at least, for reading weights, keys and values."""
    return 1e3 * (bench.weight_bytes + bench.cache_bytes) / bytes_per_second


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


def _bench(
    model: PreTrainedModel, method: Method, options: ProfileOptions, *, widths: list[int], nodes: int
) -> tuple[Bench, DraftShape, list[DraftShape]]:
    """What times the steps, on rows of random tokens; the shape of a draft; and the shapes of these `widths`.

    Widths that the method cannot draft are left out.
    """
    import torch

    from redrafter.cli.loading import check_context
    from redrafter.core.shapes import DraftShape
    from redrafter.decoding.settings import ONE_TEXT
    from redrafter.engine.request import request
    from redrafter.evaluation.profiling import Bench
    from redrafter.proposers.base import draftable, measured

    check_context(options.context, model)
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    texts = torch.randint(config.vocab_size, (options.batch, options.context or min(DEFAULT_CONTEXT, most))).tolist()
    shape = measured(method, options.batch, *values_of(options, ShapeOptions).values())
    made = request(model, method, texts, do_sample=options.do_sample, stop_strings=(), **ONE_TEXT, **shape)
    width, length, budget = method.drafting(options.batch, *shape.values())
    drafted = DraftShape(beam_width=width, beam_length=length, node_budget=budget)
    wider, _ = draftable(method, made.target, [drafted.model_copy(update={"beam_width": one}) for one in widths])
    bench = Bench.of(made, method, wider, nodes=nodes, repeats=options.repeats, compile=options.compile)
    return bench, drafted, wider


def _as_dict(bench: Bench, bytes_per_second: float, timed: list[Piece]) -> dict[str, Any]:
    plain_ms = timed[0].milliseconds
    return {
        "dtype": str(bench.target.dtype).removeprefix("torch."),
        "batch": bench.batch,
        "context": bench.context,
        "bytes_per_second": round(bytes_per_second),
        "weight_bytes": bench.weight_bytes,
        "cache_bytes": bench.cache_bytes,
        "floor_ms": round(_floor_ms(bench, bytes_per_second), 5),
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


def _table(timed: list[Piece]) -> Table:
    """The times, also as multiples of the autoregressive step."""
    from rich import box
    from rich.table import Table

    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "ms", "x autoregressive"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in timed:
        size = "" if one.size is None else str(one.size)
        ratio = one.milliseconds / timed[0].milliseconds
        table.add_row(one.name, size, f"{one.milliseconds:.3f}", f"{ratio:.3f}")
    return table
