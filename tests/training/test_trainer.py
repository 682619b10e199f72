"""Training runs: the drafter learns, the target does not change, and an interrupted run resumes."""

from __future__ import annotations

import functools
import shutil
import signal
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.data.examples import Row, most_frequent
from redrafter.evaluation.acceptance import Acceptance
from redrafter.heads.medusa import MedusaHeads
from redrafter.training import checkpointing, clock, trainer
from redrafter.training.checkpointing import training_arguments
from redrafter.training.checks import check_device, newest_checkpoint
from redrafter.training.estimating import estimate
from redrafter.training.objective import Objective
from redrafter.training.outcome import Measurement, advice
from redrafter.training.recipe import Recipe, rate_factor
from redrafter.training.trainer import run
from redrafter.utils.interrupt import Interrupted, interruptible
from redrafter.utils.outputs import COMPLETE, ORDER

MODEL = tiny_model()


@functools.cache
def texts() -> list[list[int]]:
    """What the model generates after each of some tokens."""
    prompts = [[token] for token in range(3, 37)]
    return [p + n for p, n in zip(prompts, generate(MODEL, None, prompts, max_new_tokens=24).new_tokens, strict=True)]


def own_text(count: int) -> list[Row]:
    """Rows that the model generates."""
    return [Row(list(text), [False] + [True] * (len(text) - 1)) for text in texts()[:count]]


def fresh(**form) -> RecurrentDrafter:
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, **form)
    if "context_layers" in form:  # initialised with zeros, which would hide errors
        torch.nn.init.normal_(drafter.fuse.weight)
    return drafter


def weights(drafter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in drafter.parameters()]


def test_the_drafter_learns_and_the_target_does_not_change(tmp_path):
    model = tiny_model()
    before = weights(model)
    rows = own_text(16)
    drafter = fresh()
    first = run(
        model, drafter, rows, tmp_path / "a", Recipe(max_steps=1, batch_size=8, learning_rate=5e-3), resume=False
    )
    drafter = fresh()
    run(model, drafter, rows, tmp_path / "b", Recipe(max_steps=40, batch_size=8, learning_rate=5e-3), resume=False)
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


class AtCheckpoint(TrainerCallback):
    """Records the step of every checkpoint and calls a function after that of one step."""

    def __init__(self, step: int | None = None, act=None):
        self.step, self.act, self.saved = step, act, []

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)
        if state.global_step == self.step:
            self.act()


def interrupt():
    raise KeyboardInterrupt


def begun(rows, folder: Path, recipe: Recipe, *, until: int, callbacks=()) -> None:
    """A run that is interrupted after a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        run(MODEL, fresh(), rows, folder, recipe, callbacks=[AtCheckpoint(until, interrupt), *callbacks], resume=False)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    rows = own_text(16)
    recipe = Recipe(
        max_steps=8, batch_size=4, learning_rate=5e-3, save_steps=2, window_share=0.5
    )  # windows are drawn at random
    complete = fresh()
    run(MODEL, complete, rows, tmp_path / "complete", recipe, resume=False)

    begun(rows, tmp_path / "interrupted", recipe, until=6)
    checkpoints = tmp_path / "interrupted" / "checkpoints"
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    (checkpoints / "checkpoint-6" / COMPLETE).unlink()  # as if writing had been cut off
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    with pytest.raises(RedrafterError, match="pass --resume"):
        run(MODEL, fresh(), rows, tmp_path / "interrupted", recipe, resume=False)

    resumed = RecurrentDrafter.for_target(MODEL, beam_length=3)  # other weights, which the checkpoint replaces
    run(MODEL, resumed, rows, tmp_path / "interrupted", recipe, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(complete), weights(resumed), strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 2}, "--batch-size 4, not 2"),
        ({"accumulation": 2}, "--accumulation 1, not 2"),
        ({"seed": 5}, "--seed 0, not 5"),
        ({"packing": 60}, "--packing None, not 60"),
        ({"rows": 14}, "number of rows 16, not 14"),
        ({"WORLD_SIZE": "2"}, "number of processes 1, not 2"),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_a_run_resumes_only_with_the_same_order_of_rows(tmp_path, monkeypatch, changed, message, older):
    rows, recipe, changed = own_text(16), Recipe(max_steps=4, batch_size=4, save_steps=2), dict(changed)
    begun(rows, tmp_path, recipe, until=2)
    order = tmp_path / "checkpoints" / ORDER
    if older:  # as earlier versions named the values
        order.write_text(order.read_text().replace("number of rows", "a number of rows of"))
        order.write_text(order.read_text().replace("number of processes", "a number of processes of"))
    rows = rows[: changed.pop("rows", 16)]
    for name in {"WORLD_SIZE"} & changed.keys():
        monkeypatch.setenv(name, changed.pop(name))
    monkeypatch.setattr(trainer, "Target", lambda *_: pytest.fail("it was reported late"))
    with pytest.raises(RedrafterError, match=message):
        run(MODEL, fresh(), rows, tmp_path, replace(recipe, **changed), resume=True)


class Rates(TrainerCallback):
    """Records the learning rate of every step."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_a_resumed_run_uses_its_own_rate_and_checkpoint_interval(tmp_path):
    rows, recipe = own_text(16), Recipe(max_steps=8, batch_size=4, learning_rate=8.0, save_steps=2, warmup=0.5)
    begun(rows, tmp_path, recipe, until=2)
    rates, checkpoints = Rates(), AtCheckpoint()
    recipe = replace(recipe, learning_rate=1e-3, save_steps=3)
    run(MODEL, fresh(), rows, tmp_path, recipe, callbacks=[rates, checkpoints], resume=True)
    assert rates.rates == pytest.approx([1e-3 * rate_factor(done / 8, 0.5) for done in range(2, 8)])
    assert checkpoints.saved == [3, 6, 8]


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(RedrafterError, match="no checkpoint to resume from"):
        run(MODEL, fresh(), own_text(2), tmp_path / "none", Recipe(), resume=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 2 vs 1")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch, error):
    def broken(self, folder):
        if self.state.global_step == 4:
            raise error

    monkeypatch.setattr(checkpointing.Trainer, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RedrafterError, match=f"checkpoint-4 .*{str(error)[-10:]}"):
        run(MODEL, fresh(), own_text(4), tmp_path, Recipe(max_steps=6, save_steps=2), resume=False)
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, monkeypatch):
    step = checkpointing.Trainer.training_step

    def broken(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(checkpointing.Trainer, "training_step", broken)
    with pytest.raises(RedrafterError, match="loss is not finite at step 5; checkpoint-4"):
        run(MODEL, fresh(), own_text(4), tmp_path, Recipe(max_steps=8, save_steps=2), resume=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Gradients can be infinite although the loss is finite."""
    drafter = fresh()
    step = checkpointing.Trainer.training_step

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            next(drafter.parameters()).data[0] = torch.inf
        return step(self, *args, **kwargs).nan_to_num()

    monkeypatch.setattr(checkpointing.Trainer, "training_step", broken)
    with pytest.raises(RedrafterError, match="weights are not finite after step 4; checkpoint-2"):
        run(MODEL, drafter, own_text(4), tmp_path, Recipe(max_steps=8, save_steps=2), resume=False)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


def test_full_memory_is_reported_with_what_to_lower_before_the_first_step_if_possible(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows, message = own_text(6), r"lower --batch-size \(now 4\)"
    recipe = Recipe(max_steps=2, batch_size=4)
    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "acceptance", full)
        with pytest.raises(RedrafterError, match=message):
            run(MODEL, fresh(), rows[:4], tmp_path, recipe, held_out=rows[4:], resume=False)
    assert list(tmp_path.iterdir()) == []
    for broken in ("training_step", "_save_optimizer_and_scheduler"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpointing.Trainer, broken, full)
            with pytest.raises(RedrafterError, match=message):
                run(MODEL, fresh(), rows, tmp_path / broken, recipe, resume=False)


def test_a_disk_too_small_for_checkpoints_is_reported_before_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(RedrafterError, match="GiB are free"):
        run(MODEL, fresh(), own_text(4), tmp_path / "new" / "one", Recipe(max_steps=1), resume=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_checkpoints_do_not_count_twice(tmp_path, monkeypatch):
    rows, recipe = own_text(4), Recipe(max_steps=6, save_steps=2)
    begun(rows, tmp_path, recipe, until=4)
    three = 9 * sum(one.nbytes for one in fresh().parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=three - 1))
    run(MODEL, fresh(), rows, tmp_path, recipe, resume=True)
    with pytest.raises(RedrafterError, match="GiB are free there"):
        run(MODEL, fresh(), rows, tmp_path / "new", recipe, resume=False)


def test_a_process_trains_on_the_gpu_of_its_model(tmp_path, monkeypatch):
    def sees_four(arguments):
        arguments._n_gpu = 4
        return torch.device("cpu")

    seen = cached_property(sees_four)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    arguments = training_arguments(fresh(), Recipe(batch_size=3), tmp_path, measured=False)
    assert arguments.train_batch_size == 3, "there is no copy on each GPU"
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    check_device(first, first)
    check_device(torch.device("mps"), torch.device("mps:0"))
    with pytest.raises(RedrafterError, match="CUDA_VISIBLE_DEVICES"):
        check_device(first, second)


def measure_with(measured, monkeypatch) -> None:
    """Replaces the measurement of held-out rows."""
    for module in (trainer, checkpointing):
        monkeypatch.setattr(module, "held_out_acceptance", measured)


def test_the_best_checkpoint_on_held_out_rows_is_kept(tmp_path, monkeypatch):
    """The third measurement is the best, so the published weights must be those of step 4."""
    looks: list[int] = []
    seen: dict[int, list[torch.Tensor]] = {}
    drafter = fresh()

    def measured(module, rows, batch_size):
        assert batch_size == 3
        looks.append(len(rows))
        seen[len(looks)] = weights(drafter)
        return Acceptance(drafts=10, draft_tokens=30, accepted={2: 5, 3: 9}.get(len(looks), 1), by_position=[1, 0, 0])

    measure_with(measured, monkeypatch)
    rows = own_text(16)
    recipe = Recipe(max_steps=7, batch_size=3, learning_rate=5e-3, save_steps=2)
    run(MODEL, drafter, rows[:12], tmp_path, recipe, held_out=rows[12:], resume=False)
    assert looks == [3, *[4] * 4], "a batch before the first step, then after steps 2, 4, 6 and 7"
    assert "| mean acceptance length | 1.90 tokens" in (tmp_path / "README.md").read_text(), "the value of step 4"
    assert all(torch.equal(a, b) for a, b in zip(weights(drafter), seen[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[3], seen[5], strict=True))


def test_the_model_card_describes_the_run(tmp_path):
    rows = own_text(16)
    recipe = Recipe(
        max_steps=2, batch_size=4, accumulation=2, save_steps=9, objective=Objective(0.1, kl=0.9, decay=0.8)
    )
    about = {"sources": ["someone/chats:train_sft", "mine.jsonl"], "licence": "mit"}
    run(MODEL, fresh(), rows[:14], tmp_path, recipe, held_out=rows[14:], resume=False, **about)
    card = (tmp_path / "README.md").read_text()
    for words in (
        "license: mit", "| license of the data | mit |",
        "- someone/chats\n", "14 rows with 336 tokens to learn of someone/chats:train_sft, mine.jsonl",
        "cross-entropy 0.1, kl 0.9, decay 0.8", "2 of 4 x 2", "tokens per step (10 beams of 3 tokens)",
        "torch " + torch.__version__,
    ):  # fmt: skip
        assert words in card, words


def test_a_draft_vocabulary_and_a_share_of_the_windows(tmp_path):
    rows = own_text(8)
    vocabulary = most_frequent(rows, 5)
    drafter = RecurrentDrafter.for_target(MODEL, beam_length=3, draft_vocabulary=vocabulary)
    learnt = torch.tensor([token for row in rows for token in row.input_ids[1:]])
    covered = torch.isin(learnt, vocabulary).float().mean().item()
    run(MODEL, drafter, rows, tmp_path / "d", Recipe(max_steps=2, batch_size=4, window_share=0.25), resume=False)
    card = (tmp_path / "d" / "README.md").read_text()
    assert f"drafts 5 of 61 tokens, which are {covered:.2%} of those to learn |" in card
    assert "| steps | 2 of 4 x 1, with 25% of the windows, learning rate 0.001 |" in card
    for share in (0.0, 1.5):
        with pytest.raises(RedrafterError, match="share of windows"):
            Recipe(window_share=share)


@pytest.mark.parametrize("form", [{}, {"context_layers": (1,), "context_positions": 3}])
def test_packing_does_not_change_the_loss(tmp_path, form):
    """All rows are in one batch, so that only the packing differs."""
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


class FakeClock(TrainerCallback):
    """A clock that each step advances by one second; what is not training takes no time."""

    def __init__(self, monkeypatch):
        self.time, self.rates = 0.0, []
        monkeypatch.setattr(clock, "now", lambda: self.time)

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.time += 1
        self.rates.append(lr_scheduler.get_last_lr()[0])


def test_a_timed_run_ends_with_its_time(tmp_path, monkeypatch):
    fake, rows = FakeClock(monkeypatch), own_text(8)
    recipe = Recipe(seconds=20.0, batch_size=4, learning_rate=1.0, warmup=0.5)
    result = run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], callbacks=[fake], resume=False)
    assert (result.steps, result.epochs, result.tokens) == (20, 10.0, 10 * 6 * 25)
    assert result.seconds > 0
    assert fake.rates == pytest.approx([rate_factor(second / 20, 0.5) for second in range(20)])
    assert fake.rates[10] == 1.0, "half of the time is warm-up"
    assert fake.rates[-1] < 0.03
    assert "| steps | 20 of 4 x 1, in 20 s, learning rate 1 |" in (tmp_path / "README.md").read_text()
    assert result.acceptance is not None, "the last step is measured"


def test_a_resumed_timed_run_has_the_rest_of_its_time(tmp_path, monkeypatch):
    rows, recipe = own_text(8), Recipe(seconds=9.0, batch_size=4, save_steps=2)
    begun(rows, tmp_path, recipe, until=4, callbacks=[FakeClock(monkeypatch)])
    result = run(MODEL, fresh(), rows, tmp_path, recipe, callbacks=[FakeClock(monkeypatch)], resume=True)
    assert result.steps == 9


def test_a_resumed_timed_run_may_have_more_time_and_saves_its_last_step(tmp_path, monkeypatch):
    rows, recipe = own_text(8), Recipe(seconds=9.0, batch_size=4, save_steps=2)
    begun(rows, tmp_path, recipe, until=4, callbacks=[FakeClock(monkeypatch)])
    checkpoints, recipe = AtCheckpoint(), replace(recipe, seconds=15.0)
    result = run(MODEL, fresh(), rows, tmp_path, recipe, callbacks=[FakeClock(monkeypatch), checkpoints], resume=True)
    assert result.steps == 15
    assert checkpoints.saved == [6, 8, 10, 12, 14, 15]


def test_an_invalid_time_is_refused():
    with pytest.raises(RedrafterError, match="positive"):
        Recipe(seconds=0.0)
    with pytest.raises(RedrafterError, match="one of them"):
        Recipe(seconds=1.0, max_steps=2)


def measured_in(seconds: float, monkeypatch) -> tuple[FakeClock, list[int]]:
    """A fake clock on which each row takes a number of seconds to measure; and the numbers of rows measured."""
    fake, looks = FakeClock(monkeypatch), []

    def measured(module, rows, batch_size):
        fake.time += seconds * len(rows)
        looks.append(len(rows))
        return Acceptance(drafts=10, draft_tokens=30, accepted=5, by_position=[5, 0, 0])

    measure_with(measured, monkeypatch)
    return fake, looks


def test_measurements_count_in_the_time_of_a_run(tmp_path, monkeypatch):
    """30 held-out rows take 30 s of 100: a batch is measured before the first step, and all rows once, at the end."""
    fake, looks = measured_in(1.0, monkeypatch)
    rows, recipe = own_text(34), Recipe(seconds=100.0, batch_size=4)
    result = run(MODEL, fresh(), rows[:4], tmp_path, recipe, held_out=rows[4:], callbacks=[fake], resume=False)
    assert looks == [4, 30]
    assert result.steps == 100 - 4 - 30
    assert fake.time == 100.0
    assert result.acceptance.drafts == 10


def test_fewer_held_out_rows_are_measured_if_there_is_no_time_for_all(tmp_path, monkeypatch):
    fake, looks = measured_in(1.0, monkeypatch)
    rows, recipe = own_text(34), Recipe(seconds=100.0, batch_size=4, save_steps=None)
    options = {"held_out": rows[4:], "fewer_held_out": True, "callbacks": [fake], "resume": False}
    run(MODEL, fresh(), rows[:4], tmp_path, recipe, **options)
    first, *looks = looks
    assert first == 4
    assert set(looks) == {5}, "which take 5 s each"
    assert 2 <= len(looks) <= 6
    assert fake.time <= 101.0


def test_medusa_heads_are_measured_once_more_within_their_time(tmp_path, monkeypatch):
    fake, looks = measured_in(1.0, monkeypatch)
    monkeypatch.setattr(trainer, "fit", lambda *_: None)
    heads, rows = MedusaHeads.fresh(MODEL, heads=3), own_text(14)
    recipe = Recipe(seconds=100.0, batch_size=4, save_steps=None)
    run(MODEL, heads, rows[:4], tmp_path, recipe, held_out=rows[4:], callbacks=[fake], resume=False)
    assert looks == [4, 10, 10], "an earlier measurement would take a tenth of the time"
    assert 80 <= fake.time <= 100


@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
def test_checkpoints_are_written_by_time(tmp_path, save_seconds):
    checkpoints = AtCheckpoint()
    recipe = Recipe(max_steps=4, batch_size=4, save_seconds=save_seconds)
    run(MODEL, fresh(), own_text(4), tmp_path, recipe, callbacks=[checkpoints], resume=False)
    assert checkpoints.saved == ([1, 2, 3, 4] if save_seconds == 0 else [4])
    with pytest.raises(RedrafterError, match="negative"):
        Recipe(save_seconds=-1.0)


def test_a_signal_during_a_measurement_saves_the_last_step(tmp_path, monkeypatch):
    looks = []

    def measured(module, rows, batch_size):
        looks.append(len(rows))
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)
        return Acceptance(drafts=10, draft_tokens=30, accepted=5, by_position=[5, 0, 0])

    measure_with(measured, monkeypatch)
    rows, recipe = own_text(8), Recipe(max_steps=8, batch_size=4, save_steps=2)
    with pytest.raises(Interrupted) as raised, interruptible():
        run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], resume=False)
    assert raised.value.number == signal.SIGTERM
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    assert run(MODEL, fresh(), rows[:6], tmp_path, recipe, held_out=rows[6:], resume=True).steps == 8


def test_the_advice_says_whether_acceptance_was_still_rising_and_which_option_to_raise():
    def advised(*lengths, **recipe):
        measured = [Acceptance(100, 300, round(100 * (one - 1)), [0]) for one in lengths]
        return advice([Measurement(step, one) for step, one in enumerate(measured, start=1)], Recipe(**recipe))

    assert "1.50, 2.00, 2.10; still rising" in advised(1.5, 2.0, 2.1)
    assert "--epochs (now 2)" in advised(1.5, 2.0, 2.1)
    assert "--minutes (now 1.5)" in advised(1.5, 2.0, seconds=90.0)
    assert "--max-steps (now 7)" in advised(1.5, 2.0, max_steps=7)
    assert "still rising" in advised(1.27, 1.36, 1.44, 1.53, 1.55, 1.55), "the rate falls at the end"
    assert "no longer rising (best after step 2)" in advised(1.5, 2.5, 2.4)
    assert "no longer rising (best after step 4)" in advised(1.5, 2.0, 2.01, 2.02)
    assert "no longer rising (best after step 1)" in advised(2.5, 2.0, 2.2)
    assert "little was learned: raise --epochs (now 2)" in advised(1.02, 1.0)
    assert "measured once" in advised(2.0)
    assert "No rows were held out" in advised()


def test_a_loss_is_described_with_its_unit():
    assert Objective().describe_loss(8.0, 4) == "2.000 nats per drafted token (8.000 over 4 draft positions)"
    assert Objective(0.0, kl=1.0, decay=0.5).describe_loss(3.0, 2).startswith("2.000 nats per drafted token")
    assert "nats" not in Objective(total_variation=1.0).describe_loss(8.0, 4), "a distance has no unit"


def test_an_estimate_counts_the_steps_and_trains_nothing():
    drafter = fresh()
    before = weights(drafter)
    cost = estimate(MODEL, drafter, own_text(10), Recipe(epochs=3.0, batch_size=2, accumulation=2))
    assert cost.steps == 9
    assert cost.seconds > 0
    assert cost.weights == 4 * (sum(p.numel() for p in MODEL.parameters()) + 4 * sum(p.numel() for p in before))
    assert cost.peak is None
    assert all(torch.equal(a, b) for a, b in zip(before, weights(drafter), strict=True))
    assert all(p.grad is None for p in drafter.parameters())
    timed = estimate(MODEL, drafter, own_text(10), Recipe(seconds=100.0, batch_size=2))
    assert 100 <= timed.seconds < 100 + timed.seconds / timed.steps * 1.01


def test_continuations_have_no_distribution(tmp_path):
    rows = [Row([3, 4, 5], [True] * 3, [[4, 5], [5, 6], [6, 7]])]
    with pytest.raises(RedrafterError, match="cross-entropy only"):
        run(MODEL, fresh(), rows, tmp_path, Recipe(objective=Objective(0.5, kl=0.5)), resume=False)


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(RedrafterError, match="nothing"):
        run(MODEL, fresh(), own_text(2), tmp_path, Recipe(report_to=("nothing",)), resume=False)


def test_the_files_of_loggers_stay(tmp_path):
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
