"""Training runs: they learn, they leave the target alone, and they survive an interrupt."""

from __future__ import annotations

import signal
import warnings
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.data.examples import Row, most_frequent
from redrafter.evaluation.acceptance import Acceptance
from redrafter.heads.medusa import MedusaHeads
from redrafter.training import clock, trainer
from redrafter.training.checks import check_place, newest_checkpoint
from redrafter.training.estimating import estimate
from redrafter.training.loss import Objective
from redrafter.training.outcome import Measurement, advice
from redrafter.training.recipe import Recipe, share_of_rate
from redrafter.training.trainer import run
from redrafter.utils.interrupt import Interrupted, interruptible

MODEL = tiny_model()


def own_text(count: int) -> list[Row]:
    """What the model itself writes, as rows."""
    prompts = [[token] for token in range(3, 3 + count)]
    texts = generate(MODEL, None, prompts, max_new_tokens=24).new_tokens
    return [Row(p + n, [False] + [True] * len(n)) for p, n in zip(prompts, texts, strict=True)]


def fresh(**form) -> RecurrentDrafter:
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, **form)
    if "context_layers" in form:  # it begins with zeros, of which no fault could be seen
        torch.nn.init.normal_(drafter.fuse.weight)
    return drafter


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
    assert first.loss > 3 * 3, "an untrained drafter is near log 61 at each of three positions"


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


def begun(rows, folder: Path, recipe: Recipe, monkeypatch, *, until: int) -> None:
    """A run that is interrupted after a checkpoint."""
    with monkeypatch.context() as patched:
        after_checkpoint(until, interrupt, patched)
        with pytest.raises(KeyboardInterrupt):
            run(MODEL, fresh(), rows, folder, recipe, resume=False)


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path, monkeypatch):
    rows = own_text(16)
    recipe = Recipe(max_steps=8, batch_size=4, learning_rate=5e-3, save_steps=2, window_share=0.5)  # which is drawn
    whole = fresh()
    run(MODEL, whole, rows, tmp_path / "whole", recipe, resume=False)

    begun(rows, tmp_path / "parted", recipe, monkeypatch, until=6)
    checkpoints = tmp_path / "parted" / "checkpoints"
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    (checkpoints / "checkpoint-6" / trainer.COMPLETE).unlink()  # as if it had been cut off in writing
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    with pytest.raises(RedrafterError, match="holds an unfinished run: pass --resume"):
        run(MODEL, fresh(), rows, tmp_path / "parted", recipe, resume=False)

    parted = RecurrentDrafter.for_target(MODEL, beam_length=3)  # other weights, which the checkpoint replaces
    run(MODEL, parted, rows, tmp_path / "parted", recipe, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parted), strict=True))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"batch_size": 2}, "--batch-size 4, not 2"),
        ({"accumulation": 2}, "--accumulation 1, not 2"),
        ({"seed": 5}, "--seed 0, not 5"),
        ({"packing": 60}, "--packing None, not 60"),
        ({"rows": 14}, "a number of rows of 16, not 14"),
        ({"WORLD_SIZE": "2"}, "a number of processes of 1, not 2"),
    ],
)
def test_a_run_does_not_go_on_after_rows_that_it_has_not_seen(tmp_path, monkeypatch, changed, sentence):
    rows, recipe = own_text(16), Recipe(max_steps=4, batch_size=4, save_steps=2)
    begun(rows, tmp_path, recipe, monkeypatch, until=2)
    rows = rows[: changed.get("rows", 16)]
    if "WORLD_SIZE" in changed:
        monkeypatch.setattr(trainer, "processes", lambda: 2)
    told = {name: value for name, value in changed.items() if name not in ("rows", "WORLD_SIZE")}
    monkeypatch.setattr(trainer, "Target", lambda *_: pytest.fail("it was told late"))
    with pytest.raises(RedrafterError, match=f"was begun with {sentence}: go on as it was begun"):
        run(MODEL, fresh(), rows, tmp_path, replace(recipe, **told), resume=True)


def test_a_run_that_goes_on_heeds_another_rate_and_distance_of_checkpoints(tmp_path, monkeypatch):
    rows, recipe = own_text(16), Recipe(max_steps=8, batch_size=4, learning_rate=8.0, save_steps=2, warmup=0.5)
    begun(rows, tmp_path, recipe, monkeypatch, until=2)
    rates, saved = [], []
    step, save = trainer.Trainer.training_step, trainer.Checkpointing._save_checkpoint

    def seen(self, *args, **kwargs):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    def kept(self, *args, **kwargs):
        saved.append(self.state.global_step)
        save(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", seen)
    monkeypatch.setattr(trainer.Checkpointing, "_save_checkpoint", kept)
    run(MODEL, fresh(), rows, tmp_path, replace(recipe, learning_rate=1e-3, save_steps=3), resume=True)
    assert rates == pytest.approx([1e-3 * share_of_rate(done / 8, 0.5) for done in range(2, 8)])
    assert saved == [3, 6, 8]


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
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, monkeypatch):
    step = trainer.Trainer.training_step

    def broken(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(trainer.Trainer, "training_step", broken)
    with pytest.raises(RedrafterError, match="not finite at step 5; checkpoint-4 is the last good checkpoint"):
        run(MODEL, fresh(), own_text(4), tmp_path, Recipe(max_steps=8, save_steps=2), resume=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, monkeypatch):
    """As gradients make them whose loss was finite, here or in another process."""
    drafter = fresh()
    step = trainer.Trainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            next(drafter.parameters()).data[0] = torch.inf
        return step(self, *args, **kwargs).nan_to_num()

    monkeypatch.setattr(trainer.Trainer, "training_step", broken)
    with pytest.raises(RedrafterError, match="weights are not finite after step 4; checkpoint-2 is the last good"):
        run(MODEL, drafter, own_text(4), tmp_path, Recipe(max_steps=8, save_steps=2), resume=False)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


def test_full_memory_is_told_with_what_to_lower_and_found_before_the_first_step_where_it_can_be(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows, told = own_text(6), r"memory of cpu is full: lower --batch-size \(now 4\), --max-length or --beam-width"
    recipe = Recipe(max_steps=2, batch_size=4)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "acceptance", full)
        with pytest.raises(RedrafterError, match=told):
            run(MODEL, fresh(), rows[:4], tmp_path, recipe, held_out=rows[4:], resume=False)
    assert list(tmp_path.iterdir()) == []
    for broken in ("training_step", "_save_optimizer_and_scheduler"):
        with monkeypatch.context() as patched:
            patched.setattr(trainer.Trainer, broken, full)
            with pytest.raises(RedrafterError, match=told):
                run(MODEL, fresh(), rows, tmp_path / broken, recipe, resume=False)


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(
        RedrafterError, match=r"^The checkpoints in .* take up to 0.00 GiB, and 0.00 GiB are free there"
    ):
        run(MODEL, fresh(), own_text(4), tmp_path / "new" / "one", Recipe(max_steps=1), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_there_need_no_more_of_the_disk(tmp_path, monkeypatch):
    rows, recipe = own_text(4), Recipe(max_steps=6, save_steps=2)
    begun(rows, tmp_path, recipe, monkeypatch, until=4)
    three = 9 * sum(one.nbytes for one in fresh().parameters())
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: SimpleNamespace(free=three - 1))
    run(MODEL, fresh(), rows, tmp_path, recipe, resume=True)
    with pytest.raises(RedrafterError, match="GiB are free there"):
        run(MODEL, fresh(), rows, tmp_path / "new", recipe, resume=False)


def test_of_several_gpus_a_process_takes_the_one_that_its_model_is_on(tmp_path, monkeypatch):
    def sees_four(arguments):
        arguments._n_gpu = 4
        return torch.device("cpu")

    seen = cached_property(sees_four)
    seen.__set_name__(trainer.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(trainer.TrainingArguments, "_setup_devices", seen)
    arguments = trainer._arguments(fresh(), Recipe(batch_size=3), tmp_path, measured=False)
    assert arguments.train_batch_size == 3, "not that of a copy on each"
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    check_place(first, first)
    check_place(torch.device("mps"), torch.device("mps:0"))
    with pytest.raises(RedrafterError, match="trains on cuda:0, and the model is on cuda:1: choose a GPU by"):
        check_place(first, second)


def test_the_best_checkpoint_on_held_out_rows_is_kept(tmp_path, monkeypatch):
    """Acceptance is made to fall after the third look, so the weights written must be those of step 4."""
    looks: list[int] = []
    seen: dict[int, list[torch.Tensor]] = {}
    drafter = fresh()

    def measured(module, rows, batch_size):
        assert batch_size == 3
        looks.append(len(rows))
        seen[len(looks)] = weights(drafter)
        return Acceptance(drafts=10, draft_tokens=30, accepted={2: 5, 3: 9}.get(len(looks), 1), by_position=[1, 0, 0])

    monkeypatch.setattr(trainer, "held_out_acceptance", measured)
    rows = own_text(16)
    recipe = Recipe(max_steps=7, batch_size=3, learning_rate=5e-3, save_steps=2)
    run(MODEL, drafter, rows[:12], tmp_path, recipe, held_out=rows[12:], resume=False)
    assert looks == [3, *[4] * 4], "a batch before the first step, then after steps 2, 4, 6 and the last one"
    assert "| mean acceptance length | 1.90 tokens" in (tmp_path / "README.md").read_text(), "as it was at step 4"
    assert all(torch.equal(a, b) for a, b in zip(weights(drafter), seen[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[3], seen[5], strict=True))


def test_the_card_tells_what_the_run_saw(tmp_path):
    rows = own_text(16)
    recipe = Recipe(
        max_steps=2, batch_size=4, accumulation=2, save_steps=9, objective=Objective(0.1, kl=0.9, decay=0.8)
    )
    told = {"sources": ["someone/chats:train_sft", "mine.jsonl"], "licence": "mit"}
    run(MODEL, fresh(), rows[:14], tmp_path, recipe, held_out=rows[14:], resume=False, **told)
    card = (tmp_path / "README.md").read_text()
    for words in (
        "license: mit", "- someone/chats\n", "14 rows with 336 tokens to learn of someone/chats:train_sft, mine.jsonl",
        "cross-entropy 0.1, kl 0.9, decay 0.8", "2 of 4 x 2", "tokens a step (10 beams of 3 tokens)",
        "torch " + torch.__version__,
    ):  # fmt: skip
        assert words in card, words


def test_a_part_of_the_vocabulary_and_of_the_windows(tmp_path):
    rows = own_text(8)
    vocabulary = most_frequent(rows, 5)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, draft_vocabulary=vocabulary)
    learnt = torch.tensor([token for row in rows for token in row.input_ids[1:]])
    covered = torch.isin(learnt, vocabulary).float().mean().item()
    run(MODEL, drafter, rows, tmp_path / "d", Recipe(max_steps=2, batch_size=4, window_share=0.25), resume=False)
    card = (tmp_path / "d" / "README.md").read_text()
    assert f"drafts 5 of 61 tokens, which are {covered:.2%} of those to learn |" in card
    assert "| steps | 2 of 4 x 1, a share of 0.25 of the places, rate 0.001 |" in card
    for share in (0.0, 1.5):
        with pytest.raises(RedrafterError, match="share of windows must be above 0 and at most 1"):
            Recipe(window_share=share)


@pytest.mark.parametrize("form", [{}, {"context_layers": (1,), "context_positions": 3}])
def test_packed_rows_learn_what_rows_alone_learn(tmp_path, form):
    """One batch of all rows, so that only the packing differs."""
    rows = own_text(6)
    losses = [
        run(
            MODEL,
            fresh(**form),
            rows,
            tmp_path / str(packing),
            Recipe(max_steps=1, batch_size=6, packing=packing),
            resume=False,
        ).loss
        for packing in (None, 60)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulated_batches_are_one_step(tmp_path):
    rows = own_text(8)
    steps = []
    for name, recipe in (
        ("a", Recipe(max_steps=2, batch_size=4)),
        ("b", Recipe(max_steps=2, batch_size=2, accumulation=2)),
    ):
        drafter = fresh()
        run(MODEL, drafter, rows, tmp_path / name, recipe, resume=False)
        steps.append(drafter)
    for one, other in zip(weights(steps[0]), weights(steps[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def by_a_clock_of_whole_seconds(monkeypatch) -> None:
    """Every look at the clock finds one second more; what is not training takes no time."""
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=map(float, count()).__next__))


def test_a_run_by_the_clock_ends_with_its_time(tmp_path, monkeypatch):
    by_a_clock_of_whole_seconds(monkeypatch)
    rates = []
    step = trainer.Trainer.training_step

    def seen(self, *args, **kwargs):
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "training_step", seen)
    rows = own_text(8)
    recipe = Recipe(seconds=21.0, batch_size=4, learning_rate=1.0, warmup=0.5)
    found = run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], resume=False)
    assert (found.steps, found.epochs, found.tokens) == (20, 10.0, 10 * 6 * 25)
    assert found.seconds > 0
    assert rates == pytest.approx([share_of_rate(second / 21, 0.5) for second in range(1, 21)])
    assert rates[9] == pytest.approx(10 / 10.5), "half of the time is warm-up"
    assert rates[-1] < 0.03
    assert "| steps | 20 of 4 x 1, which took 21 s, rate 1 |" in (tmp_path / "README.md").read_text()
    assert found.found is not None, "the last step is measured"


def test_a_run_by_the_clock_that_is_resumed_has_the_rest_of_its_time(tmp_path, monkeypatch):
    by_a_clock_of_whole_seconds(monkeypatch)
    rows = own_text(8)
    recipe = Recipe(seconds=9.0, batch_size=4, save_steps=2)
    begun(rows, tmp_path, recipe, monkeypatch, until=4)
    found = run(MODEL, fresh(), rows, tmp_path, recipe, resume=True)
    assert found.steps == 8, "of one second each, after one second of the first look"


def test_a_run_by_the_clock_that_is_resumed_may_have_more_time(tmp_path, monkeypatch):
    """And its last step is kept, as that of every run."""
    by_a_clock_of_whole_seconds(monkeypatch)
    rows, recipe = own_text(8), Recipe(seconds=9.0, batch_size=4, save_steps=2)
    begun(rows, tmp_path, recipe, monkeypatch, until=4)
    saved, save = [], trainer.Checkpointing._save_checkpoint

    def kept(self, *args, **kwargs):
        saved.append(self.state.global_step)
        save(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Checkpointing, "_save_checkpoint", kept)
    found = run(MODEL, fresh(), rows, tmp_path, replace(recipe, seconds=16.0), resume=True)
    assert found.steps == 15
    assert saved == [6, 8, 10, 12, 14, 15]


def test_a_time_is_refused_where_it_is_none_or_not_alone():
    with pytest.raises(RedrafterError, match="The time to train must be positive, not 0 s"):
        Recipe(seconds=0.0)
    with pytest.raises(RedrafterError, match="give one of them"):
        Recipe(seconds=1.0, max_steps=2)


def measured_in(seconds: float, monkeypatch) -> list[int]:
    """A row takes so many seconds to measure, and a step one; returns the time, then how many rows were measured."""
    now, looks, step = [0.0], [], trainer.Trainer.training_step

    def stepped(self, *args, **kwargs):
        now[0] += 1
        return step(self, *args, **kwargs)

    def measured(module, rows, batch_size):
        now[0] += seconds * len(rows)
        looks.append(len(rows))
        return Acceptance(drafts=10, draft_tokens=30, accepted=5, by_position=[5, 0, 0])

    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(trainer, "time", fake)
    monkeypatch.setattr(clock, "time", fake)
    monkeypatch.setattr(trainer.Trainer, "training_step", stepped)
    monkeypatch.setattr(trainer, "held_out_acceptance", measured)
    looks.append(now)
    return looks


def test_measurements_count_in_the_time_of_a_run(tmp_path, monkeypatch):
    """30 held-out rows take 30 s of 100: a batch is measured before the first step, and all once, at the end."""
    found = measured_in(1.0, monkeypatch)
    rows = own_text(34)
    recipe = Recipe(seconds=100.0, batch_size=4)
    ended = run(MODEL, fresh(), rows[:4], tmp_path, recipe, held_out=rows[4:], resume=False)
    now, *looks = found
    assert looks == [4, 30]
    assert ended.steps == 100 - 4 - 30
    assert now[0] == 100.0
    assert ended.found.drafts == 10


def test_fewer_held_out_rows_are_measured_where_they_would_take_the_time(tmp_path, monkeypatch):
    found = measured_in(1.0, monkeypatch)
    rows = own_text(34)
    recipe = Recipe(seconds=100.0, batch_size=4, save_steps=None)
    run(MODEL, fresh(), rows[:4], tmp_path, recipe, held_out=rows[4:], fewer_held_out=True, resume=False)
    now, first, *looks = found
    assert first == 4
    assert set(looks) == {5}, "which take 5 s each"
    assert 2 <= len(looks) <= 6
    assert now[0] <= 101.0


def test_medusa_heads_are_measured_once_more_within_their_time(tmp_path, monkeypatch):
    found = measured_in(1.0, monkeypatch)
    monkeypatch.setattr(trainer, "fit", lambda *_: None)
    heads = MedusaHeads.fresh(MODEL, heads=3)
    rows = own_text(14)
    run(
        MODEL,
        heads,
        rows[:4],
        tmp_path,
        Recipe(seconds=100.0, batch_size=4, save_steps=None),
        held_out=rows[4:],
        resume=False,
    )
    now, *looks = found
    assert looks == [4, 10, 10], "no measurement on the way is worth a tenth of the time"
    assert 80 <= now[0] <= 100


@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
def test_checkpoints_are_written_by_time(tmp_path, monkeypatch, save_seconds):
    saved, save = [], trainer.Checkpointing._save_checkpoint

    def kept(self, *args, **kwargs):
        saved.append(self.state.global_step)
        save(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Checkpointing, "_save_checkpoint", kept)
    recipe = Recipe(max_steps=4, batch_size=4, save_seconds=save_seconds)
    run(MODEL, fresh(), own_text(4), tmp_path, recipe, resume=False)
    assert saved == ([1, 2, 3, 4] if save_seconds == 0 else [4])
    with pytest.raises(RedrafterError, match="must not be negative"):
        Recipe(save_seconds=-1.0)


def test_a_signal_during_a_measurement_saves_the_step_before_it(tmp_path, monkeypatch):
    looks = []

    def measured(module, rows, batch_size):
        looks.append(len(rows))
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)
        return Acceptance(drafts=10, draft_tokens=30, accepted=5, by_position=[5, 0, 0])

    monkeypatch.setattr(trainer, "held_out_acceptance", measured)
    rows, recipe = own_text(8), Recipe(max_steps=8, batch_size=4, save_steps=2)
    with pytest.raises(Interrupted) as raised, interruptible():
        run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], resume=False)
    assert raised.value.number == signal.SIGTERM
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    assert run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], resume=True).steps == 8


def test_whether_acceptance_was_still_rising_is_told_with_the_option_to_raise():
    def course(*lengths, **how):
        found = [Acceptance(100, 300, round(100 * (one - 1)), [0]) for one in lengths]
        return advice([Measurement(step, one) for step, one in enumerate(found, start=1)], Recipe(**how))

    assert course(1.5, 2.0, 2.1) == (
        "Held-out tokens per step: 1.50, 2.00, 2.10; "
        "still rising in the second half: raise --epochs (now 2) to train longer."
    )
    assert "still rising in the second half: raise --minutes (now 1.5)" in course(1.5, 2.0, seconds=90.0)
    assert "still rising in the second half: raise --max-steps (now 7)" in course(1.5, 2.0, max_steps=7)
    assert "still rising in the second half" in course(1.27, 1.36, 1.44, 1.53, 1.55, 1.55), "as the rate falls"
    assert "no longer rising (best after step 2)" in course(1.5, 2.5, 2.4)
    assert "no longer rising (best after step 4)" in course(1.5, 2.0, 2.01, 2.02)
    assert "no longer rising (best after step 1)" in course(2.5, 2.0, 2.2)
    assert "little is learnt yet: raise --epochs (now 2)" in course(1.02, 1.0)
    assert "measured once" in course(2.0)
    assert "No rows were held out" in course()


def test_a_loss_is_told_with_its_unit():
    assert Objective().in_words(8.0, 4) == "2.000 nats per drafted token (8.000 over 4 draft positions)"
    assert Objective(0.0, kl=1.0, decay=0.5).in_words(3.0, 2).startswith("2.000 nats per drafted token")
    assert "nats" not in Objective(total_variation=1.0).in_words(8.0, 4), "a distance has no unit"


def test_an_estimate_counts_the_steps_and_trains_nothing():
    drafter = fresh()
    before = weights(drafter)
    found = estimate(MODEL, drafter, own_text(10), Recipe(epochs=3.0, batch_size=2, accumulation=2))
    assert found.steps == 9
    assert found.seconds > 0
    assert found.weights == 4 * (sum(p.numel() for p in MODEL.parameters()) + 4 * sum(p.numel() for p in before))
    assert found.peak is None
    assert all(torch.equal(a, b) for a, b in zip(before, weights(drafter), strict=True))
    assert all(p.grad is None for p in drafter.parameters())
    timed = estimate(MODEL, drafter, own_text(10), Recipe(seconds=100.0, batch_size=2))
    assert 100 <= timed.seconds < 100 + timed.seconds / timed.steps * 1.01


def test_continuations_know_no_distribution(tmp_path):
    rows = [Row([3, 4, 5], [True] * 3, [[4, 5], [5, 6], [6, 7]])]
    with pytest.raises(RedrafterError, match="train on them with cross-entropy alone"):
        run(MODEL, fresh(), rows, tmp_path, Recipe(objective=Objective(0.5, kl=0.5)), resume=False)


def test_what_this_machine_cannot_do_is_refused(tmp_path):
    with pytest.raises(RedrafterError, match="cannot be trained so: "):
        run(MODEL, fresh(), own_text(2), tmp_path, Recipe(report_to=("nothing",)), resume=False)


def test_what_a_logger_writes_stays(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        run(MODEL, fresh(), own_text(2), tmp_path, Recipe(max_steps=2, report_to=("tensorboard",)), resume=False)
    assert list((tmp_path / "checkpoints").rglob("events.out.tfevents*"))
    assert newest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("form", [{}, {"gated": True, "context_layers": (1,), "context_positions": 2}, {"rnn": False}])
def test_every_form_learns_in_half_precision(tmp_path, form):
    drafter = fresh(**form)
    run(MODEL, drafter, own_text(4), tmp_path, Recipe(max_steps=2, batch_size=4, precision="bfloat16"), resume=False)
    assert all(weight.isfinite().all() for weight in weights(drafter))
