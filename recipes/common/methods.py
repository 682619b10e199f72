"""Trains drafting methods for one target on the target's answers, each for the same time.

Guarantees folders that `redrafter bench` accepts, weights in bfloat16, and a `training.json`, written last, that
describes the training.  Does not know how targets are trained or drafters are measured.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipes.common import pretrain
from transformers import AutoModelForCausalLM, PreTrainedModel

from redrafter.data.examples import Row, collate, pack
from redrafter.errors import RedrafterError
from redrafter.heads.base import Head
from redrafter.targets.target import Target
from redrafter.training.objective import FEATURE_WEIGHT, Objective
from redrafter.training.recipe import Recipe
from redrafter.training.trainer import run

PACKED = 1024  # tokens of a row that answers share

Record = dict[str, Any]
"""What goes into a `training.json`."""


@dataclass(frozen=True)
class Effort:
    """The training budget, the same for all methods."""

    seconds: float
    """Of training by the clock."""
    batch: int
    """Rows of PACKED tokens in a step."""
    rate: float
    """At its peak."""


@dataclass(frozen=True)
class Way:
    """A head to train: how it is created from the target and the answers, and its objective."""

    make: Callable[[PreTrainedModel, list[Row]], Head]
    objective: Objective


KL = Objective(0.0, kl=1.0, decay=0.8)
COUPLED = Objective(0.0, kl=0.5, coupled=1.0, decay=0.8)
EAGLE = Objective(0.0, kl=1.0, features=FEATURE_WEIGHT)
"""As published: the target's whole distribution, and the distance from its features."""


def train_head(way: Way, model: PreTrainedModel, rows: list[Row], folder: Path, effort: Effort) -> Record:
    """Trains a head in `folder`; replaces an interrupted run."""
    torch.manual_seed(0)
    head = way.make(model, rows)
    recipe = Recipe(
        batch_size=effort.batch,
        learning_rate=effort.rate,
        save_steps=10**6,
        objective=way.objective,
        packing=PACKED,
        seconds=effort.seconds,
    )
    shutil.rmtree(folder, ignore_errors=True)
    ended = run(model, head, rows, folder, recipe, resume=False)
    head.to(torch.bfloat16).save_pretrained(folder)
    record = {
        "kind": head.config.kind,
        "head": head.config.head_description,
        "parameters": sum(one.numel() for one in head.parameters()),
        "seconds": round(ended.seconds, 1),
        "steps": ended.steps,
        "tokens": ended.tokens,
        "loss": round(ended.loss, 4),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def train_draft_model(
    before: Path, model: PreTrainedModel, tokenizer, rows: list[Row], folder: Path, effort: Effort
) -> Record:
    """Trains a small model, pretrained on text, on the target's distribution over its answers."""
    torch.manual_seed(0)
    own = Target(model)
    draft = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32).to(own.device)
    drafting = Target(draft)
    on_gpu = own.device.type == "cuda"
    groups, draw = pack(rows, PACKED), random.Random(0)
    read = 0

    def loss() -> torch.Tensor:
        nonlocal read
        batch = collate(draw.sample(groups, min(effort.batch, len(groups))))
        read += int((batch["segments"] > 0).sum())
        ids, segments = batch["input_ids"].to(own.device), batch["segments"].to(own.device)
        learnt = batch["trained"][:, 1:].to(own.device)
        with torch.no_grad():
            law = own.logits(own.hidden_states(ids, segments)[:, :-1][learnt]).float().log_softmax(-1)
        with torch.autocast(own.device.type, torch.bfloat16, enabled=on_gpu):
            said = drafting.logits(drafting.hidden_states(ids, segments)[:, :-1][learnt])
        return torch.nn.functional.kl_div(said.float().log_softmax(-1), law, reduction="batchmean", log_target=True)

    curve = []

    def tell(step: int, found: torch.Tensor, progress: float) -> None:
        if step % 50 == 0:
            curve.append((step, round(found.item(), 4)))
            if not found.isfinite():
                raise RedrafterError(f"The draft model's loss is not finite at step {step}: lower the learning rate.")

    begin = time.monotonic()
    steps = pretrain.fit(draft, loss, seconds=effort.seconds, peak_rate=effort.rate, weight_decay=0.0, tell=tell)
    taught = json.loads((before / "training.json").read_text())
    record = {
        "kind": "a causal language model",
        "head": f"{draft.config.num_hidden_layers} layers of width {draft.config.hidden_size}",
        "parameters": draft.num_parameters(),
        "seconds": round(time.monotonic() - begin, 1),
        "steps": steps,
        "tokens": read,
        "loss": curve[-1][1],
        "curve": curve,
        "before": {name: taught[name] for name in ("minutes", "steps", "tokens", "held_out_loss")},
    }
    pretrain.save(draft, tokenizer, folder, record, str(model.dtype).removeprefix("torch."))
    return record
