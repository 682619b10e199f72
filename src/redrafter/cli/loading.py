"""What several commands load: the target, its tokenizer, the drafter; and the options that say which."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.errors import RedrafterError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from redrafter.drafter import RecurrentDrafter
    from redrafter.files import Skip
    from redrafter.proposers import Method

BAD_ROWS_NAMED = 10
"""Bad rows that are named where they are skipped; the others are counted."""

Model = Annotated[str, typer.Option(help="The target: a folder or hub id of a Hugging Face causal language model.")]
DrafterPath = Annotated[str, typer.Option(help="The drafter: a folder or hub id.")]
DrafterOrModel = "The drafter: a folder or hub id; or a smaller model of the same vocabulary; or prompt-lookup."
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1, mps.")]
Width = Annotated[int | None, typer.Option(min=1, help="Beams to draft.  \\[default: as the drafter's folder says]")]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens to draft in each beam, the guaranteed one not counted.  \\[default: as trained]"),
]
Budget = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Draft the N most probable nodes of all that the beam search weighed, the root counted, not whole beams.  "
        "\\[default: as the drafter's folder says]",
    ),
]
DraftBits = Annotated[
    int,
    typer.Option(help="Of a weight of the drafter's head: 16, as --dtype says, or 8, faster on a GPU up to 16 beams."),
]
Fast = Annotated[
    bool, typer.Option(help="Replay a step as one CUDA graph, pack weights on a CPU; the text is the same.")
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model's layers first, on CUDA: seconds once, faster steps after."),
]
DoSample = Annotated[
    bool, typer.Option("--do-sample", help="Draw tokens by the model's law instead of taking the best.")
]
Temperature = Annotated[float | None, typer.Option(help="Of the law; with --do-sample.  \\[default: the model's own]")]
TopK = Annotated[int | None, typer.Option(help="Draw among the K likeliest tokens; with --do-sample.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest that sum to P; with --do-sample.")]
MinP = Annotated[float | None, typer.Option(help="Draw among tokens at least P times as likely as the likeliest.")]
Seed = Annotated[
    int | None, typer.Option(help="Of all draws: the same seed gives the same texts, with any drafter or none.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of transformers' GenerationConfig, the value as JSON: --set repetition_penalty=1.1",
    ),
]
Sources = "Files of JSON lines (perhaps .gz, .xz, .zst), .json or .parquet, patterns, or OWNER/NAME[:SPLIT] of the hub."
Template = Annotated[
    Path | None, typer.Option(help="A file with a chat template (Jinja) to use instead of the tokenizer's own.")
]
BadRows = Annotated[str, typer.Option(help="stop at the first row that cannot be read, or skip and count them.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]


_ONE = "a command writes one text for each prompt; repeat the prompt, or for distill use --temperature several times"
_TEXT_ALONE = "a command writes text alone; redrafter.generate in Python returns scores"
_NOT_BY_SET = {
    "num_return_sequences": _ONE,
    "output_scores": _TEXT_ALONE,
    "output_logits": _TEXT_ALONE,
    "return_dict_in_generate": _TEXT_ALONE,
    "max_length": "use --max-new-tokens",
}
"""Settings that a command cannot honour, with what to do."""


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def show_log() -> None:
    """What the library tells its logger goes to stderr too."""
    log = logging.getLogger("redrafter")
    log.setLevel(logging.INFO)
    if not any(isinstance(one, _Echo) for one in log.handlers):
        log.addHandler(_Echo())


def read_settings(more: list[str] | None, **told: Any) -> dict[str, Any]:
    """The values of a command's own options, and of `--set NAME=VALUE`, which is JSON where it can be read so.

    Raises RedrafterError for a name that is no setting, or that has an option of its own.
    """
    from redrafter.settings import FIELDS

    settings = {name: value for name, value in told.items() if value is not None}
    for pair in more or []:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise RedrafterError(f"--set takes NAME=VALUE, not {pair}.")
        if name in told:
            raise RedrafterError(f"--set {name}: use --{name.replace('_', '-')}.")
        if name in _NOT_BY_SET:
            raise RedrafterError(f"--set {name}: {_NOT_BY_SET[name]}.")
        if name not in (*FIELDS, "presence_penalty", "frequency_penalty"):
            raise RedrafterError(f"--set: {name} is no setting of generation; docs/settings.md lists them.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
        if settings[name] is None:
            raise RedrafterError(f"--set {name}: null sets nothing; give the value that turns it off.")
    return settings


@contextmanager
def skipping(bad_rows: str) -> Iterator[Skip | None]:
    """What `--bad-rows` asks for: nothing, or whom to tell of a bad row; says in the end how many there were."""
    if bad_rows not in ("stop", "skip"):
        raise RedrafterError(f"--bad-rows {bad_rows} is not one of stop, skip.")
    told = 0

    def skip(sentence: str) -> None:
        nonlocal told
        told += 1
        if told <= BAD_ROWS_NAMED:
            typer.echo(f"skipped: {sentence}", err=True)

    yield None if bad_rows == "stop" else skip
    if told:
        more = f", of which the first {BAD_ROWS_NAMED} are named" if told > BAD_ROWS_NAMED else ""
        typer.echo(f"{told:,} bad rows were skipped{more}.", err=True)


def load_tokenizer(path: str, template: Path | None = None) -> PreTrainedTokenizerBase:
    """The target's tokenizer, perhaps with another chat template.  Raises RedrafterError where it cannot be loaded."""
    from transformers import AutoTokenizer

    check_there(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RedrafterError(f"The tokenizer of {path} cannot be loaded: {reason(error)}.") from error
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except OSError as error:
            raise RedrafterError(f"--template {template} cannot be read: {error.strerror}.") from None
    return tokenizer


def check_there(path: str) -> None:
    """Raises RedrafterError where a model's path can be no hub id and there is no such folder."""
    from redrafter import hub

    if hub.is_local(path) and not Path(path).exists():
        raise RedrafterError(f"There is no model folder at {path}.")


def check_output(folder: Path, *, overwrite: bool | None = None) -> None:
    """Raises RedrafterError where no drafter can be written, or one would be replaced without `--overwrite`.

    `overwrite` is None for a command that has no such option.
    """
    from redrafter import hub

    if folder.is_file():
        raise RedrafterError(f"{folder} is a file: give a folder as --output.")
    if (folder / hub.CONFIG).exists() and not overwrite:
        advice = "give another --output" if overwrite is None else "pass --overwrite, or another --output"
        raise RedrafterError(f"{folder} already holds a drafter: {advice}.")


def context_of(path: str) -> int | None:
    """Positions of the target, without loading it; None where its config does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError, KeyError, RuntimeError):  # the model may load though, or else says so itself
        return None
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def check_dtype(dtype: str) -> None:
    """Raises RedrafterError for what `--dtype` does not take."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RedrafterError(f"--dtype {dtype} is not one of auto, float32, bfloat16, float16.")


def check_bits(bits: int, drafted: bool = True) -> None:
    """Raises RedrafterError for what `--draft-bits` does not take, and where nothing is drafted by it."""
    if bits not in (16, 8):
        raise RedrafterError(f"--draft-bits {bits} is not one of 16, 8.")
    if bits != 16 and not drafted:
        raise RedrafterError("--draft-bits is for a drafter: leave it out, or --no-drafter.")


def check_context(context: int | None, model: PreTrainedModel) -> None:
    """Raises RedrafterError where `--context` is longer than the model's own."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and limit is not None and context > limit:
        raise RedrafterError(f"--context {context} exceeds the model's {limit} positions.")


def chosen_device(device: str) -> str:
    """What `--device` says; auto is CUDA where there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = os.environ.get("LOCAL_RANK", "0")  # of several processes started together each takes a GPU
    return f"cuda:{own}" if device == "cuda" else device


def whole_numbers(told: str, option: str) -> list[int]:
    """What an option lists, as 1,4,10.  Raises RedrafterError for what is not a list of whole numbers from 1."""
    words = told.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise RedrafterError(f"{option} takes whole numbers from 1, as 1,4,10, not {told!r}.")
    return sorted({int(word) for word in words})


def numbers(told: str, option: str) -> list[float]:
    """What an option lists, as 0,0.7,1.  Raises RedrafterError for what is not a list of numbers from 0."""
    try:
        found = [float(word) for word in told.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 <= one < float("inf") for one in found):
        raise RedrafterError(f"{option} takes numbers from 0, as 0,0.7,1, not {told!r}.")
    return sorted(set(found))


def load_model(
    path: str, dtype: str = "auto", device: str = "auto", *, divided: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target, ready to decode, and its tokenizer; `divided` among the processes of a training run.

    Raises RedrafterError where they cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    check_there(path)
    check_dtype(dtype)
    device = chosen_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RedrafterError(f"The model {path} cannot be loaded: {reason(error)}.") from error
    try:
        if divided:
            from redrafter.training.sharding import shard

            return shard(model, torch.device(device)).eval(), tokenizer
        return model.to(torch.device(device)).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise RedrafterError(f"The model cannot be put on --device {device}: {reason(error)}.") from error


def load_drafter(path: str, model: PreTrainedModel, bits: int = 16) -> RecurrentDrafter:
    """The drafter beside its target, on its device and in its dtype, its head perhaps in 8 bits."""
    from redrafter.drafter import RecurrentDrafter

    return RecurrentDrafter.from_pretrained(path, target=model, bits=bits)


def load_method(path: str, model: PreTrainedModel, bits: int = 16) -> Method:
    """What drafts for the target: a drafter (its head perhaps in 8 bits), a draft model, or prompt lookup by name."""
    from redrafter.proposers.loading import load_method

    return load_method(path, model, bits)


def demo_folder() -> Path:
    """Where the bundled pair lies."""
    return Path(__file__).parent.parent / "assets" / "demo"
