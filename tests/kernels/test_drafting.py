"""The kernels of drafting against their plain counterparts: the best of a row, beams, trees, activations, proposals.

They run on a GPU (`-m gpu`) and, started once more by test_interpreted.py, under Triton's interpreter.
"""

from __future__ import annotations

import interpreting
import pytest
import torch
from interpreting import INTERPRETED, on_cpu, on_kernels

from conftest import rooted, tiny_model
from redrafter import RecurrentDrafter, kernels
from redrafter.core.noise import gumbel
from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import most_probable, plain_most_probable, plain_prefix_tree, prefix_tree
from redrafter.kernels import has_kernels, kernels_enabled
from redrafter.kernels.activation import silu_add
from redrafter.kernels.topk import TopK, plain_topk, topk
from redrafter.proposers.beam_search import extend_beams, plain_extend_beams
from redrafter.proposers.recurrent import RecurrentProposer, beam_search
from redrafter.targets.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
FIELDS = ("tokens", "parents", "depth", "valid", "ancestors")


@pytest.fixture(autouse=True)
def kernels_alone(request, monkeypatch):
    """Where kernels are tested the plain ways must not stand in for them; tests call those by their own names."""
    if "device" in request.fixturenames:
        for name in ("redrafter.proposers.beam_search.plain_extend_beams", "redrafter.kernels.topk.plain_topk"):
            monkeypatch.setattr(name, None)
        for name in ("redrafter.core.tree.plain_prefix_tree", "redrafter.core.tree.plain_most_probable"):
            monkeypatch.setattr(name, None)


def distinct(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Scores no two of which are equal in a row, of both signs."""
    order = torch.stack([torch.randperm(columns) for _ in range(rows)]) - columns // 2
    if dtype == torch.bfloat16 and columns > 256:  # too few numbers: distinct ones on top, ties below
        order = torch.where(order > columns // 2 - 100, order - columns // 2 + 100, -1 - order.abs() % 50)
    return (order / 8).to(device, dtype)


SHAPES = [(1, 1, 1), (2, 2, 1), (3, 7, 7), (2, 64, 64), (2, 100, 10), (1, 1024, 16), (3, 1025, 50), (2, 5000, 33)]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 40_000, 64)], ids=str)
def test_the_best_of_a_row(shape, dtype, device):
    torch.manual_seed(0)
    rows, columns, width = shape
    scores = distinct(rows, columns, dtype, device)
    if dtype == torch.float16 and columns > 2048:
        scores = scores.clamp(min=0).where(scores > columns / 16 - 100, -1)
    wide = torch.cat((scores, scores + 1), dim=1)[:, :columns]  # rows that do not follow one another
    for given in (scores, wide):
        found, wanted = topk(given, width), plain_topk(scores, width)
        assert found.values.equal(wanted.values)
        assert scores.gather(1, found.ids).equal(wanted.values.to(dtype))
        assert all(len(set(row)) == width for row in found.ids.tolist())
        torch.testing.assert_close(found.logsumexp, wanted.logsumexp)
    if dtype == torch.float32:
        assert found.ids.equal(wanted.ids)


@on_kernels
def test_by_the_sort_of_triton(device, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr("triton.language.topk", interpreting.sort_of_triton)
    scores = torch.randn(1, 70).to(device)
    assert all(map(torch.equal, topk(scores, 3)[:2], plain_topk(scores, 3)[:2]))


@on_kernels
def test_of_equal_scores_the_smaller_id_comes_first(device):
    scores = torch.zeros(2, 3000, device=device)
    scores[0, ::2] = -0.0
    scores[1, [2999, 1500, 20]] = 1
    assert topk(scores, 5).ids.tolist() == [[0, 1, 2, 3, 4], [20, 1500, 2999, 0, 1]]


@on_kernels
def test_scores_that_are_no_numbers_give_columns(device):
    scores = torch.randn(6, 1500).to(device)
    scores[0] = torch.nan
    scores[1, 7] = torch.nan
    scores[2] = -torch.inf
    scores[3, :1490] = -torch.inf
    scores[4, 1111] = torch.inf
    scores[5] -= 1e6
    found, wanted = topk(scores, 20), plain_topk(scores, 20)
    assert ((found.ids >= 0) & (found.ids < 1500)).all()
    assert all(len(set(row)) == 20 for row in found.ids.tolist())
    assert found.values[3:].equal(wanted.values[3:])
    assert found.ids[4, 0] == 1111
    torch.testing.assert_close(found.logsumexp, wanted.logsumexp, equal_nan=True)


@on_kernels
def test_any_chunk_gives_the_same(device):
    from redrafter.kernels.triton import drafting

    scores = torch.randn(2, 3001).to(device)
    for chunk in (64, 512, 4096):
        assert all(map(torch.equal, drafting.topk(scores, 20, chunk)[:2], plain_topk(scores, 20)[:2]))


WIDE = 30 if INTERPRETED else 50  # its square is the number of entries; both take several blocks


@on_kernels
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 0), (2, 1, 10, 0), (3, 1, 64, 0), (2, 10, 10, 3), (1, WIDE, WIDE, 1)], ids=str
)
def test_beams_are_extended(shape, named, device):
    torch.manual_seed(0)
    batch, beams, width, position = shape
    best = TopK(*(part.to(device) for part in plain_topk(torch.randn(batch * beams, 90), width)))
    names = torch.randperm(500)[:90].to(device) if named else None
    begun = torch.randint(0, 500, (batch, beams, position), device=device)
    scores, above = -torch.rand(batch, beams).to(device), torch.randint(0, 99, (batch, beams), device=device)
    found, wanted = (way(best, names, begun, scores, above) for way in (extend_beams, plain_extend_beams))
    assert found.level.tokens.equal(wanted.level.tokens)
    assert found.level.parents.equal(wanted.level.parents)
    torch.testing.assert_close(found.level.scores, wanted.level.scores)
    for name in ("beams", "entries", "parents"):
        assert getattr(found, name).equal(getattr(wanted, name)), name
    torch.testing.assert_close(found.scores, wanted.scores)


@on_kernels
def test_beams_of_no_probability_are_still_beams(device):
    """Where all is NaN or impossible, entries and tokens lie where they can be looked up."""
    scores = torch.full((4, 30), -torch.inf)
    scores[1] = torch.nan
    scores[2, 5] = 1
    best = topk(scores.to(device), 4)
    begun = torch.arange(4, device=device).view(2, 2, 1)
    above = torch.tensor([[0, 3], [1, 2]], device=device)
    step = extend_beams(best, None, begun, torch.tensor([[-1.0, -torch.inf], [-2.0, -3.0]], device=device), above)
    for found, end in ((step.beams, 30), (step.entries, 8), (step.parents, 2), (step.level.tokens, 30)):
        assert ((found >= 0) & (found < end)).all()
    assert step.scores[1].tolist() == [-2.0, -torch.inf, -torch.inf, -torch.inf]
    assert step.beams[1, 0].tolist() == [2, 5]


@on_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 10, 4), (2, 3, 7), (1, 50, 4), (1, 64, 3), (2, 1, 16)], ids=str)
def test_prefix_trees(shape, device):
    torch.manual_seed(0)
    for kinds in (2, 4, 60_000):
        beams, root = torch.randint(0, kinds, shape).to(device), torch.arange(5, 5 + shape[0]).to(device)
        found, wanted = prefix_tree(root, beams), plain_prefix_tree(root, beams)
        for name in FIELDS:
            assert getattr(found, name).equal(getattr(wanted, name)), name


@on_kernels
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 9), (2, 4, 4, 20), (1, 10, 4, 64), (2, 3, 2, 500), (1, 50, 2, 130)], ids=str
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_most_probable(shape, ties, device):
    torch.manual_seed(0)
    batch, width, length, size = shape
    levels, above = [], torch.zeros(batch, 1)
    for _ in range(length):
        parents = torch.stack([torch.randperm(above.shape[1])[:width] for _ in range(batch)])
        parents = parents.repeat_interleave(width, dim=1)
        gain = -torch.rand(parents.shape)
        gain = gain.round() if ties else gain
        gain[torch.rand(parents.shape) < 0.2] = -torch.inf
        above = above.gather(1, parents) + gain
        levels.append(tuple(part.to(device) for part in (torch.randint(0, 99, parents.shape), parents, above)))
    root = torch.arange(5, 5 + batch).to(device)
    found, wanted = (way(root, levels, size=size) for way in (most_probable, plain_most_probable))
    assert found.size > 1
    for name in FIELDS:
        assert getattr(found, name).equal(getattr(wanted, name)), name
    assert found.log_probs[found.valid].equal(wanted.log_probs[found.valid])


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_activations(dtype, device):
    x, more, onto = torch.randn(3, 2, 7, 301).mul(9).to(device, dtype).unbind()
    cases = [
        {},
        {"more": more},
        {"residual": onto},
        {"more": more, "residual": onto.transpose(0, 1).contiguous().transpose(0, 1)},
    ]
    for given in cases:
        wanted = silu_add(x.double(), **{name: one.double() for name, one in given.items()})
        with torch.no_grad():
            found = silu_add(x, **given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_activations_of_very_many_rows():
    x = torch.randn(70_000, 3, device="cuda")
    torch.testing.assert_close(silu_add(x), torch.nn.functional.silu(x))


FORMS = [{}, {"exit_dim": 20, "num_draft_layers": 3}, {"rnn": False}, {"gated": True, "exit_dim": 32}]


@on_kernels
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("budget", "noisy", "batch"), [(None, False, 1), (None, True, 2), (23, False, 2), (23, True, 1)]
)  # every two together
@torch.no_grad()
def test_proposals(form, budget, noisy, batch, device, monkeypatch):
    torch.manual_seed(0)
    model = tiny_model().to(device)
    with kernels_enabled(False):  # the target's kernels are not tested here
        drafter = RecurrentDrafter.for_target(model, draft_vocabulary=torch.arange(3, 50), **form)
        for parameter in drafter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        proposer = RecurrentProposer(
            drafter, Target(model), DraftShape(beam_width=6, beam_length=4, node_budget=budget)
        )
    context, root = torch.randn(batch, 32).to(device), torch.tensor([5, 9], device=device)[:batch]
    noise = gumbel(torch.tensor([3, 5]), torch.arange(5).expand(2, -1), 61)[:batch].to(device) if noisy else None
    arguments = (None, rooted(root), context[:, None], SamplingNoise(noise))
    prepared = proposer.prepare()
    assert (prepared.fused is None) == ("rnn" in form or "gated" in form)
    found = prepared.propose(*arguments)
    monkeypatch.undo()
    with kernels_enabled(False):
        wanted = proposer.propose(*arguments)
    for name in FIELDS:
        assert getattr(found, name).equal(getattr(wanted, name)), name


@on_kernels
def test_pytorch_replaces_triton_if_it_fails(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease say where it is.")

    place = torch.device(device)
    assert has_kernels(place)
    monkeypatch.setattr("redrafter.kernels.triton.drafting.silu_add", broken)
    kernels._failure.cache_clear()
    with pytest.warns(UserWarning, match=r"uses PyTorch instead: Failed to find C compiler\.$"):
        assert not has_kernels(place)
    assert not has_kernels(place, torch.bfloat16)
    kernels._failure.cache_clear()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("redrafter.kernels.triton.drafting.silu_add", full)
        with pytest.raises(torch.OutOfMemoryError):
            has_kernels(place)
    monkeypatch.undo()
    assert has_kernels(place), "full memory said nothing of the kernels"


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_holds_a_search():
    torch.manual_seed(0)
    model = tiny_model().cuda()
    drafter = RecurrentDrafter.for_target(model)
    context, root = torch.randn(2, 32, device="cuda"), torch.tensor([5, 9], device="cuda")

    def search():
        found = beam_search(
            drafter, model.get_input_embeddings(), context, root, DraftShape(beam_width=7, beam_length=3)
        )
        return prefix_tree(root, found.beams), most_probable(root, found.levels, size=40)

    search()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = search()
    for _ in range(3):
        context.normal_()
        root.add_(1)
        graph.replay()
        for found, wanted in zip(held, search(), strict=True):
            for name in FIELDS:
                assert getattr(found, name).equal(getattr(wanted, name)), name


@on_cpu
def test_no_kernel_takes_part_where_gradients_are_asked(monkeypatch):
    x = torch.randn(4, 5, requires_grad=True)
    monkeypatch.setattr("redrafter.kernels.activation.has_kernels", lambda *_: pytest.fail("it was asked"))
    silu_add(x, residual=x).sum().backward()
    assert x.grad is not None
