"""Runs vLLM with the bundled pair, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from redrafter.cli.demo import PROMPTS
from redrafter.cli.loading import demo_folder

MODEL, DRAFTER = str(demo_folder() / "redrafter-demo-12m"), str(demo_folder() / "drafter")
LENGTH = 5

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


def speculative(**fields: object) -> dict:
    """The speculative config of the bundled drafter."""
    return {"method": "redrafter", "model": DRAFTER, "num_speculative_tokens": LENGTH, **fields}


def start(job: dict, environment: dict | None = None) -> subprocess.CompletedProcess:
    """Runs a job of vllm_engine.py."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "vllm_engine.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=Path(job["output"]).parent,
        env=os.environ | ENVIRONMENT | (environment or {}),
        timeout=600,
    )


def job(batches: list[dict], speculative_config: dict | None, folder: str, **options: object) -> dict:
    engine = {"model": MODEL, "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8}
    engine |= {"disable_log_stats": False, "speculative_config": speculative_config, **options}
    return {"engine": engine, "batches": batches, "output": str(Path(folder) / "out.json")}


def run(batches: list[dict], speculative_config: dict | None = None, environment: dict | None = None, **options):
    """The answers to each batch of a new engine, and its counters after each batch."""
    with tempfile.TemporaryDirectory() as folder:
        work = job(batches, speculative_config, folder, **options)
        done = start(work, environment)
        output = Path(work["output"])
        assert output.exists(), done.stdout[-3000:] + done.stderr[-6000:]
        out = json.loads(output.read_text())
        return out["results"], out["metrics"]


def error(speculative_config: dict, environment: dict | None = None, **options: object) -> str:
    """What an engine prints that does not start."""
    with tempfile.TemporaryDirectory() as folder:
        work = job([], speculative_config, folder, **options)
        done = start(work, environment)
        assert done.returncode != 0
        return done.stdout + done.stderr


def tokens(answers: list[dict]) -> list[list[int]]:
    return [one["tokens"] for one in answers]


@cache
def prompts() -> list[list[int]]:
    """The demo's prompts, and variants of them, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [*PROMPTS, *(f"{one} Please explain why." for one in PROMPTS)]
    chats = [[{"role": "user", "content": one}] for one in texts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
