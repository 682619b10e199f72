"""Trees of Medusa heads: what they hold, and that the text stays the target's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import AsksNothing, greedy, rooted, sampled_noise, tiny_model
from redrafter import RedrafterError, generate
from redrafter.core.noise import gumbel
from redrafter.core.rows import SamplingNoise
from redrafter.core.shapes import DraftShape
from redrafter.core.tree import ancestors_of
from redrafter.heads.medusa import MedusaHeads, fit_tree
from redrafter.proposers import method_of
from redrafter.proposers.medusa import MedusaProposer
from redrafter.targets.isolation import original
from redrafter.targets.target import Target
from test_medusa_heads import random_heads

MODEL = tiny_model()
PROMPTS = [[5, 9, 12], [7], [27, 28, 29, 30, 31]]
LAWS = [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 7}, {"min_p": 0.1}]

shapes = st.tuples(st.integers(1, 12), st.integers(1, 3), st.one_of(st.none(), st.integers(4, 80)))


def proposer_of(heads: MedusaHeads, width: int, length: int, budget: int | None = None) -> MedusaProposer | None:
    shape = DraftShape(beam_width=width, beam_length=length, node_budget=budget)
    return method_of(heads).proposer(Target(MODEL), shape)


def plain_paths(heads: MedusaHeads, width: int, length: int, budget: int | None) -> list[tuple[int, ...]]:
    kept = [path for path in heads.config.tree if len(path) <= length and all(rank < width for rank in path)]
    return kept if budget is None else kept[: budget - 1]


@settings(max_examples=40)
@given(st.integers(0, 2**31), shapes, st.booleans(), st.sampled_from([None, *LAWS]))
@torch.no_grad()
def test_every_node_holds_the_token_of_its_rank(seed, shape, less, law):
    """Ranked by the head alone, or when sampling by what the target is about to draw."""
    heads = random_heads(draft_vocabulary=torch.arange(3, 40) if less else None)
    generator = torch.Generator().manual_seed(seed)
    names = list(range(3, 40)) if less else list(range(61))
    context, root = torch.randn(2, 1, 32, generator=generator), torch.tensor([5, 9])
    draw = SamplingNoise()
    if law is not None:
        config = MODEL.generation_config.__class__(do_sample=True, **({"top_k": 0} | law))
        warpers = MODEL._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
        draw = sampled_noise(gumbel(torch.tensor([seed, 5]), torch.arange(4, 8).expand(2, -1), 61), **law)
    proposer = proposer_of(heads, *shape)
    with AsksNothing():
        tree = proposer.propose(None, rooted(root), context, draw)
    paths = plain_paths(heads, *shape)
    assert tree.size == proposer.size == 1 + len(paths)
    assert tree.valid.all()
    assert tree.ancestors.equal(ancestors_of(tree.parents, max_depth=3))
    for row in range(2):
        assert tree.tokens[row, 0] == root[row]
        scores = heads.logits(context[row, -1])
        if law is not None:
            scores = warpers(None, scores) + draw.gumbel[row, :3][:, names]
        for node, path in enumerate(paths, start=1):
            depth = len(path)
            assert tree.depth[row, node] == depth
            assert tree.parents[row, node] == (0 if depth == 1 else 1 + paths.index(path[:-1]))
            token = names.index(int(tree.tokens[row, node]))
            better = int((scores[depth - 1] > scores[depth - 1, token]).sum())
            assert better == path[-1] or scores[depth - 1, token] == -torch.inf
        edges = list(zip(tree.parents[row].tolist(), tree.tokens[row].tolist(), strict=True))[1:]
        assert len(set(edges)) == len(edges), "siblings differ"


@settings(max_examples=6)
@given(shapes, st.booleans(), st.integers(0, 2**31))
def test_drafted_text_is_undrafted_text(shape, sampled, seed):
    torch.manual_seed(seed)
    heads = random_heads()
    told = dict(zip(("beam_width", "beam_length", "node_budget"), shape, strict=True))
    law = {"do_sample": True, "seed": seed % 1000, "temperature": 0.9} if sampled else {}
    plain = generate(MODEL, None, PROMPTS, max_new_tokens=12, **law).new_tokens
    assert generate(MODEL, heads, PROMPTS, max_new_tokens=12, **told, **law).new_tokens == plain
    assert generate(MODEL, heads, PROMPTS, max_new_tokens=12, batch_size=2, **told, **law).new_tokens == plain
    assert sampled or plain == [greedy(MODEL, prompt, 12) for prompt in PROMPTS]


def counting_model():
    """Writes token + 1 after every token, so that each of its states tells all that follows."""
    model = tiny_model(vocab_size=32, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else torch.zeros_like(parameter))
        model.model.embed_tokens.weight.copy_(torch.eye(32))
        model.lm_head.weight.copy_(torch.eye(32).roll(1, 0))
    return model


def counting_heads(model, spoilt: int | None = None) -> MedusaHeads:
    heads = MedusaHeads.fresh(model, heads=3)
    with torch.no_grad():
        for place, head in enumerate(heads.heads):
            head[-1].weight.copy_(torch.eye(32).roll(place + 2 + (place == spoilt), 0))
    return heads


def test_heads_that_know_what_follows_write_four_tokens_in_a_step():
    model = counting_model()
    out = generate(model, counting_heads(model), [[3], [9, 10]], max_new_tokens=13, lookup=False)
    assert out.new_tokens == [list(range(4, 17)), list(range(11, 24))]
    assert [row.steps for row in out.stats.rows] == [4, 4], "three steps of 3 + 1 and one token"
    assert out.stats.accepted_by_position == [7, 6, 6]  # the heads have seen nothing before a text of one token


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("shape", [(10, 3, None), (2, 2, None), (10, 3, 8)])
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3, "temperature": 0.8}])
def test_on_a_gpu_a_step_is_one_graph(captured, shape, law):
    model = counting_model()
    heads = counting_heads(model)
    told = dict(zip(("beam_width", "beam_length", "node_budget"), shape, strict=True))
    told |= {"max_new_tokens": 30, "batch_size": 2, **law}
    on_cpu = generate(model, heads, PROMPTS, **told)
    out = generate(model.cuda(), heads.cuda(), PROMPTS, **told)
    assert captured[-1].refused is None
    assert out.stats.accepted > 0
    assert out.new_tokens == on_cpu.new_tokens == generate(model, None, PROMPTS, fast=False, **told).new_tokens


def test_a_head_that_is_wrong_stops_the_path_there():
    model = counting_model()
    out = generate(model, counting_heads(model, spoilt=1), [[3]], max_new_tokens=13, beam_width=1, lookup=False)
    assert out.new_tokens == [list(range(4, 17))]
    assert out.stats.accepted_by_position == [6, 0, 0]
    assert out.stats.rows[0].steps == 7, "one token, then six steps of 1 + 1"


def test_the_tree_that_is_drafted_is_the_first_of_what_was_fitted():
    heads = random_heads()
    tree = fit_tree([[0.6, 0.3, 0.2], [0.5, 0.2], [0.4]], 12)
    heads.config = heads.config.model_copy(update={"tree": tree})
    assert method_of(heads).shape(1) == DraftShape(beam_width=10, beam_length=3).with_lookup()
    for nodes in range(4, 13):
        proposer = proposer_of(heads, 10, 3, nodes)
        assert proposer.size == nodes
    assert proposer_of(heads, 10, 3, 500).size == 12
    assert proposer_of(heads, 1, 3).size == 4, "the best token of each head"
    assert proposer_of(heads, 10, 1).size == 4, "three tokens of the first head"
    assert proposer_of(heads, 10, 0) is None


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"beam_length": 4}, "beam_length must be at most 3, the number of heads, not 4"),
        ({"beam_length": -1}, "beam_length must be at least 1"),
        ({"beam_width": 0}, "beam_width must be at least 1"),
        ({"node_budget": 3}, "node_budget must hold the root and 3 drafted tokens"),
    ],
)
def test_what_the_heads_cannot_draft_is_refused(told, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        generate(MODEL, random_heads(), PROMPTS, max_new_tokens=4, **told)


def test_heads_of_another_model_are_refused():
    with pytest.raises(RedrafterError, match="was made for a model that it does not name"):
        generate(tiny_model(hidden_size=16, head_dim=4), random_heads(), PROMPTS, max_new_tokens=4)


def test_it_is_a_proposer_of_what_it_runs():
    heads = random_heads()
    proposer = proposer_of(heads, 10, 3)
    assert isinstance(proposer, MedusaProposer)
    assert [original(module) for module in proposer.modules] == [heads]
    assert (proposer.length, proposer.positions, proposer.memory(batch=1, slots=1)) == (3, 1, None)
