"""A sharded target computes the same states from a part of the weights in each process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.data.examples import Row
from redrafter.training import trainer
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.sharding import shard
from redrafter.training.trainer import run

SHARDED = """
import json, os, sys, torch
from redrafter.cli import _exit
from redrafter.cli.loading import load_model
from redrafter.targets.target import Target
from redrafter.training.sharding import bytes_here, is_sharded
whole, divided = (load_model(sys.argv[1], device="cpu", divided=divided)[0] for divided in (False, True))
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    states = [Target(model).hidden_states(ids, torch.ones_like(ids)) for model in (whole, divided)]
    logits = [Target(model).logits(states[0][0]) for model in (whole, divided)]
found = [torch.equal(*states), torch.equal(*logits), is_sharded(whole), is_sharded(divided)]
size = [bytes_here(model) for model in (whole, divided)] + [bytes_here(whole.model.layers)]
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump([found, size], file)
_exit(0)
"""


def test_two_processes_hold_half_of_the_layers_each_and_compute_the_same_states(model_folder, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", *"torch.distributed.run --standalone --nproc-per-node 2".split()]
    command += ["--no-python", sys.executable, "-W", "ignore", "-c", SHARDED, str(model_folder), f"{tmp_path}/"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for rank in "01":
        found, (whole, here, layers) = json.loads((tmp_path / rank).read_text())
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
