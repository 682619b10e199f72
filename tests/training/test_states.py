"""Cached states: training with them equals training with the target, and no wrong or damaged folder is used."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError
from redrafter.data.examples import Row, collate
from redrafter.targets.target import Target
from redrafter.training import states as module
from redrafter.training.estimating import estimate
from redrafter.training.objective import Objective
from redrafter.training.recipe import Recipe
from redrafter.training.states import States
from redrafter.training.trainer import run

MODEL = tiny_model()
TARGET = Target(MODEL)
KL = Objective(0.5, kl=0.5)


def rows(*lengths: int, seed: int = 0) -> list[Row]:
    """Random texts; a prompt of five tokens is not learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    return [Row(row, [False] * 5 + [True] * (len(row) - 5)) for row in ids]


MIXED = rows(20, 9, 31, 9, 24, 17, 12, 30)


@torch.no_grad()
def forward(ids, segments):
    return TARGET.hidden_states(ids, segments)


def computed(folder, texts=MIXED, target=TARGET, of=forward) -> States:
    found = States(folder, target, of, texts)
    found.compute(lambda _: None)
    return found


def trained(tmp_path, name: str, texts: list[Row], form=None, **recipe) -> dict[str, torch.Tensor]:
    """The weights after three steps."""
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, exit_dim=16, **(form or {}))
    run(MODEL, drafter, texts, tmp_path / name, Recipe(max_steps=3, batch_size=4, **recipe), resume=False)
    return drafter.state_dict()


@pytest.fixture
def forwards(monkeypatch):
    """Numbers of rows in each run of the target."""
    counted: list[int] = []
    hidden_states = Target.hidden_states

    def counting(self, input_ids, segments):
        counted.append(len(input_ids))
        return hidden_states(self, input_ids, segments)

    monkeypatch.setattr(Target, "hidden_states", counting)
    return counted


@pytest.mark.parametrize("form", [{}, {"context_layers": (1,), "context_positions": 3}], ids=["paper", "context"])
@pytest.mark.parametrize("objective", [Objective(), KL], ids=["tokens", "distribution"])
def test_training_with_cached_states_equals_training_with_the_target(tmp_path, objective, form, forwards):
    """Bit by bit if no row is padded; the target runs once over each row, and once more over one to identify it."""
    texts = rows(*[20] * 8)
    without = trained(tmp_path, "without", texts, form, objective=objective)
    assert forwards == [4, 4, 4]
    forwards.clear()
    first = trained(tmp_path, "first", texts, form, objective=objective, cache_states=tmp_path / "states")
    assert forwards == [1, 8]
    again = trained(tmp_path, "again", texts, form, objective=objective, cache_states=tmp_path / "states")
    assert forwards == [1, 8, 1]
    for name, weight in without.items():
        assert torch.equal(weight, first[name])
        assert torch.equal(weight, again[name])


@pytest.mark.parametrize("packing", [None, 60])
def test_rows_of_different_lengths(tmp_path, packing):
    """Padding and packing change the target's rounding only."""
    without = trained(tmp_path, "without", MIXED, objective=KL, packing=packing)
    cached = trained(tmp_path, "cached", MIXED, objective=KL, packing=packing, cache_states=tmp_path / "states")
    for name, weight in without.items():
        torch.testing.assert_close(weight, cached[name], rtol=1e-3, atol=1e-4)


def test_states_before_tokens_to_learn_are_kept_in_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 40 * 32 * 4)
    found = computed(tmp_path, [*MIXED, MIXED[2]])
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [len(load_file(file)["states"]) for file in files]
    assert sizes == [15 + 4 + 26, 4 + 19 + 12 + 7, 25], "identical rows are stored once"
    assert found.size == 112 * 32 * 4
    for row in MIXED:
        batch = collate([row])
        torch.testing.assert_close(found(row)[4:-1], forward(batch["input_ids"], batch["segments"])[0, 4:-1])
    batch = collate([[MIXED[0], MIXED[1]], MIXED[2]], states=found)
    assert torch.equal(batch["hidden"][0, 4:19], found(MIXED[0])[4:19])
    assert torch.equal(batch["hidden"][0, 24:28], found(MIXED[1])[4:8])
    assert torch.equal(batch["hidden"][1, 4:30], found(MIXED[2])[4:30])
    assert int(batch["hidden"].any(-1).sum()) == 15 + 4 + 26


def test_states_of_any_width_and_dtype(tmp_path):
    def wide(ids, segments):
        return torch.cat((forward(ids, segments),) * 3, -1).bfloat16()

    found = computed(tmp_path, of=wide)
    assert found(MIXED[0]).shape == (20, 96)
    assert found(MIXED[0]).dtype == torch.bfloat16
    assert found.size == 112 * 96 * 2


def test_rows_without_a_token_to_learn(tmp_path):
    none = Row([5, 6, 7], [False] * 3)
    found = computed(tmp_path, [none, *MIXED])
    assert torch.equal(found(none), torch.zeros(3, 32))
    with pytest.raises(RedrafterError, match="no token to learn"):
        computed(tmp_path / "b", [none])


def test_the_size_is_reported_first(tmp_path):
    messages: list[str] = []
    found = States(tmp_path / "states", TARGET, forward, MIXED)

    def report(message):
        messages.append(message)
        if len(messages) == 1:
            assert not (tmp_path / "states").exists()

    found.compute(report)
    assert "0.00 GiB (112 tokens x 32 x 4 bytes)" in messages[0]
    again = States(tmp_path / "states", TARGET, forward, MIXED)
    again.compute(messages.append)
    assert "all present" in messages[-1]
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3)
    cost = estimate(MODEL, drafter, MIXED, Recipe(cache_states=tmp_path / "states"))
    assert cost.states == 112 * 32 * 4


@pytest.mark.parametrize("together", [False, True])
def test_processes_share_the_files_and_run_a_sharded_target_equally_often(tmp_path, monkeypatch, together):
    monkeypatch.setattr(module, "SHARD", 20 * 32 * 4)
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 30)
    texts = MIXED + rows(40, 9, 22, seed=1)
    computed(tmp_path / "complete", texts)
    runs, lock = {0: 0, 1: 0}, threading.Lock()

    def process(number: int) -> None:
        def counting(ids, segments):
            runs[number] += 1
            with lock:  # a model of one process
                return forward(ids, segments)

        found = States(tmp_path / "shared", TARGET, counting, texts)
        runs[number] = 0
        found.compute(lambda _: None, process=number, processes=2, together=together)
        assert found.missing == []

    monkeypatch.setattr(torch.distributed, "barrier", threading.Barrier(2, timeout=60).wait)
    with ThreadPoolExecutor() as pool:
        list(pool.map(process, runs))
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "complete").iterdir()
    }
    files = len(list((tmp_path / "shared").glob("*.safetensors")))
    assert files == 5, "only one process writes the last one"
    assert (runs[0] == runs[1]) == together


def other_weights():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    return model


@pytest.mark.parametrize(
    ("model", "texts", "message"),
    [
        (MODEL, MIXED[1:], "other rows"),
        (MODEL, [Row(MIXED[0].input_ids, [True] * 20), *MIXED[1:]], "other rows"),
        (tiny_model(rope_theta=500.0), MIXED, "another target"),
        (tiny_model().bfloat16(), MIXED, r"another target \(dtype float32, not bfloat16\)"),
        (other_weights(), MIXED, "other weights"),
    ],
)
def test_states_of_other_rows_or_targets_are_refused(tmp_path, model, texts, message):
    computed(tmp_path)
    target = Target(model)

    def of(ids, segments):
        with torch.no_grad():
            return target.hidden_states(ids, segments)

    with pytest.raises(RedrafterError, match=message):
        computed(tmp_path, texts, target, of)


def test_a_damaged_folder_is_refused(tmp_path):
    computed(tmp_path)
    file = tmp_path / "states-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RedrafterError, match=r"00000\.safetensors is damaged"):
        computed(tmp_path)
    file.unlink()
    assert computed(tmp_path)(MIXED[0]).any()
    (tmp_path / "states.json").write_text(json.dumps({"target": 1}))
    with pytest.raises(RedrafterError, match=r"states\.json is not the index"):
        computed(tmp_path)


def test_a_disk_too_small_is_reported_before_anything_is_computed(tmp_path, monkeypatch, forwards):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RedrafterError, match="GiB are free"):
        computed(tmp_path)
    assert len(forwards) == 1, "the row that gives the width"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda at: SimpleNamespace(free=2**40 if at == tmp_path else 1000))
    with pytest.raises(RedrafterError, match="The states take"):
        trained(tmp_path, "d", MIXED, cache_states=tmp_path / "states")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_complete_files_to_resume_from(tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "SHARD", 40 * 32 * 4)
    save = module.save_file

    def broken(tensors, path):
        save(tensors, path)
        if "00001" in path.name:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", broken)
        with pytest.raises(RedrafterError, match=r"00001\.safetensors .* no space is left"):
            computed(tmp_path / "states")
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["states-00000.safetensors", "states.json"]
    left, written = (tmp_path / "states" / f".states-0000{i}.safetensors.1.part" for i in (1, 2))
    for path in (left, written):
        path.write_text("cut off")
    os.utime(left, (0, 0))  # left by a killed process; another process writes the other one
    computed(tmp_path / "states")
    assert not left.exists()
    written.unlink()
    computed(tmp_path / "complete")
    assert {path.name: path.read_bytes() for path in (tmp_path / "states").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "complete").iterdir()
    }


def test_states_of_another_reach_or_of_other_layers_are_refused(tmp_path):
    computed(tmp_path)
    with pytest.raises(RedrafterError, match=r"another target \(reach 1, not 3\)"):
        States(tmp_path, TARGET, forward, MIXED, reach=3)
    deep = tiny_model(num_hidden_layers=3)

    def of(layers):
        target = Target(deep, layers)
        return States(tmp_path / "deep", target, torch.no_grad()(target.hidden_states), MIXED)

    of((1,)).compute(lambda _: None)
    with pytest.raises(RedrafterError, match="another target"):
        of((2,))
