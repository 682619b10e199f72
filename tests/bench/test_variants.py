"""Uncoupled drafts and flat beams: the same text as the unchanged method, with the expected differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import AsksNothing, tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate
from redrafter.bench.variants import MethodVariant, flat_beams
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import prefix_tree
from redrafter.decoding.step import Decoder
from redrafter.decoding.verify import walk
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import method_of
from redrafter.targets.target import Target
from test_tree import path_of

MODEL = tiny_model()


def shape_of(width: int, length: int, budget: int | None = None) -> DraftShape:
    return DraftShape(beam_width=width, beam_length=length, node_budget=budget)


def drafter():
    torch.manual_seed(0)
    return method_of(RecurrentDrafter.for_target(MODEL, beam_length=3, beam_width=4))


def test_uncoupled_drafts_differ_and_the_text_does_not():
    head, settings = drafter(), {"do_sample": True, "seed": 3, "max_new_tokens": 20}
    coupled, uncoupled = (
        generate(MODEL, MethodVariant(head, shape_of(4, 3), coupled=value), [[5, 9]], **settings)
        for value in (True, False)
    )
    assert coupled.new_tokens == uncoupled.new_tokens == generate(MODEL, None, [[5, 9]], **settings).new_tokens
    assert (
        coupled.stats.accepted > uncoupled.stats.accepted
    )  # for an untrained head, the noise decides most of the tokens
    greedy = [
        generate(MODEL, MethodVariant(head, None, c), [[5, 9]], max_new_tokens=20).stats.drafted for c in (True, False)
    ]
    assert greedy[0] == greedy[1]


def test_coupling_can_be_set_for_each_method():
    """For an untrained head, the noise decides most of the tokens."""
    sampling = {"do_sample": True, "seed": 3, "max_new_tokens": 20}
    plain = generate(MODEL, None, [[5, 9]], **sampling).new_tokens
    head = EagleHead.fresh(MODEL, beam_width=4, beam_length=3)
    eagle, uncoupled = method_of(head), method_of(EagleHead(head.config.model_copy(update={"coupled": False})))
    medusa = method_of(MedusaHeads.fresh(MODEL))
    couples = {drafter(): True, medusa: True, eagle: True, uncoupled: False, TwoModel(MODEL): True}
    for method, by_default in (couples | {TwoModel(MODEL, coupled=False): False}).items():
        found = {}
        for coupled in (None, True, False):
            out = generate(MODEL, MethodVariant(method, coupled=coupled), [[5, 9]], **sampling)
            assert out.new_tokens == plain
            found[coupled] = out.stats
        assert found[True].accepted > found[False].accepted
        assert found[None].accepted_by_position == found[by_default].accepted_by_position


def attended(tree, row: int, node: int) -> tuple[int, ...]:
    """The drafted tokens that a node sees, by depth."""
    seen = sorted(tree.ancestors[row, node].nonzero().flatten().tolist(), key=lambda one: int(tree.depth[row, one]))
    assert [int(tree.depth[row, one]) for one in seen] == list(range(len(seen)))
    return tuple(int(tree.tokens[row, one]) for one in seen[1:])


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_flat_beams_are_separate_chains_with_the_same_accepted_path(batch, width, length, seed):
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*[torch.arange(3)] * max(3, length)).view(-1, max(3, length))
    every = every[:, -length:].unique(dim=0) if length < 3 else every
    width = min(width, len(every))
    beams = torch.stack([every[torch.randperm(len(every), generator=generator)[:width]] for _ in range(batch)])
    prefix = prefix_tree(torch.arange(7, 7 + batch), beams)
    with AsksNothing():
        tree = flat_beams(prefix, width)
    assert tree.trimmed().size == tree.size == 1 + width * length, "no node is left out"
    assert tree.valid.all()
    for row in range(batch):
        seen = sorted(attended(tree, row, node) for node in range(1, tree.size))
        assert seen == sorted(tuple(beam[:depth]) for beam in beams[row].tolist() for depth in range(1, length + 1))
        for node in range(1, tree.size):
            assert attended(tree, row, node) == path_of(tree, row, node)
        by = tree.ancestors[row].sum(dim=0)[1:]
        assert by.equal(length + 1 - tree.depth[row, 1:]), "the nodes of one beam, from there down"
        for beam in beams[row]:  # what the target would write after the root, then after every node of that path
            one, other = (walk(some, chosen(some, beam), length=length)[1][row].item() for some in (tree, prefix))
            assert one == other == length


def chosen(tree, beam: torch.Tensor) -> torch.Tensor:
    """After each node the beam's token of the next depth."""
    return torch.cat((beam, beam[:1]))[tree.depth.clamp(max=len(beam))]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3}, {"no_repeat_ngram_size": 3}])
@pytest.mark.parametrize("kind", ["recurrent", "two models", "eagle"])
def test_flat_beams_have_the_same_text_and_acceptance(kind, sampling):
    torch.manual_seed(0)
    method = {
        "recurrent": drafter,
        "two models": lambda: TwoModel(MODEL),
        "eagle": lambda: method_of(EagleHead.fresh(MODEL)),
    }
    head, prompts = method[kind](), [[5, 9, 12], [7], [30, 31]]
    settings = {"max_new_tokens": 16, **sampling}
    shape = shape_of({"recurrent": 12, "two models": 4, "eagle": 30}[kind], 3)
    shared, chains = (
        generate(MODEL, MethodVariant(head, shape, flat=flat), prompts, **settings) for flat in (False, True)
    )
    assert shared.new_tokens == chains.new_tokens == generate(MODEL, None, prompts, **settings).new_tokens
    assert shared.stats.accepted_by_position == chains.stats.accepted_by_position
    assert shared.stats.accepted > 0, "otherwise the test checks nothing"


def test_only_complete_beams_can_be_flattened():
    target = Target(MODEL)
    heads = MedusaHeads.fresh(MODEL, heads=3, nodes=20)
    heads.config = heads.config.model_copy(update={"tree": heads.config.tree[:12]})
    medusa = method_of(heads)
    assert medusa.proposer(target, shape_of(3, 3)).size == 1 + 3 * 3, "as many nodes as three beams, by coincidence"
    for method, shape in ((drafter(), shape_of(4, 3, 9)), (medusa, shape_of(3, 3)), (medusa, shape_of(4, 3))):
        with pytest.raises(RedrafterError, match="complete beams"):
            MethodVariant(method, flat=True).proposer(target, shape)
    assert MethodVariant(drafter(), flat=True).proposer(target, shape_of(4, 3)).size == 13
    assert MethodVariant(PromptLookup(), flat=True).proposer(target, shape_of(1, 0)) is None


def test_all_nodes_of_flat_beams_are_run(monkeypatch):
    sizes = []
    step = Decoder.step

    def watched(*args):
        emitted = step(*args)
        sizes.append(emitted.logits.shape[1])
        return emitted

    monkeypatch.setattr(Decoder, "step", watched)
    for flat in (False, True):
        sizes.clear()
        generate(MODEL, MethodVariant(drafter(), shape_of(12, 3), flat=flat), [[5, 9]], max_new_tokens=12)
        assert set(sizes) == {37} if flat else all(size < 37 for size in sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3}])
def test_on_a_gpu_a_step_of_flat_beams_is_one_graph(captured, sampling):
    model = tiny_model().cuda()
    torch.manual_seed(0)
    head, settings = method_of(RecurrentDrafter.for_target(model)), {"max_new_tokens": 40, **sampling}
    prompts = [[5, 9, 12], [7], [30, 31]]
    chains = generate(model, MethodVariant(head, shape_of(12, 3), flat=True), prompts, **settings)
    assert captured[-1].refused is None
    shared = generate(model, MethodVariant(head, shape_of(12, 3)), prompts, **settings)
    assert chains.new_tokens == shared.new_tokens == generate(model, None, prompts, **settings).new_tokens
    assert chains.stats.accepted_by_position == shared.stats.accepted_by_position
