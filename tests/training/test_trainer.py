"""Training runs: they learn, they leave the target alone, and they survive an interrupt."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.training import trainer
from redrafter.training.data import Row
from redrafter.training.trainer import Recipe, newest_checkpoint, run

MODEL = tiny_model()


def own_text(count: int) -> list[Row]:
    """What the model itself writes, as rows."""
    prompts = [[token] for token in range(3, 3 + count)]
    texts = generate(MODEL, None, prompts, max_new_tokens=24).new_tokens
    return [Row(p + n, [False] + [True] * len(n)) for p, n in zip(prompts, texts, strict=True)]


def fresh() -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, beam_length=3)


def weights(drafter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in drafter.parameters()]


def test_it_learns_and_leaves_the_target_alone(tmp_path):
    model = tiny_model()
    before = weights(model)
    rows = own_text(16)
    drafter = fresh()
    first = run(
        model, drafter, rows, tmp_path / "a", Recipe(max_steps=1, batch_size=8, learning_rate=5e-3), resume=False
    )
    drafter = fresh()
    run(model, drafter, rows, tmp_path / "b", Recipe(max_steps=60, batch_size=8, learning_rate=5e-3), resume=False)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    again = RecurrentDrafter.from_pretrained(tmp_path / "b", target=model)
    assert all(torch.equal(a, b) for a, b in zip(weights(drafter), weights(again), strict=True))
    assert not (tmp_path / "b" / "checkpoints").exists()
    card = (tmp_path / "b" / "README.md").read_text()
    assert "16 rows with 384 tokens to learn" in card
    out = generate(model, again, [row.input_ids[:1] for row in rows], max_new_tokens=24)
    assert out.stats.tokens_per_step > 1.5, "it drafts what it was trained on"
    assert first > 3 * 3, "an untrained drafter is near log 61 at each of three positions"


def after_checkpoint(step: int, act, monkeypatch):
    """Lets something happen once the checkpoint of a step is written."""
    save = trainer.Checkpointing._save_checkpoint

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == step:
            act()

    monkeypatch.setattr(trainer.Checkpointing, "_save_checkpoint", saved)


def interrupt():
    raise KeyboardInterrupt


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path, monkeypatch):
    rows = own_text(16)
    recipe = Recipe(max_steps=8, batch_size=4, learning_rate=5e-3, save_steps=2)
    whole = fresh()
    run(MODEL, whole, rows, tmp_path / "whole", recipe, resume=False)

    with monkeypatch.context() as patched:
        after_checkpoint(6, interrupt, patched)
        with pytest.raises(KeyboardInterrupt):
            run(MODEL, fresh(), rows, tmp_path / "parted", recipe, resume=False)
    checkpoints = tmp_path / "parted" / "checkpoints"
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    (checkpoints / "checkpoint-6" / trainer.COMPLETE).unlink()  # as if it had been cut off in writing
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    with pytest.raises(RedrafterError, match="holds an unfinished run: pass --resume"):
        run(MODEL, fresh(), rows, tmp_path / "parted", recipe, resume=False)

    parted = RecurrentDrafter.for_target(MODEL, beam_length=3)  # other weights, which the checkpoint replaces
    run(MODEL, parted, rows, tmp_path / "parted", recipe, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parted), strict=True))


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(RedrafterError, match="no checkpoint to resume from"):
        run(MODEL, fresh(), own_text(2), tmp_path / "none", Recipe(), resume=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 2 vs 1")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, error):
    def broken(self, folder):
        if self.state.global_step == 4:
            raise error

    monkeypatch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RedrafterError, match=f"checkpoint-4 could not be written: .*{str(error)[-10:]}"):
        run(MODEL, fresh(), own_text(4), tmp_path, Recipe(max_steps=6, save_steps=2), resume=False)
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert not (tmp_path / "model.safetensors").exists()
