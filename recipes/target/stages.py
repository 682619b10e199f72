"""The target, trained once for all comparisons, and the options that select it.

Guarantees that a finished stage is skipped, and that one process does what the others wait for.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipes.common import pretrain
from recipes.common.corpus import Corpus, data_folder, train_tokenizer
from recipes.target import shape
from transformers import AutoTokenizer


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options of the target and of the processes that share the work."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=data_folder, required=True, help="folder with the files that README.md names")
    parser.add_argument("--output", type=Path, required=True, help="where all is written")
    parser.add_argument("--target", type=Path, help="a model's folder; by default one is trained in OUTPUT/target")
    parser.add_argument("--tokenizer", type=Path, help="of the target to be trained; by default OUTPUT/tokenizer")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop when it is made")
    parser.add_argument("--family", default="llama", choices=shape.FAMILIES)
    parser.add_argument("--minutes", type=float, default=5.0, help="of training the target")
    parser.add_argument("--batch", type=int, default=32, help="windows of 1,024 tokens in a step of the target")
    parser.add_argument("--width", type=int, default=768, help="of the target")
    parser.add_argument("--layers", type=int, default=12, help="of the target")
    parser.add_argument("--prompts", type=int, default=2_000, help="of each file to learn from")
    parser.add_argument("--held-out", type=int, default=64, help="prompts of each category to measure on")
    parser.add_argument("--new-tokens", type=int, default=128, help="written to each of those")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="this process's share, from 0/N")
    return parser


def device() -> torch.device:
    """CUDA if available."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokenizer(given: argparse.Namespace, corpus: Corpus) -> Path:
    """The folder of the tokenizer, which part 0 trains."""
    folder: Path = given.tokenizer or given.output / "tokenizer"
    if given.part[0] == 0 and not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        train_tokenizer(corpus).save_pretrained(part)
        part.rename(folder)
    return folder


def pretrained(
    given: argparse.Namespace, corpus: Corpus, folder: Path, *, width: int, layers: int, minutes: float
) -> None:
    """Trains a model of the target's family from scratch, unless it exists."""
    if (folder / "training.json").exists():
        return
    pretrain.train(
        corpus,
        AutoTokenizer.from_pretrained(awaited(tokenizer(given, corpus))),
        shape.configuration(corpus, given.family, width, layers),
        folder,
        peak_rate=shape.PEAK_RATE,
        chat_share=1.0,
        minutes=minutes,
        batch=given.batch,
        device=device(),
        dtype="bfloat16",
    )


def target(given: argparse.Namespace, corpus: Corpus, until: float = math.inf) -> Path:
    """The folder of the target: as given, or trained by part 0."""
    if given.target:
        if not (given.target / "config.json").exists():
            raise SystemExit(f"{given.target} holds no model.")
        target: Path = given.target
        return target
    folder: Path = given.output / "target"
    if given.part[0] == 0:
        pretrained(given, corpus, folder, width=given.width, layers=given.layers, minutes=given.minutes)
    awaited(folder / "training.json", until)  # written last of all
    return folder


def awaited(file: Path, until: float = math.inf) -> Path:
    """The file or folder, as soon as another process has written it; exits after `until`, from `time.monotonic`."""
    if not file.exists():
        print(f"waiting for {file}", flush=True)
    while not file.exists():
        if time.monotonic() > until:
            raise SystemExit(f"No time was left to wait for {file}.")
        time.sleep(0.5)
    return file


def say(begin: float, what: str) -> None:
    """Prints a line of progress with the seconds since the start of the run, from `time.monotonic`."""
    print(f"{time.monotonic() - begin:.0f} s: {what}", flush=True)


def survived(make: Callable[[], Any]) -> Any:
    """The result of a function, or its error as one line, so that later stages still run."""
    try:
        return make()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise argparse.ArgumentTypeError(f"{text} is not a part, such as 0/2")
    return int(part), int(parts)
