"""The profiler times the steps of decoding, each from the same state.  No test depends on a duration."""

from __future__ import annotations

import itertools

import pytest
import torch

from conftest import greedy, tiny_model
from redrafter import RecurrentDrafter, RedrafterError, TwoModel
from redrafter.core.shapes import DraftShape
from redrafter.decoding.step import Decoder
from redrafter.engine import clock, runner
from redrafter.engine.clock import milliseconds
from redrafter.engine.request import request
from redrafter.evaluation import profiling
from redrafter.evaluation.profiling import StepProfiler
from redrafter.heads.eagle import EagleHead
from redrafter.proposers import method_of

MODEL = tiny_model()
CPU = torch.device("cpu")
SHAPE = DraftShape(beam_width=3, beam_length=2, node_budget=6)
TEXTS = [[5, 9, 12, 7], [8, 3, 30, 31]]


def profiler_of(model=MODEL, *, nodes: int = 16, **settings) -> StepProfiler:
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model, context_positions=2)
    return StepProfiler(request(model, drafter, TEXTS, **settings), method_of(drafter), nodes=nodes, repeats=2)


@pytest.fixture
def results(monkeypatch):
    """The results of every timed function.  Each takes as many milliseconds as functions have been timed."""
    seen = []

    def run(function, device, repeats):
        with torch.inference_mode():
            first, again = function(), function()
        seen.append((first, again))
        return float(len(seen))

    monkeypatch.setattr(runner, "milliseconds", run)
    return seen


def test_the_median_is_of_the_calls_after_the_warm_up(monkeypatch):
    took = [9.0] * clock.WARM_UP + [0.001, 0.004, 0.002]  # seconds of each call
    ticks = itertools.chain.from_iterable((0.0, one) for one in took)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert milliseconds(lambda: calls.append(torch.is_inference_mode_enabled()), CPU, 3) == pytest.approx(2.0)
    assert calls == [True] * len(took)


def test_an_error_about_full_memory_says_what_to_lower(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    profiler, remedy = (
        profiler_of(),
        r"memory of cpu is full: measure fewer rows \(now 2\), a shorter context or smaller drafts",
    )
    monkeypatch.setattr(runner, "milliseconds", full)
    with pytest.raises(RedrafterError, match=remedy):
        profiler.step_ms(SHAPE)
    monkeypatch.setattr(Decoder, "read", full)
    with pytest.raises(RedrafterError, match=remedy):
        profiler_of().runner(SHAPE)


def test_the_ceiling_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(profiling, "milliseconds", lambda function, device, repeats: 50.0)
    assert profiling.bandwidth(CPU, 1) == 2 * 2**28 / 0.05


def test_what_a_step_must_read():
    untied = profiler_of()
    looked_up = MODEL.get_input_embeddings().weight
    total = sum(one.numel() for one in MODEL.parameters())
    assert untied.weight_bytes == 4 * (total - looked_up.numel())
    assert untied.cache_bytes == 4 * 2 * 2 * (2 * 4) * (8 + 8)  # bytes, layers, heads, rows x tokens, keys and values
    tied = tiny_model(tie_word_embeddings=True)
    assert profiler_of(tied).weight_bytes == 4 * sum(one.numel() for one in tied.parameters())


def test_the_steps_are_decodings_own(results):
    own = profiler_of()
    expected = [greedy(MODEL, text, 4) for text in TEXTS]
    for shape in (None, SHAPE, SHAPE.model_copy(update={"node_budget": None})):
        own.step_ms(shape)
        for emitted in results[-1]:  # the second call begins where the first did
            for row, following in enumerate(expected):
                accepted, drafted, *_ = emitted.report[row].tolist()
                assert emitted.following[row, : accepted + 1].tolist() == following[: 1 + accepted]
                assert (drafted > 0) == (shape is not None)


def test_the_parts_are_of_the_sizes_asked_for(results):
    own = profiler_of(do_sample=True, temperature=0.7, seed=3)
    own.verify_ms(16)
    hidden, logits = results[-1][0]
    assert hidden.shape[:2] == logits.shape[:2] == (2, 16)
    assert own.runner(None).state.cache.window.visible == 4 + 16
    own.draft_ms(SHAPE)
    tree = results[-1][0]
    assert tree.size == 6
    assert tree.tokens[:, 0].tolist() == [text[-1] for text in TEXTS]
    drafted = own.tree(SHAPE)
    assert torch.equal(drafted.tokens, tree.tokens)
    own.rest_ms(SHAPE)
    assert len(results) == 3


def test_the_rest_keeps_the_path_of_the_trees_that_are_drafted(results, monkeypatch):
    own = profiler_of()
    kept = []
    monkeypatch.setattr(
        own.runner(SHAPE).state.cache, "keep", lambda path, length: kept.append((path.shape, length.tolist()))
    )
    own.rest_ms(SHAPE)
    assert kept == [((2, 3), [3, 3])] * 2


@pytest.mark.parametrize("length", [2, 6])
def test_a_shape_of_another_length_is_drafted_as_if_it_were_the_calls_own(length):
    torch.manual_seed(0)
    head = EagleHead.fresh(MODEL, beam_length=4)  # a draft reads as many positions as a step may write
    texts = [[*range(5, 16)], [*range(40, 29, -1)]]
    sizes = {"beam_width": 3, "beam_length": length}
    shape = DraftShape(**sizes)
    own, other = (
        StepProfiler(request(MODEL, head, texts, **overrides), method_of(head), nodes=shape.max_nodes, repeats=1)
        for overrides in (sizes, {"beam_width": 2})
    )
    assert torch.equal(other.tree(shape).tokens, own.tree(shape).tokens)
    assert other.step_ms(shape) > 0
    assert torch.equal(other.tree(shape).tokens, own.tree(shape).tokens), "every measurement begins from the same state"


def test_a_sampled_draft_reckons_with_the_noise(results):
    drafts = []
    for seed in (1, 2):
        profiler_of(do_sample=True, seed=[seed, seed]).draft_ms(SHAPE)
        drafts.append(results[-1][0].tokens.tolist())
    assert drafts[0] != drafts[1]


def test_measurements_come_in_order(results):
    found = list(profiling.measurements(profiler_of(), SHAPE, nodes=[1, 8], widths=[1, 3]))
    assert [(one.name, one.size, one.milliseconds) for one in found] == [
        ("autoregressive step", None, 1.0),
        ("verify, nodes", 1, 2.0),
        ("verify, nodes", 8, 3.0),
        ("draft, beams", 1, 4.0),
        ("draft, beams", 3, 5.0),
        ("rest", None, 6.0),
        ("drafted step", None, 7.0),
    ]
    assert results[3][0].depth.max() == 2
    assert results[3][0].size == 3


@pytest.mark.parametrize("kind", ["two models", "eagle"])
def test_a_memory_is_of_the_size_that_each_shape_needs(results, kind):
    """Whatever the call's own shape: wider beams, fewer nodes than beams; steps and trees are decoding's own."""
    torch.manual_seed(0)
    drafter = TwoModel(MODEL) if kind == "two models" else EagleHead.fresh(MODEL)
    own_request = request(MODEL, drafter, TEXTS, beam_width=8, beam_length=3, node_budget=4)
    shapes = [
        DraftShape(beam_width=w, beam_length=3, node_budget=n)
        for w, n in ((1, None), (2, None), (4, None), (8, 4), (2, 4))
    ]
    nodes = max(shape.max_nodes for shape in shapes)
    own = StepProfiler(own_request, method_of(drafter), nodes=nodes, repeats=2)
    expected = [greedy(MODEL, text, 5) for text in TEXTS]
    memories = set()
    for shape in shapes:
        own.step_ms(shape)
        for emitted in results[-1]:
            for row, following in enumerate(expected):
                accepted = int(emitted.report[row, 0])
                assert emitted.following[row, : accepted + 1].tolist() == following[: 1 + accepted]
                assert accepted == 3 or kind == "eagle" or shape.beam_width > 1, "a model knows what it will say"
        own.draft_ms(shape)
        assert own.tree(shape).tokens.equal(results[-1][0].trimmed().tokens)
        state = own.runner(shape).state
        memories.add(state.memory.slots - state.cache.slots)
    assert memories == {0, 1 + 8 * 2 - 4, 1 + 2 * 2 - 4}


@pytest.mark.gpu
def test_on_a_gpu_every_measurement_can_be_replayed():
    model = tiny_model().cuda()
    found = list(profiling.measurements(profiler_of(model, do_sample=True, seed=3), SHAPE, nodes=[1, 8], widths=[1, 3]))
    assert all(one.milliseconds > 0 for one in found)
    assert profiling.bandwidth(model.device, 3) > 1e10
