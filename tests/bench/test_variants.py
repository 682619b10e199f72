"""Methods without the noise of the draws and with beams unfolded: the same text, and what differs is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import AsksNothing, tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel, generate
from redrafter.bench.variants import Variant, unfolded
from redrafter.core.tree import prefix_tree
from redrafter.decoding.verify import walk
from redrafter.heads.eagle import EagleHead
from redrafter.heads.medusa import MedusaHeads
from redrafter.targets.target import Target
from test_tree import path_of

MODEL = tiny_model()


def drafter(**told) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, **({"beam_length": 3, "beam_width": 4} | told))


def test_without_the_noise_the_drafts_are_others_and_the_text_is_the_same():
    head, told = drafter(), {"do_sample": True, "seed": 3, "max_new_tokens": 40}
    known, blind = (
        generate(MODEL, Variant(head, (4, 3, None), coupled=coupled), [[5, 9]], **told) for coupled in (True, False)
    )
    assert known.new_tokens == blind.new_tokens == generate(MODEL, None, [[5, 9]], **told).new_tokens
    assert known.stats.accepted > blind.stats.accepted  # the noise of a flat head is most of what decides
    greedy = [generate(MODEL, Variant(head, None, c), [[5, 9]], max_new_tokens=20).stats.drafted for c in (True, False)]
    assert greedy[0] == greedy[1]


def test_every_method_is_made_to_rank_by_the_noise_or_not():
    """The noise decides most of what a flat head drafts."""
    law = {"do_sample": True, "seed": 3, "max_new_tokens": 40}
    plain = generate(MODEL, None, [[5, 9]], **law).new_tokens
    eagle = EagleHead.fresh(MODEL, beam_width=4, beam_length=3)
    alone = EagleHead(eagle.config.model_copy(update={"coupled": False}))
    couples = {drafter(): True, MedusaHeads.fresh(MODEL): True, eagle: True, alone: False, TwoModel(MODEL): True}
    for method, by_default in (couples | {TwoModel(MODEL, coupled=False): False}).items():
        found = {}
        for coupled in (None, True, False):
            out = generate(MODEL, Variant(method, coupled=coupled), [[5, 9]], **law)
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
def test_unfolded_beams_are_chains_of_their_own_and_accepted_once(batch, width, length, seed):
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*[torch.arange(3)] * max(3, length)).view(-1, max(3, length))
    every = every[:, -length:].unique(dim=0) if length < 3 else every
    width = min(width, len(every))
    beams = torch.stack([every[torch.randperm(len(every), generator=generator)[:width]] for _ in range(batch)])
    folded = prefix_tree(torch.arange(7, 7 + batch), beams)
    with AsksNothing():
        tree = unfolded(folded, width)
    assert tree.trimmed().size == tree.size == 1 + width * length, "no node is left out"
    assert tree.valid.all()
    for row in range(batch):
        seen = sorted(attended(tree, row, node) for node in range(1, tree.size))
        assert seen == sorted(tuple(beam[:depth]) for beam in beams[row].tolist() for depth in range(1, length + 1))
        for node in range(1, tree.size):
            assert attended(tree, row, node) == path_of(tree, row, node)
        by = tree.ancestors[row].sum(dim=0)[1:]
        assert by.equal(length + 1 - tree.depth[row, 1:]), "by the nodes of one beam, from there down"
        for beam in beams[row]:  # what the target would write after the root, then after every node of that path
            one, other = (walk(some, chosen(some, beam), length=length)[1][row].item() for some in (tree, folded))
            assert one == other == length


def chosen(tree, beam: torch.Tensor) -> torch.Tensor:
    """After each node the beam's token of the next depth."""
    return torch.cat((beam, beam[:1]))[tree.depth.clamp(max=len(beam))]


@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3}, {"no_repeat_ngram_size": 3}])
@pytest.mark.parametrize("kind", ["recurrent", "two models", "eagle"])
def test_unfolded_drafts_write_the_same_and_are_accepted_as_far(kind, law):
    torch.manual_seed(0)
    method = {"recurrent": drafter, "two models": lambda: TwoModel(MODEL), "eagle": lambda: EagleHead.fresh(MODEL)}
    head, prompts = method[kind](), [[5, 9, 12], [7], [30, 31]]
    told = {"max_new_tokens": 24, **law}
    shape = ({"recurrent": 12, "two models": 4, "eagle": 30}[kind], 3, None)
    folded, chains = (generate(MODEL, Variant(head, shape, folded=known), prompts, **told) for known in (True, False))
    assert folded.new_tokens == chains.new_tokens == generate(MODEL, None, prompts, **told).new_tokens
    assert folded.stats.accepted_by_position == chains.stats.accepted_by_position
    assert folded.stats.accepted > 0, "what is never accepted shows nothing"


def test_what_has_no_whole_beams_is_not_unfolded():
    target = Target(MODEL)
    heads = MedusaHeads.fresh(MODEL, heads=3, nodes=20)
    heads.config = heads.config.model_copy(update={"tree": heads.config.tree[:12]})
    assert heads.proposer(target, 3, 3, None).size == 1 + 3 * 3, "by chance as many as three beams have"
    for method, width, budget in ((drafter(), 4, 9), (heads, 3, None), (heads, 4, None)):
        with pytest.raises(RedrafterError, match="does not draft whole beams that could be unfolded"):
            Variant(method, folded=False).proposer(target, width, 3, budget)
    assert Variant(drafter(), folded=False).proposer(target, 4, 3, None).size == 13
    assert Variant(PromptLookup(), folded=False).proposer(target, 1, 0, None) is None


def test_every_node_of_unfolded_beams_is_run(monkeypatch):
    sizes = []
    forward = Target.forward
    monkeypatch.setattr(Target, "forward", lambda self, tree, *a: sizes.append(tree.size) or forward(self, tree, *a))
    for known in (True, False):
        sizes.clear()
        generate(MODEL, Variant(drafter(), (12, 3, None), folded=known), [[5, 9]], max_new_tokens=12)
        assert all(size < 37 for size in sizes[1:]) if known else set(sizes[1:]) == {37}


@pytest.mark.gpu
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3}])
def test_on_a_gpu_a_step_of_unfolded_beams_is_one_graph(captured, law):
    model = tiny_model().cuda()
    torch.manual_seed(0)
    head, told = RecurrentDrafter.for_target(model), {"max_new_tokens": 40, **law}
    prompts = [[5, 9, 12], [7], [30, 31]]
    chains = generate(model, Variant(head, (12, 3, None), folded=False), prompts, **told)
    assert captured[-1].refused is None
    folded = generate(model, Variant(head, (12, 3, None)), prompts, **told)
    assert chains.new_tokens == folded.new_tokens == generate(model, None, prompts, **told).new_tokens
    assert chains.stats.accepted_by_position == folded.stats.accepted_by_position
