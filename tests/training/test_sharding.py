"""A sharded target computes the same states from a part of the weights in each process."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from processes import two_forks
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.cli.loading import load_model
from redrafter.data.examples import Row
from redrafter.targets.target import Target
from redrafter.training import trainer
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.sharding import bytes_here, is_sharded, shard
from redrafter.training.trainer import run


def compute(model_folder: Path, folder: Path) -> None:
    """States and logits of a whole and of a sharded target; whether they are equal, and their size, into a file."""
    whole, divided = (load_model(str(model_folder), device="cpu", divided=divided)[0] for divided in (False, True))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        states = [Target(model).hidden_states(ids, torch.ones_like(ids)) for model in (whole, divided)]
        logits = [Target(model).logits(states[0][0]) for model in (whole, divided)]
    found = [torch.equal(*states), torch.equal(*logits), is_sharded(whole), is_sharded(divided)]
    layers = sum(weight.nbytes for weight in whole.model.layers.parameters())
    (folder / os.environ["RANK"]).write_text(json.dumps([found, bytes_here(whole), bytes_here(divided), layers]))


def test_two_processes_hold_half_of_the_layers_each_and_compute_the_same_states(model_folder, tmp_path):
    """A command of no effect follows, which ends the process group."""
    two_forks("--version", folder=tmp_path, before=partial(compute, model_folder, tmp_path))
    for rank in "01":
        found, whole, here, layers = json.loads((tmp_path / rank).read_text())
        assert found == [True, True, False, True]
        assert here == whole - layers / 2


def test_sharding_needs_several_processes():
    with pytest.raises(RedrafterError, match="torchrun"):
        shard(tiny_model(), torch.device("cpu"))


def test_objectives_that_a_sharded_target_cannot_compute_are_refused(tmp_path, monkeypatch):
    model = tiny_model("gemma2", final_logit_softcapping=5.0, head_dim=8, sliding_window=64)
    drafter = RecurrentDrafter.for_target(model, beam_length=2)
    rows = [Row([3, 4, 5, 6], [True] * 4)]
    monkeypatch.setattr(trainer, "is_sharded", lambda _: True)
    with pytest.raises(RedrafterError, match="cross-entropy only"):
        run(model, drafter, rows, tmp_path, Recipe(objective=Objective(0.5, kl=0.5)), resume=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RedrafterError, match="--shard-target"):
        run(model, drafter, rows, tmp_path, Recipe(), resume=False)
