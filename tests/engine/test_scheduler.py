"""Rows enter, are read, are decoded with settings of their own, fail, end and move, without an effect on other rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import greedy, launch_ahead, read_in_parts, tiny_model
from redrafter import EagleHead, PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate, stream
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import DraftTree, ancestors_of
from redrafter.decoding.step import Decoder
from redrafter.engine import scheduler as scheduling
from redrafter.engine.request import Task, tasks
from redrafter.engine.results import Event
from redrafter.engine.runner import Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.proposers import Proposer, method_of
from redrafter.targets.target import Target

MODEL = tiny_model()
TARGET = Target(MODEL)
SHAPE = DraftShape(beam_width=2, beam_length=3)
METHODS = ["none", "recurrent", "eagle", "two models"]


def decoder(method: str, shape: DraftShape = SHAPE, target: Target = TARGET) -> Decoder:
    torch.manual_seed(0)
    drafter = {
        "none": None,
        "recurrent": RecurrentDrafter.for_target(MODEL, context_positions=3),
        "eagle": EagleHead.fresh(MODEL),
        "two models": TwoModel(target.model),
        "prompt lookup": PromptLookup(),
    }[method]
    if method == "prompt lookup":
        shape = DraftShape(beam_width=1, beam_length=3)
    return Decoder(target, None if drafter is None else method_of(drafter).proposer(target, shape))


def scheduler(method: str = "none", *, batch: int = 3, target: Target = TARGET) -> Scheduler:
    return Scheduler(Runner({1: decoder(method, target=target)}, batch=batch, slots=64))


def task(number: int, prompt: list[int], **told) -> Task:
    _, (one,) = tasks(TARGET, [prompt], **({"max_new_tokens": 12} | told))
    one.row = replace(one.row, number=number)
    return one


def results(run: Scheduler, *added: Task) -> dict[int, list[Event | Exception]]:
    """What each row brings until no row is left."""
    for one in added:
        run.add(one)
    found: dict[int, list[Event | Exception]] = {}
    while not run.idle:
        for one, outcome in run.step():
            found.setdefault(one.row.number, []).append(outcome)
    return found


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def alone(prompt: list[int], **told) -> list[int]:
    """What a call with this row alone writes without a drafter."""
    told.pop("drafter", None)
    return generate(MODEL, None, [prompt], **({"max_new_tokens": 12} | told)).new_tokens[0]


class Six(transformers.StoppingCriteria):
    """Ends a row whose text has six tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 6


SAMPLED = {"do_sample": True, "seed": 3}
MIXED = [
    ([5, 9, 12], {}),
    ([7], SAMPLED),
    ([30, 31, 32, 33, 34], SAMPLED | {"temperature": 0.6, "top_k": 5}),
    ([8, 8], SAMPLED | {"top_p": 0.8, "drafter": False}),
    ([5, 9, 12], SAMPLED | {"min_p": 0.2, "temperature": 1.4}),
    ([11, 9, 11], {"repetition_penalty": 1.7}),
    ([40, 41, 42], {"presence_penalty": 2.0, "frequency_penalty": 0.5}),
    ([5, 9, 12], {"logit_bias": {9: -100.0, 20: 3.0}}),
    ([3] * 9, {"no_repeat_ngram_size": 1}),
    ([7], SAMPLED | {"typical_p": 0.5, "top_k": 9}),
    ([12, 7], {"logprobs": 2, "max_new_tokens": 5}),
    ([7, 9], {"drafter": False, "stopping_criteria": [Six()]}),
    ([6, 9], SAMPLED | {"logit_bias": {int(token): 4.0 for token in range(20, 30)}, "no_repeat_ngram_size": 2}),
]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("method", "batch"),
    [("recurrent", 1), *itertools.product([*METHODS, "prompt lookup"], [4, len(MIXED)])],
)
def test_rows_with_different_settings_are_decoded_as_if_alone(method, batch, ahead, monkeypatch):
    if ahead:
        launch_ahead(monkeypatch)
    found = results(scheduler(method, batch=batch), *(task(i, *one[:1], **one[1]) for i, one in enumerate(MIXED)))
    for number, (prompt, told) in enumerate(MIXED):
        assert tokens(found[number]) == alone(prompt, **told), told
        drafts = method != "none" and told.get("drafter", True)
        assert all((event.drafted > 0) <= drafts for event in found[number])
        assert not drafts or method == "prompt lookup" or all(event.drafted > 0 for event in found[number])
    assert [event.finish_reason for event in found[11]][-1] == "stop"
    assert all((event.logprobs is not None) == (number == 10) for number, own in found.items() for event in own)


row_settings = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"repetition_penalty": st.sampled_from([0.8, 1.5]), "drafter": st.booleans()}),
    st.fixed_dictionaries({"presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-1, 1)}),
    st.fixed_dictionaries({"logit_bias": st.dictionaries(st.integers(3, 60), st.floats(-9, 9), max_size=5)}),
    st.fixed_dictionaries(
        {"do_sample": st.just(True), "seed": st.integers(0, 2**40)},
        optional={
            "temperature": st.floats(0.3, 2),
            "top_k": st.integers(1, 61),
            "top_p": st.floats(0.1, 1),
            "min_p": st.floats(0, 0.5),
            "repetition_penalty": st.floats(0.7, 1.5),
            "no_repeat_ngram_size": st.just(2),
            "typical_p": st.just(0.6),
            "drafter": st.booleans(),
        },
    ),
)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.lists(st.integers(3, 60), min_size=1, max_size=9), row_settings), min_size=1, max_size=6),
    st.integers(1, 6), st.sampled_from(["recurrent", "two models"]),
)  # fmt: skip
def test_any_rows_are_decoded_as_if_alone(rows, batch, method):
    found = results(scheduler(method, batch=batch), *(task(i, *one[:1], **one[1]) for i, one in enumerate(rows)))
    assert [tokens(found[i]) for i in range(len(rows))] == [alone(prompt, **told) for prompt, told in rows]


def test_slots_are_reused_and_counted():
    run = scheduler("recurrent", batch=2)
    for number in range(5):
        run.add(task(number, [5, 9, 12], max_new_tokens=3 + number))
    running_rows, waiting = [], []
    while not run.idle:
        run.step()
        running_rows.append(run.running)
        waiting.append(len(run.waiting))
        assert run.running == 0 or 2 * run.running <= run.used_positions <= 12 * run.running
    assert max(running_rows) == 2
    assert waiting == sorted(waiting, reverse=True)
    assert (run.running, run.used_positions) == (0, 0)
    assert tokens(results(run, task(9, [7]))[9]) == greedy(MODEL, [7], 12)


def test_steps_are_numbered():
    """Events of one step have one number, whichever row enters or ends."""
    found = results(scheduler("two models", batch=2), *(task(i, [5 + i], max_new_tokens=4 + 3 * i) for i in range(4)))
    for own in found.values():
        numbers = [event.step for event in own]
        assert numbers == [*range(numbers[0], numbers[0] + len(own))]
    numbers = [event.step for own in found.values() for event in own]
    assert min(numbers) == 1
    assert all(numbers.count(number) <= 2 for number in numbers)
    assert sum(numbers.count(number) == 2 for number in set(numbers)) > 1


class Broken(Exception):
    """An error of a caller's own code."""


class Breaks(transformers.LogitsProcessor):
    """Raises in a text of `size` tokens."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.size:
            raise Broken("This is the caller's own error.")
        return scores


class BreaksToo(transformers.StoppingCriteria):
    """Raises in a text of `size` tokens."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.size:
            raise Broken("This is the caller's own error.")
        return False


BREAKING = {"logits_processor": [Breaks(6)]}, {"stopping_criteria": [BreaksToo(6)]}


@pytest.mark.parametrize("told", BREAKING, ids=["processor", "criterion"])
@pytest.mark.parametrize("method", [None, TwoModel(MODEL)], ids=["none", "two models"])
def test_an_error_of_the_callers_code_is_raised_as_it_is(told, method):
    with pytest.raises(Broken, match="caller's own"):
        generate(MODEL, method, [[5, 9, 12]], max_new_tokens=12, **told)
    events = stream(MODEL, method, [[5, 9, 12]], max_new_tokens=12, **told)
    with pytest.raises(Broken, match="caller's own"):
        list(events)
    assert generate(MODEL, method, [[5, 9, 12]], max_new_tokens=12).new_tokens == [greedy(MODEL, [5, 9, 12], 12)]


@pytest.mark.parametrize("told", [*BREAKING, {"bad_words_ids": [[token] for token in range(61)]}])
@pytest.mark.parametrize("method", ["none", "two models"])
def test_a_row_that_fails_ends_alone_and_frees_its_slot(told, method):
    rows = [task(0, [7]), task(1, [5, 9, 12], **told), task(2, [8, 8]), task(3, [11])]
    found = results(scheduler(method, batch=3), *rows)
    assert isinstance(found[1][-1], Broken | RedrafterError)
    for number, prompt in ((0, [7]), (2, [8, 8]), (3, [11])):
        assert tokens(found[number]) == greedy(MODEL, prompt, 12)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_cancelled_wherever_they_are(ahead, monkeypatch):
    if ahead:
        launch_ahead(monkeypatch)
    read_in_parts(monkeypatch, 4, 4)
    run = scheduler("two models", batch=2)
    running_row, long, waiting, other = rows = [
        task(0, [5, 9, 12], max_new_tokens=40), task(1, [*range(3, 30)]), task(2, [7]), task(3, [8, 8]),
    ]  # fmt: skip
    for one in rows[:1]:
        run.add(one)
    assert [one is running_row for one, _ in run.step()] == [True]
    for one in rows[1:]:
        run.add(one)
    run.step()
    assert run.running == 2
    assert [run.cancel(one) for one in (waiting, long, running_row)] == [True] * 3
    assert not any(run.cancel(one) for one in (waiting, long, running_row))
    rest = results(run)
    assert rest.keys() == {3}
    assert tokens(rest[3]) == greedy(MODEL, [8, 8], 12)
    assert not run.cancel(other)


def test_after_an_error_of_a_step_rows_are_abandoned_and_others_enter(monkeypatch):
    run = scheduler("two models", batch=2)
    rows = [task(0, [5, 9, 12]), task(1, [7]), task(2, [8, 8])]
    for one in rows:
        run.add(one)
    run.step()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", full)
        with pytest.raises(torch.OutOfMemoryError):
            run.step()
    assert sorted(run.abandon(), key=lambda one: one.row.number) == rows[:2]
    assert tokens(results(run)[2]) == greedy(MODEL, [8, 8], 12)


@pytest.mark.parametrize(
    ("method", "ahead"),
    [("none", False), ("recurrent", False), ("recurrent", True), ("eagle", True), ("two models", False)],
)
def test_rows_move_together_when_others_end(method, ahead, monkeypatch):
    """Later steps then compute fewer slots, and no text changes: a row takes all that belongs to it along."""
    monkeypatch.setattr(scheduling, "SHRINK_AFTER", 2)
    if ahead:
        launch_ahead(monkeypatch)
    rows, sizes, accepted = [], [], []
    told = [one for _, one in MIXED if "stopping_criteria" not in one and "logprobs" not in one][:8]
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda own, state, *more: sizes.append(state.batch) or step(own, state, *more))
    for number, own in enumerate([{}] * 6 + told[-6:]):
        short = number < 6
        rows.append(([5 + number, 9], own | {"max_new_tokens": 3 if short else 24}))
    for batch in (12, 1):
        run = scheduler(method, batch=batch)
        found = results(run, *(task(i, prompt, **own) for i, (prompt, own) in enumerate(rows)))
        assert [tokens(found[i]) for i in range(12)] == [alone(prompt, **own) for prompt, own in rows]
        accepted.append([[event.accepted for event in found[i]] for i in range(12)])
    assert accepted[0] == accepted[1], "and it drafts the same"
    assert max(sizes) == 12
    assert 6 in sizes, "the second half moved to the slots of the first"


def fake_kernels(monkeypatch) -> None:
    """Kernels for tree attention seem to run, and prompts are read beside steps; PyTorch references replace both."""
    for module in ("target", "probe"):
        monkeypatch.setattr(f"redrafter.targets.{module}.has_kernels", lambda *_: True)
    monkeypatch.setattr(Runner, "reads_while_decoding", True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.mark.parametrize("part", [3, 16, 512])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_are_read_beside_steps_give_the_same_text(method, part, monkeypatch):
    """In one forward pass with the trees of rows that are being decoded, each part as rows of as many tokens."""
    prompts = [[5, 9, 12], [*range(3, 40)], [7], [*range(20, 45)], [8, 8], [*range(50, 20, -1)]]
    rows = [task(i, prompt, max_new_tokens=6 + 3 * i) for i, prompt in enumerate(prompts)]
    plain = results(scheduler(method), *rows)
    fake_kernels(monkeypatch)
    monkeypatch.setattr(scheduling, "MAX_LATER_READ", part)
    beside = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: beside.append(args[3]) or step(*args))
    found = results(scheduler(method, target=Target(tiny_model())), *rows)
    for number, prompt in enumerate(prompts):
        assert tokens(found[number]) == tokens(plain[number]) == greedy(MODEL, prompt, 6 + 3 * number)
        assert [event.accepted for event in found[number]] == [event.accepted for event in plain[number]]
    assert sum(one is not None for one in beside) >= 2


@pytest.mark.parametrize("method", ["recurrent", "eagle", "two models"])
def test_the_number_of_rows_chooses_the_decoder(method):
    """Here: no drafts for three rows and more, and longer ones for two."""
    longer = SHAPE if method != "recurrent" else DraftShape(beam_width=3, beam_length=4)
    decoders = {1: decoder(method), 2: decoder(method, longer), 3: decoder("none")}
    run = Scheduler(Runner(decoders, batch=4, slots=64))
    prompts = [[5, 9, 12], [7], [8, 8], [11]]
    found = results(run, *(task(i, prompt, max_new_tokens=3 + 6 * i) for i, prompt in enumerate(prompts)))
    for number, prompt in enumerate(prompts):
        assert tokens(found[number]) == greedy(MODEL, prompt, 3 + 6 * number)
    drafted = [event.drafted for event in found[3]]
    assert drafted[:3] == [0, 0, 0]
    assert drafted[-1] > 0


@pytest.mark.parametrize("sampling", [{}, SAMPLED | {"temperature": 0.5, "top_k": 3}])
@pytest.mark.parametrize("method", [None, TwoModel(MODEL)], ids=["none", "two models"])
def test_log_probabilities_are_the_models_own(method, sampling):
    """Before penalties, temperature and truncation; for drafted tokens too."""
    prompts = [[5, 9, 12], [7]]
    told = {"max_new_tokens": 12, "repetition_penalty": 1.4, **sampling}
    finished = []
    plain = generate(MODEL, method, prompts, **told)
    out = generate(MODEL, method, prompts, logprobs=3, on_row=finished.append, **told)
    assert out.new_tokens == plain.new_tokens
    for row in finished:
        text = prompts[row.row] + row.new_tokens
        with torch.no_grad():
            own = MODEL(torch.tensor([text])).logits[0, len(prompts[row.row]) - 1 : -1].log_softmax(-1)
        assert [one.token for one in row.logprobs] == row.new_tokens
        for one, expected in zip(row.logprobs, own, strict=True):
            assert one.logprob == pytest.approx(float(expected[one.token]), abs=1e-4)
            best = expected.topk(3)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    for event in stream(MODEL, method, prompts, logprobs=0, **told):
        assert [(one.token, one.top) for one in event.logprobs] == [(token, []) for token in event.tokens]
    assert all(event.logprobs is None for event in stream(MODEL, method, prompts, **told))
    most = generate(MODEL, method, prompts[:1], logprobs=61, on_row=finished.append, **told)
    assert len(finished[-1].logprobs[0].top) == 61
    assert most.new_tokens == plain.new_tokens[:1] or sampling


class InTheLastNodes(Proposer):
    """Proposes what the target writes, in the last nodes of a large tree; the nodes before are padding."""

    modules, positions = (), 1

    def __init__(self, texts: list[list[int]], size: int, length: int):
        self.texts, self.size, self.length = texts, size, length

    def propose(self, memory, rows, context, noise):
        tokens = torch.zeros(len(context), self.size, dtype=torch.long)
        tokens[:, 0] = rows.root
        for row, (number, length) in enumerate(zip(rows.row.tolist(), rows.length.tolist(), strict=True)):
            following = torch.tensor(self.texts[number][length + 1 :][: self.length])
            tokens[row, self.size - self.length :][: len(following)] = following
        valid, path = torch.zeros_like(tokens).bool(), torch.arange(self.size - self.length, self.size)
        valid[:, 0] = valid[:, path] = True
        depth, parents = torch.zeros_like(tokens), torch.zeros_like(tokens)
        depth[:, path], parents[:, path[1:]] = 1 + torch.arange(self.length), path[:-1]
        return DraftTree(tokens, parents, depth, valid, ancestors_of(parents, max_depth=self.length))


@pytest.mark.parametrize("size", [20, 140, 200, 256])
def test_large_trees_beside_prompts(size, monkeypatch):
    """What a pass computes only to have a size that is captured reaches no node of any tree."""
    fake_kernels(monkeypatch)
    prompts = [[5, 9, 12], *([7 + i, 8, 9, 11, 13 + i] for i in range(3))]
    counts = [40, 3, 3, 3]
    texts = [prompt + greedy(MODEL, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    first, *others = (task(i, prompts[i], max_new_tokens=counts[i]) for i in range(4))
    made = Decoder(Target(tiny_model()), InTheLastNodes(texts, size, 3))
    run = Scheduler(Runner({1: made}, batch=4, slots=43))
    run.add(first)
    ((_, event),) = run.step()
    found = results(run, *others)  # whose prompts are read beside steps of the first
    found[0].insert(0, event)
    for number, prompt in enumerate(prompts):
        assert prompt + tokens(found[number]) == texts[number]
    assert [event.accepted for event in found[0]] == [3] * 10
