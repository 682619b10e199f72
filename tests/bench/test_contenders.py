"""How methods are named, the shapes that they then draft in, and what is told of their weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel
from redrafter.bench.contenders import ALONE, Contender, Told, greedy_twins, load, read_methods
from redrafter.bench.variants import Variant
from redrafter.core.shapes import DraftShape
from redrafter.heads.medusa import MedusaHeads
from redrafter.targets.target import Target

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
        ("a=b@uncoupled", Told("a", "b", coupled=False)),
        ("b@2x3:4,coupled", Told("b 2x3:4,coupled", "b", 2, 3, 4, True)),
    ],
)
def test_a_method_is_a_name_a_place_and_how_it_drafts(text, told):
    assert Told.read(text) == told
    assert Told.read(f"x={told.shown}") == replace(told, label="x")


@pytest.mark.parametrize(
    "text",
    ["", "=folder", "a=", "a=folder@10x", "a=folder@0x4", "a=folder@x", "a=b@1:2:3", "a=b@2x3uncoupled", "a=b@10y4"],
)
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


def test_what_is_told_of_the_noise_is_heeded_in_the_methods_own_shape():
    told, method = Told.read("a=b@uncoupled"), drafter(node_budget=9)
    assert told.shaped(method) == Variant(method, None, coupled=False)
    assert Contender("a", "b", told.shaped(method)).shape(1) == Contender("a", "b", method).shape(1)


def test_methods_that_differ_in_coupling_alone_are_one_where_decoding_is_greedy():
    method = drafter()

    def made(text: str) -> Contender:
        told = Told.read(text)
        return Contender(told.label, told.path, told.shaped(method))

    found = [made(text) for text in ("a=x", "b=x@uncoupled", "c=x@2x2", "d=x@2x2,uncoupled", "e=x", "f=y@uncoupled")]
    assert greedy_twins([Contender(ALONE), *found], [1]) == {"b": "a", "d": "c"}
    method.config = method.config.model_copy(
        update={"shapes": (DraftShape(batch=2, beam_width=2, beam_length=2, node_budget=None),)}
    )
    assert greedy_twins([made("a=x"), made("b=x@4x3,uncoupled")], [1]) == {"b": "a"}
    assert greedy_twins([made("a=x"), made("b=x@4x3,uncoupled")], [1, 2]) == {}, "tuned otherwise for two rows"


def test_a_method_that_is_tuned_off_is_measured_as_it_was_made():
    tuned = drafter()
    off = (DraftShape(batch=2, beam_width=1, beam_length=0),)
    tuned.config = tuned.config.model_copy(update={"shapes": off})
    assert tuned.drafting(2)[1] == 0
    assert Contender("a", "b", tuned).shape(2).beam_length == 3


def test_what_cannot_draft_is_refused_by_name_before_anything_runs(monkeypatch):
    monkeypatch.setattr("redrafter.bench.contenders.load_method", lambda path, model, **_: drafter())
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


def test_the_form_of_weights_is_told():
    target = Target(MODEL)
    few = RecurrentDrafter.for_target(MODEL, draft_vocabulary=torch.arange(3, 23))
    for method in (few, Variant(few, (2, 2, None))):
        assert Contender("a", "b", method).form(target) == (
            "one recurrent step, 2 blocks of width 64",
            "20 of 61 tokens",
        )
    assert Contender("a", "b", TwoModel(tiny_model(seed=1))).form(target) == ("LlamaForCausalLM", "all tokens")
    assert Contender("a", "b", PromptLookup()).form(target) == Contender("alone").form(target) == ("", "")


def test_how_a_method_drafts_is_told():
    target = Target(MODEL)
    drafts = [Contender("a", "b", Variant(drafter(), shape)).drafts(target, 1) for shape in ((1, 2, None), (4, 3, 9))]
    assert drafts == ["one beam of 2 tokens", "4 beams of 3 tokens, the 9 most probable nodes"]
    fitted = MedusaHeads.fresh(MODEL, heads=3, nodes=20)
    alike = MedusaHeads.fresh(MODEL, heads=3, nodes=20, beam_width=20, node_budget=20)
    assert alike.drafting(1) == (20, 3, 20), "as many nodes as beams would have"
    for medusa in (fitted, alike, Variant(alike, None, False)):
        assert Contender("a", "b", medusa).drafts(target, 1) == "a tree of 20 nodes, 3 deep"
    assert Contender("alone").drafts(target, 1) == ""
