"""What several commands load: the target, its tokenizer, the drafter; and the options that say which."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redrafter.errors import RedrafterError, reason
from redrafter.utils.outputs import locked
from redrafter.utils.paths import check_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from redrafter.data.files import Skip
    from redrafter.proposers import Drafter

OVERWRITE = "pass --overwrite, or another --output"
"""What to do about a drafter that is there already."""

BAD_ROWS_NAMED = 10
"""Bad rows that are named where they are skipped; the others are counted."""

Model = Annotated[str, typer.Option(help="The target: a folder or hub id of a Hugging Face causal language model.")]
DrafterPath = Annotated[str, typer.Option(help="The drafter: a folder or hub id.")]
DrafterOrModel = "The drafter: a folder or hub id; or a smaller model of the same vocabulary; or prompt-lookup."
AnyTarget = Annotated[
    bool, typer.Option("--any-target", help="Use a drafter that was made for another model of the same shape.")
]
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
PROMPT_ROWS = "Rows of `messages`, `turns`, `prompt` or other formats that docs/training.md lists."
Prompts = Annotated[list[str], typer.Option(metavar="FILE", help=f"{PROMPT_ROWS} {Sources}")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N rows.  \\[default: all]")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Variables of the chat template, as '{\"enable_thinking\": false}'; a row's own go first.",
    ),
]
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
    from redrafter.decoding.settings import FIELDS

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


def load_tokenizer(
    path: str, template: Path | None = None, variables: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The target's tokenizer, perhaps with another chat template.

    Raises RedrafterError where it cannot be loaded, or where its template has none of the `variables`.
    """
    check_model_path(path)
    from transformers import AutoTokenizer

    from redrafter.utils import hub

    try:
        with hub.reading(path):
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RedrafterError(f"The tokenizer of {path} cannot be loaded: {reason(error)}.") from error
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise RedrafterError(f"--template {template} is not UTF-8 text.") from None
        except OSError as error:
            raise RedrafterError(f"--template {template} cannot be read: {error.strerror}.") from None
    found = getattr(tokenizer, "chat_template", None) or ""
    text = found if isinstance(found, str) else "\n".join(found.values())  # several templates by name
    for name in variables or {}:
        if text and not re.search(rf"\b{re.escape(name)}\b", text):
            raise RedrafterError(f"--template-kwargs {name}: the chat template has no such variable.")
    return tokenizer


def claim(context: typer.Context, output: Path, *, is_file: bool = False) -> None:
    """Locks an output until the command ends.  Raises RedrafterError if another process writes it."""
    lock = locked(output, is_file=is_file)
    lock.__enter__()
    context.call_on_close(lambda: lock.__exit__(None, None, None))


def config_value(path: str, name: str) -> int | None:
    """A number of the target's text config, without loading the model; None where the config does not have it."""
    from transformers import AutoConfig

    from redrafter.utils import hub

    try:
        with hub.reading(path):
            config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError, KeyError, RuntimeError):  # the model may load though, or else says so itself
        return None
    value: int | None = getattr(config, name, None)
    return value


def template_variables(told: str | None) -> dict[str, Any]:
    """What `--template-kwargs` gives.  Raises RedrafterError."""
    from redrafter.data.rows import read_template_kwargs

    return {} if told is None else read_template_kwargs(told, "--template-kwargs")


def tokenized_prompts(
    records: list[tuple[str, dict[str, Any]]], model: str, template_kwargs: str | None, *, chat: bool = False
) -> list[list[int]]:
    """Token ids of the prompts of rows, before the model is loaded.  Raises RedrafterError for a bad row."""
    from redrafter.data.prompts import prompt_ids

    variables = template_variables(template_kwargs)
    tokenizer = load_tokenizer(model, variables=variables)
    options: dict[str, Any] = {"template_kwargs": variables, "vocab_size": config_value(model, "vocab_size")}
    return [prompt_ids(record, tokenizer, where, chat=chat, **options) for where, record in records]


def check_dtype(dtype: str) -> None:
    """Raises RedrafterError for what `--dtype` does not take."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RedrafterError(f"--dtype {dtype} is not one of auto, float32, bfloat16, float16.")


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
    check_model_path(path)
    check_dtype(dtype)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from redrafter.utils import hub

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = chosen_device(device)
    try:
        with hub.reading(path):
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


def load_drafter(path: str, model: PreTrainedModel, *, any_target: bool = False) -> Drafter:
    """A drafter from a folder or hub id, a draft model, or prompt lookup by name."""
    from redrafter.proposers import loading

    return loading.load_drafter(path, model, any_target=any_target)


def demo_folder() -> Path:
    """Where the bundled pair lies."""
    return Path(__file__).parent.parent / "assets" / "demo"
