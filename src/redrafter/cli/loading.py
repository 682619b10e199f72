"""Loads what commands work with: the target, its tokenizer and the drafter."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from redrafter.cli.parsing import template_variables
from redrafter.errors import RedrafterError, reason
from redrafter.utils.paths import AUTO, check_model_path, split_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from redrafter.proposers import Drafter


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def show_log() -> None:
    """Prints the messages of the package's logger on stderr."""
    log = logging.getLogger("redrafter")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Echo) for handler in log.handlers):
        log.addHandler(_Echo())


def load_tokenizer(
    path: str, template: Path | None = None, variables: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The target's tokenizer; `template` replaces its chat template.

    Raises RedrafterError if it cannot be loaded, or if its chat template does not use one of the `variables`.
    """
    check_model_path(path)
    from transformers import AutoTokenizer

    from redrafter.utils import hub

    folder, gguf_file = split_gguf(path)
    try:
        with hub.reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise RedrafterError(f"The tokenizer of {path} cannot be loaded: {reason(error)}.") from error
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise RedrafterError(f"--template {template} is not UTF-8 text.") from None
        except OSError as error:
            raise RedrafterError(f"--template {template} cannot be read: {error.strerror}.") from None
    templates = getattr(tokenizer, "chat_template", None) or ""
    text = templates if isinstance(templates, str) else "\n".join(templates.values())  # some have several by name
    for name in variables or {}:
        if text and not re.search(rf"\b{re.escape(name)}\b", text):
            raise RedrafterError(f"--template-kwargs {name}: the chat template has no such variable.")
    return tokenizer


def config_value(path: str, name: str) -> int | None:
    """A number in the target's text config, read without the weights; None if it is missing or cannot be read."""
    from transformers import AutoConfig

    from redrafter.utils import hub

    folder, gguf_file = split_gguf(path)
    try:
        with hub.reading(folder):
            config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file).get_text_config()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError):  # loading the model reports what is wrong
        return None
    value: int | None = getattr(config, name, None)
    return value


def tokenized_prompts(
    records: list[tuple[str, dict[str, Any]]], model: str, template_kwargs: str | None, *, chat: bool = False
) -> list[list[int]]:
    """Token ids of the prompts, before the model is loaded.  Raises RedrafterError for a bad row."""
    from redrafter.data.prompts import prompt_ids

    variables = template_variables(template_kwargs)
    tokenizer = load_tokenizer(model, variables=variables)
    options: dict[str, Any] = {"template_kwargs": variables, "vocab_size": config_value(model, "vocab_size")}
    return [prompt_ids(record, tokenizer, where, chat=chat, **options) for where, record in records]


def check_context(context: int | None, model: PreTrainedModel) -> None:
    """Raises RedrafterError if `--context` exceeds the model's context length."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and limit is not None and context > limit:
        raise RedrafterError(f"--context {context} exceeds the model's {limit} positions.")


def chosen_device(device: str) -> str:
    """The device for `--device`; each process of a distributed run takes the GPU of its local rank."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def load_model(
    path: str, dtype: str = "auto", device: str = "auto", *, divided: bool = False, dequantize: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target in eval mode and its tokenizer; `divided` shards it over the processes of a training run.

    `dequantize` unpacks the weights of a GGUF file.  Raises RedrafterError if they cannot be loaded.
    """
    check_model_path(path)
    folder, gguf_file = split_gguf(path)
    if dequantize and gguf_file is None:
        raise RedrafterError(f"--dequantize is for .gguf files, and {path} is none: leave it out.")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from redrafter.utils import hub

    packing = {"quantization_config": GgufConfig(dequantize=True)} if dequantize else {}
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = chosen_device(device)
    try:
        with hub.reading(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **packing)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        if gguf_file is not None:
            model.config._name_or_path = path  # transformers keeps the folder, which may hold several models
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise RedrafterError(f"The model {path} cannot be loaded: {reason(error)}.") from error
    try:
        if divided:
            from redrafter.training.sharding import shard

            return shard(model, torch.device(device)).eval(), tokenizer
        return model.to(torch.device(device)).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise RedrafterError(f"The model cannot be moved to --device {device}: {reason(error)}.") from error


def load_drafter(path: str, model: PreTrainedModel, *, any_target: bool = False) -> Drafter:
    """A drafter on its target's device: from a folder or Hub id, a smaller model, or prompt lookup by its name.

    For "auto", prints what was chosen on stderr.
    """
    from redrafter.proposers import loading
    from redrafter.proposers.automatic import automatic

    if path == AUTO:
        chosen = automatic(model)
        typer.echo(chosen.reason, err=True)
        path = str(chosen.path or AUTO)
    return loading.load_drafter(path, model, any_target=any_target)


def demo_folder() -> Path:
    """The folder of the bundled model and its drafters."""
    return Path(__file__).parent.parent / "assets" / "demo"
