"""Runs `redrafter bench` and `sweep` in separate processes for the comparison.

Guarantees that the benchmark can be rehearsed with all its options before anything is trained for it.  Does not know
what is compared.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from recipes.common.corpus import Corpus
from recipes.target import shape
from recipes.target.stages import device
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter.heads.synthetic import random_drafter


def bench(
    model: Path,
    data: Path,
    output: Path,
    methods: Sequence[str],
    until: float,
    *,
    new_tokens: int,
    prompts: int,
    rounds: int,
    minutes: float | None = None,
) -> int:
    """Measures methods, given as NAME=PATH, and prompt lookup; returns the exit status.

    `minutes`: time after which no further measurement is started.
    """
    words = ["bench", "--model", model, "--prompts", data, "--output", output, "--limit", prompts, "--rounds", rounds]
    words += ["--max-new-tokens", new_tokens, "--answers", new_tokens, "--transformers", *_compiled()]
    for told in (*methods, "prompt lookup=prompt-lookup"):
        words += ["--method", told]
    return _measured(words, minutes, until)


def sweep(
    model: Path, data: Path, output: Path, methods: Sequence[str], until: float, *, minutes: float | None = None
) -> int:
    """Measures the first method in all shapes with one prompt per category, and the others; returns the exit status."""
    words = ["sweep", "--model", model, "--prompts", data, "--output", output, "--limit", 1, "--rounds", 1]
    for told in methods:
        words += ["--method", told]
    return _measured(words, minutes, until)


def _measured(words: Sequence[object], minutes: float | None, until: float) -> int:
    """Resumes a command, or starts again if it was begun with other arguments."""
    words = [*words, *([] if minutes is None else ["--minutes", minutes])]
    status = command(words, until)
    return command([*words, "--overwrite"], until) if status == 2 else status


def _compiled() -> list[str]:
    return ["--compile"] if torch.cuda.is_available() else []


def command(words: Sequence[object], until: float) -> int:
    """Runs a redrafter command in a separate process, which frees the GPU's memory; returns 124 after a timeout.

    This process's unused cached memory is released first.
    """
    torch.cuda.empty_cache()  # nothing where there is no GPU
    left = None if until == math.inf else max(1.0, until - time.monotonic())
    line = [sys.executable, "-m", "redrafter", *map(str, words)]
    try:
        return subprocess.run(line, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def rehearse(folder: Path, corpus: Corpus, tokenizer: Path, until: float) -> None:
    """Measures a random drafter of a tiny random model.  Exits if the command fails."""
    read = AutoTokenizer.from_pretrained(tokenizer)
    config = shape.configuration(corpus, "llama", width=shape.HEAD, layers=1)
    config.vocab_size, config.eos_token_id = len(read), None  # so that no text ends early
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device())
    target, drafter, data = folder / "target", folder / "drafter", folder / "prompts.jsonl"
    model.save_pretrained(target)
    read.save_pretrained(target)
    random_drafter(model).save_pretrained(drafter)
    data.write_text(json.dumps({"category": "a", "prompt": "a"}) + "\n")
    methods = [f"one={drafter}@2x2:4,uncoupled"]
    status = bench(target, data, folder / "bench", methods, until, new_tokens=4, prompts=1, rounds=1, minutes=10)
    if status:
        raise SystemExit(f"redrafter bench was tried and ended with status {status}: nothing is trained.")
