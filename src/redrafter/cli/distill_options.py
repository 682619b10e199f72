"""Options of `redrafter distill`: one dataclass per group of options.

Imports nothing heavy.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer import Option

from redrafter.cli import options as opt
from redrafter.cli.parsing import template_variables
from redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from redrafter.training.dialogues import SamplingConfig


@dataclass(kw_only=True)
class ReadingOptions:
    """How prompt rows become tokens."""

    PANEL: ClassVar[str] = "Prompts"

    chat: Annotated[bool, Option("--chat", help="Use plain prompts as the user's turn of a chat.")] = False
    template: opt.Template = None
    template_kwargs: opt.TemplateKwargs = None

    def reading(self) -> dict[str, Any]:
        """Keyword arguments of `data.rows.parse_row`."""
        return {"chat": self.chat, "template_kwargs": template_variables(self.template_kwargs)}


@dataclass(kw_only=True)
class SamplingOptions:
    """How answers are sampled."""

    PANEL: ClassVar[str] = "Sampling"

    temperature: Annotated[
        list[float] | None,
        Option(help="0 is greedy.  If repeated, every row is answered once at each temperature.  \\[default: 0]"),
    ] = None
    top_p: Annotated[
        float | None, Option(help="Sample among the most probable tokens that sum to P; ignored in greedy decoding.")
    ] = None
    top_k: Annotated[
        int | None, Option(help="Sample among the K most probable tokens; ignored in greedy decoding.")
    ] = None
    seed: opt.Seed = None
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum tokens of an answer.")] = 512

    def sampling(self) -> SamplingConfig:
        """The configuration.  Raises RedrafterError for values that are invalid or have no effect."""
        from redrafter.training.dialogues import SamplingConfig

        return SamplingConfig(
            tuple(self.temperature or [0.0]), self.top_p, self.top_k, self.seed, max_new_tokens=self.max_new_tokens
        )


@dataclass(kw_only=True)
class ModelOptions:
    """A target in this process, perhaps with a drafter."""

    PANEL: ClassVar[str] = "A model in this process"

    model: Annotated[str | None, Option(help=opt.MODEL)] = None
    drafter: Annotated[
        str | None, Option(help="A drafter for it, a folder or hub id: gives the same answers faster.")
    ] = None
    continuations: Annotated[
        int | None,
        Option(
            min=2,
            metavar="T",
            help="Instead of answering, add the target's T greedy next tokens after every token of the given text (the "
            "paper's local distillation).  T is the number of tokens to draft plus one.",
        ),
    ] = None
    settings: opt.Set = None
    batch_size: Annotated[int, Option(min=1, help="Rows that the model processes together.")] = 32
    max_length: Annotated[
        int | None, Option(min=2, help="Maximum tokens of a conversation.  \\[default: the model's context]")
    ] = None

    @property
    def chunk(self) -> int:
        """Prompts that are read at a time."""
        return 16 * self.batch_size


@dataclass(kw_only=True)
class EndpointOptions:
    """A served target."""

    PANEL: ClassVar[str] = "A served model"

    endpoint: Annotated[
        str | None,
        Option(
            metavar="URL", help="Use an OpenAI-compatible server instead of --model, with the key in OPENAI_API_KEY."
        ),
    ] = None
    endpoint_model: Annotated[str | None, Option(metavar="NAME", help="The model's name there.")] = None
    concurrency: Annotated[int, Option(min=1, help="Concurrent requests to the endpoint.")] = 16
    timeout: Annotated[float, Option(min=0.001, help="Seconds to wait for an answer of the endpoint.")] = 300.0
    insecure_endpoint: Annotated[
        bool, Option("--insecure-endpoint", help="Allow sending OPENAI_API_KEY unencrypted to another machine.")
    ] = False


@dataclass(kw_only=True)
class DistillOptions(
    ModelOptions, EndpointOptions, ReadingOptions, SamplingOptions, opt.ShapeOptions, opt.LoadingOptions
):
    """Options of `redrafter distill`."""

    prompts: opt.Prompts
    output: Annotated[Path, Option(help="File of JSON lines to write, for `redrafter train --data`.")]
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More files like --prompts.")] = None
    limit: opt.Limit = None
    bad_rows: opt.BadRows = "stop"
    overwrite: Annotated[bool, Option("--overwrite", help="Start again if the file holds rows.")] = False
    save_seconds: Annotated[
        float, Option(min=0, help="Seconds between checkpoints, which save all finished answers.")
    ] = 30.0
    save_rows: Annotated[
        int | None, Option(min=1, help="Also save after every N finished rows.  \\[default: by time only]")
    ] = None

    @property
    def sources(self) -> list[str]:
        """All files and data sets."""
        return [*self.prompts, *(self.more or [])]

    @property
    def files(self) -> list[str]:
        """Names of all files, patterns resolved."""
        return [name for source in self.sources for name in (source, *glob.glob(source))]

    def check(self) -> None:
        """Raises RedrafterError for options that contradict each other or have no effect."""
        if (self.model is None) == (self.endpoint is None):
            raise RedrafterError("Give either --model or --endpoint.")
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise RedrafterError("Give both --endpoint and --endpoint-model, or neither.")
        if self.drafter is None:
            self._refuse("without --drafter", "beam_width", "beam_length", "node_budget", "any_target")
        if self.continuations is not None:
            sampling = ("temperature", "top_p", "top_k", "seed", "settings")
            self._refuse("with --continuations", *sampling, "drafter", "chat", "endpoint")
        if self.endpoint is not None:
            self._refuse("with --endpoint", "drafter", "template", "settings", "max_length")
        else:
            self._refuse("without --endpoint", "insecure_endpoint")

    def _refuse(self, when: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) not in (None, False):
                flag = "set" if name == "settings" else name.replace("_", "-")
                raise RedrafterError(f"--{flag} has no effect {when}: leave it out.")
