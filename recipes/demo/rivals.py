"""Trains the other drafting methods of the demo on the same answers and for the same time as its drafter.

Guarantees folders that `redrafter bench --demo` measures, each below 5 MB.  Does not know how the target or its drafter
was trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from recipes.common import pretrain
from recipes.common.answers import draft_vocabulary
from recipes.common.corpus import Corpus
from recipes.common.methods import EAGLE, Effort, Way, train_draft_model, train_head
from recipes.demo import drafter, shape
from transformers import AutoModelForCausalLM, AutoTokenizer

from redrafter import EagleHead, MedusaHeads

SECONDS = 77.0  # of training the drafter that ships, on one NVIDIA H100
HEADS = 4

WAYS = {
    "medusa": Way(
        lambda model, rows: MedusaHeads.fresh(
            model,
            heads=HEADS,
            draft_vocabulary=draft_vocabulary(rows, drafter.VOCABULARY),
            node_budget=drafter.BUDGET,
        ),
        drafter.OBJECTIVE,
    ),
    "eagle": Way(
        lambda model, _: EagleHead.fresh(
            model, beam_length=drafter.LENGTH, beam_width=drafter.WIDTH, node_budget=drafter.BUDGET
        ),
        EAGLE,
    ),
}
DRAFT = "draft"


def train(
    corpus: Corpus,
    target: Path,
    output: Path,
    *,
    seconds: float,
    minutes: float,
    batch: int,
    device: torch.device,
    limit: int | None,
) -> None:
    """Trains each method that is missing in `output`.

    The draft model is first pretrained on text for `minutes`, as the target was.
    """
    torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(target).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    rows = drafter.learnt(corpus, model, tokenizer, output, limit)
    effort = Effort(seconds, batch=8 if device.type == "cuda" else 2, rate=drafter.RATE)
    for name, way in WAYS.items():
        if not (output / name / "training.json").exists():
            print(name, json.dumps(train_head(way, model, rows, output / name, effort)), flush=True)
    if (output / DRAFT / "training.json").exists():
        return
    before = output / f"{DRAFT}-before"
    if not (before / "training.json").exists():
        pretrain.train(
            corpus,
            tokenizer,
            shape.draft_configuration(corpus),
            before,
            peak_rate=shape.PEAK_RATE,
            chat_share=shape.CHAT_SHARE,
            minutes=minutes,
            batch=batch,
            device=device,
            dtype="float32",
        )
    record = train_draft_model(before, model, tokenizer, rows, output / DRAFT, effort)
    print(DRAFT, json.dumps({key: value for key, value in record.items() if key != "curve"}), flush=True)
