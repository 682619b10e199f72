"""Options that several commands share: their types, limits and help texts.  Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

if TYPE_CHECKING:
    from redrafter.core.shapes import ShapeOverrides

OVERWRITE = "pass --overwrite, or choose another --output"
"""Advice in the error about an output folder that already holds a drafter."""

SOURCES = (
    "Files (.jsonl, .json or .parquet; JSON may be compressed as .gz, .xz or .zst), glob patterns, or Hub datasets as "
    "OWNER/NAME[:SPLIT]."
)
PROMPT_ROWS = f"Rows with `messages`, `turns`, `prompt` or another format of docs/training.md. {SOURCES}"
MODEL = "Target model: folder or Hub id of a Hugging Face causal language model, or a .gguf file in one of them."
DRAFTER = (
    "Drafter: folder or Hub id.  Also a smaller model with the same vocabulary, or prompt-lookup, or auto "
    "for the model's own drafter if one is known, else prompt lookup."
)

Model = Annotated[str, typer.Option(help=MODEL)]
Drafter = Annotated[str, typer.Option(help=DRAFTER)]
AnyTarget = Annotated[
    bool,
    typer.Option("--any-target", help="Accept a drafter of another model with the same vocabulary and hidden size."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Data type of the model's weights; auto keeps the stored type."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA if available, else the CPU), cpu, cuda, cuda:1 or mps.")]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Unpack the weights of a .gguf file, instead of keeping them packed where transformers can.",
    ),
]
BeamWidth = Annotated[
    int | None, typer.Option(min=1, help="Number of drafted beams.  \\[default: from the drafter's config]")
]
BeamLength = Annotated[
    int | None,
    typer.Option(
        min=1, help="Drafted tokens per beam, without the guaranteed token.  \\[default: from the drafter's config]"
    ),
]
NodeBudget = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Draft the N most probable candidates of the beam search, the root included, instead of complete beams.  "
        "\\[default: from the drafter's config]",
    ),
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Also draft what followed earlier occurrences of the text's last tokens.  \\[default: with a trained "
        "drafter or a smaller model]",
    ),
]
Fast = Annotated[
    bool,
    typer.Option(help="Use CUDA graphs and Triton kernels on a GPU, packed weights on a CPU.  The text is the same."),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model's layers with torch.compile (CUDA): slower start, faster steps."),
]
DoSample = Annotated[
    bool, typer.Option("--do-sample", help="Sample from the model's distribution instead of greedy decoding.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature; needs --do-sample.  \\[default: from the model's config]")
]
TopK = Annotated[int | None, typer.Option(help="Sample from the K most probable tokens; needs --do-sample.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the smallest set of tokens with total probability P; needs --do-sample."),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens at least P times as probable as the most probable; needs --do-sample."),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed for sampling.  The same seed gives the same texts with any drafter or without one."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Another field of transformers' GenerationConfig, with its value as JSON: --set repetition_penalty=1.1",
    ),
]
Prompts = Annotated[list[str], typer.Option(metavar="FILE", help=PROMPT_ROWS)]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.  \\[default: all]")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Variables for the chat template, such as '{\"enable_thinking\": false}'; a row's own override them.",
    ),
]
Template = Annotated[
    Path | None, typer.Option(help="File with a Jinja chat template that replaces the tokenizer's own.")
]
BadRows = Annotated[
    Literal["stop", "skip"], typer.Option(help="Stop at the first row that cannot be read, or skip and count them.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of prompts decoded together.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the drafter in the output folder.")]


@dataclass(kw_only=True)
class ShapeOptions:
    """The shape of a draft."""

    PANEL: ClassVar[str] = "Draft shape"

    beam_width: BeamWidth = None
    beam_length: BeamLength = None
    node_budget: NodeBudget = None
    lookup: Lookup = None

    def overrides(self) -> ShapeOverrides:
        """The parts of the draft's shape that the user set."""
        from redrafter.core.shapes import ShapeOverrides

        return ShapeOverrides(self.beam_width, self.beam_length, self.node_budget, self.lookup)


@dataclass(kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    PANEL: ClassVar[str] = "Sampling"

    do_sample: DoSample = False
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    seed: Seed = None


@dataclass(kw_only=True)
class LoadingOptions:
    """How the target and its drafter are loaded."""

    PANEL: ClassVar[str] = "Loading"

    any_target: AnyTarget = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    dequantize: Dequantize = False


def values_of(options: Any, *groups: type) -> dict[str, Any]:
    """The values of the fields that a command's options inherit from these dataclasses."""
    return {field.name: getattr(options, field.name) for group in groups for field in fields(group)}
