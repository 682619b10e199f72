"""The load script, briefly."""

from __future__ import annotations

import asyncio
import importlib
import os
from pathlib import Path

import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer

import redrafter
from redrafter import RecurrentDrafter
from redrafter.engine.engine import Engine
from serving import listening

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
DEMO = Path(redrafter.__file__).parent / "assets" / "demo"


def test_sixty_requests_from_eight_clients(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("serving_load")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "redrafter-demo-12m")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "redrafter-demo-12m")
    drafter = RecurrentDrafter.from_pretrained(DEMO / "drafter", target=model)
    expected, requests = script.Expected(model, tokenizer), script.drawn(60, script.PROMPTS[:2])
    with (
        Engine(model, drafter, tokenizer=tokenizer, slots=6, max_length=128) as engine,
        listening(engine, tokenizer) as (_, url),
    ):
        run = asyncio.run(script.load(url, psutil.Process(os.getpid()), requests, 8, expected))
        counts = script.server_counts(url)
    assert not run.errors
    assert not run.wrong
    assert all(holds for name, holds in script.checks(run, counts, 60).items() if name != "memory is flat")
    assert run.ended["completed"] >= 40
