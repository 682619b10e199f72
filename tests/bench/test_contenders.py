"""How methods are named, the shapes that they then draft in, and what noise they may see."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from redrafter import RecurrentDrafter, RedrafterError, generate
from redrafter.bench.contenders import Contender, Told, Variant, in_words, load, read_methods
from redrafter.config import DecodingShape
from redrafter.target import Target

MODEL = tiny_model()


def drafter(**told) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, **({"beam_length": 3, "beam_width": 4} | told))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ours=folder", Told("ours", "folder")),
        ("ours, 32 nodes=a/b@10x4:32", Told("ours, 32 nodes", "a/b", 10, 4, 32)),
        ("a=b@x4", Told("a", "b", None, 4)),
        ("a=b@10", Told("a", "b", 10)),
        ("a=b@:32", Told("a", "b", None, None, 32)),
        ("lookup=prompt-lookup@1x10", Told("lookup", "prompt-lookup", 1, 10)),
        ("some/folder", Told("folder", "some/folder")),
        ("some/folder@2x3", Told("folder 2x3", "some/folder", 2, 3)),
        ("at=me@home/folder", Told("at", "me@home/folder")),
    ],
)
def test_a_method_is_a_name_a_place_and_a_shape(text, told):
    assert Told.read(text) == told
    assert Told.read(f"x={told.shown}") == Told("x", told.path, told.width, told.length, told.budget)


@pytest.mark.parametrize("text", ["", "=folder", "a=", "a=folder@10x", "a=folder@0x4", "a=folder@x", "a=b@1:2:3"])
def test_what_is_no_method_is_refused(text):
    with pytest.raises(RedrafterError, match="--method takes NAME=PATH or NAME=PATH@WIDTHxLENGTH:NODES"):
        Told.read(text)


@pytest.mark.parametrize("texts", [["a=b", "a=c"], ["autoregressive=b"], ["transformers=b"], ["x/b", "y/b"]])
def test_every_method_has_a_name_of_its_own(texts):
    with pytest.raises(RedrafterError, match="the name is taken"):
        read_methods(texts)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a=b", (4, 3, 9)),
        ("a=b@2x5", (2, 5, None)),  # whole beams, whatever the folder says
        ("a=b@6", (6, 3, None)),
        ("a=b@6:7", (6, 3, 7)),
        ("a=b@:5", (4, 3, 5)),
    ],
)
def test_a_shape_is_what_is_told_and_whole_beams_without_nodes(text, shape):
    one = Contender("a", "b", Told.read(text).shaped(drafter(node_budget=9)))
    found = one.shape(1)
    assert (found.beam_width, found.beam_length, found.node_budget) == shape
    proposer = one.proposer(Target(MODEL), 1)
    assert (proposer.width, proposer.length, proposer.budget) == shape


def test_a_method_that_is_tuned_off_is_measured_as_it_was_made():
    tuned = drafter()
    off = (DecodingShape(batch=2, beam_width=1, beam_length=0),)
    tuned.config = tuned.config.model_copy(update={"shapes": off})
    assert tuned.drafting(2)[1] == 0
    assert Contender("a", "b", tuned).shape(2).beam_length == 3


def test_what_cannot_draft_is_refused_by_name_before_anything_runs(monkeypatch):
    monkeypatch.setattr("redrafter.bench.contenders.load_method", lambda path, model: drafter())
    found = load(read_methods(["a=x", "b=x@2x2"]), MODEL, [1, 4])
    assert [one.label for one in found] == ["a", "b"]
    assert found[0].method is found[1].method.method, "one folder is loaded once"
    with pytest.raises(RedrafterError, match="--method b: beam_width must lie between 1 and the drafter's 61 tokens"):
        load(read_methods(["a=x", "b=x@62x2"]), MODEL, [1])


def test_weights_are_counted_beside_the_models_own():
    head = drafter()
    one, target = Contender("a", "b", head), Target(MODEL)
    assert one.parameters(target) == sum(p.numel() for p in head.parameters())
    assert one.bytes(target) == 4 * one.parameters(target)
    assert Contender("alone").parameters(target) == 0


def test_without_the_noise_the_drafts_are_others_and_the_text_is_the_same():
    head, told = drafter(), {"do_sample": True, "seed": 3, "max_new_tokens": 40}
    known, blind = (
        generate(MODEL, Variant(head, (4, 3, None), coupled=coupled), [[5, 9]], **told) for coupled in (True, False)
    )
    assert known.new_tokens == blind.new_tokens == generate(MODEL, None, [[5, 9]], **told).new_tokens
    assert known.stats.accepted > blind.stats.accepted  # the noise of a flat head is most of what decides
    greedy = [generate(MODEL, Variant(head, None, c), [[5, 9]], max_new_tokens=20).stats.drafted for c in (True, False)]
    assert greedy[0] == greedy[1]


def test_shapes_in_words():
    assert in_words(None) == "no drafts"
    assert in_words(DecodingShape(beam_width=1, beam_length=1)) == "one beam of 1 token"
    words = in_words(DecodingShape(beam_width=11, beam_length=10, node_budget=32))
    assert words == "11 beams of 10 tokens, the 32 most probable nodes"
