"""Parsing of `--method`, the shapes that methods draft in, and the descriptions of their weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import tiny_model
from redrafter import PromptLookup, RecurrentDrafter, RedrafterError, TwoModel
from redrafter.bench.methods import (
    AUTOREGRESSIVE,
    BenchMethod,
    MethodSpec,
    greedy_duplicates,
    load_methods,
    parse_methods,
)
from redrafter.bench.variants import MethodVariant
from redrafter.core.shapes import DraftShape
from redrafter.heads.medusa import MedusaHeads
from redrafter.proposers import method_of
from redrafter.proposers.methods import HeadMethod
from redrafter.targets.target import Target

MODEL = tiny_model()


def shape_of(width: int, length: int, budget: int | None = None) -> DraftShape:
    return DraftShape(beam_width=width, beam_length=length, node_budget=budget)


def drafter(**fields) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter.for_target(MODEL, **({"beam_length": 3, "beam_width": 4} | fields))


def method(**fields) -> HeadMethod:
    return method_of(drafter(**fields))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("ours=folder", MethodSpec("ours", "folder")),
        ("ours, 32 nodes=a/b@10x4:32", MethodSpec("ours, 32 nodes", "a/b", 10, 4, 32)),
        ("a=b@x4", MethodSpec("a", "b", None, 4)),
        ("a=b@10", MethodSpec("a", "b", 10)),
        ("a=b@:32", MethodSpec("a", "b", None, None, 32)),
        ("lookup=prompt-lookup@1x10", MethodSpec("lookup", "prompt-lookup", 1, 10)),
        ("some/folder", MethodSpec("folder", "some/folder")),
        ("some/folder@2x3", MethodSpec("folder 2x3", "some/folder", 2, 3)),
        ("at=me@home/folder", MethodSpec("at", "me@home/folder")),
        ("a=b@uncoupled", MethodSpec("a", "b", coupled=False)),
        ("b@2x3:4,coupled", MethodSpec("b 2x3:4,coupled", "b", 2, 3, 4, True)),
        ("head=b@nolookup", MethodSpec("head", "b", lookup=False)),
        ("a=b@:32,lookup,uncoupled", MethodSpec("a", "b", None, None, 32, False, True)),
    ],
)
def test_a_method_option_is_parsed(text, spec):
    assert MethodSpec.parse(text) == spec
    assert MethodSpec.parse(f"x={spec.location}") == replace(spec, label="x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=folder",
        "a=",
        "a=folder@10x",
        "a=folder@0x4",
        "a=folder@x",
        "a=b@1:2:3",
        "a=b@2x3uncoupled",
        "a=b@10y4",
        "a=b@lookup,nolookup",
        "a=b@lookup,2x3",
    ],
)
def test_an_invalid_method_option_is_an_error(text):
    with pytest.raises(RedrafterError, match="--method takes NAME=PATH"):
        MethodSpec.parse(text)


@pytest.mark.parametrize("texts", [["a=b", "a=c"], ["autoregressive=b"], ["transformers=b"], ["x/b", "y/b"]])
def test_labels_must_be_unique(texts):
    with pytest.raises(RedrafterError, match="the name is taken"):
        parse_methods(texts)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a=b", (4, 3, 9)),
        ("a=b@2x5", (2, 5, None)),  # complete beams, despite the folder's node budget
        ("a=b@6", (6, 3, None)),
        ("a=b@6:7", (6, 3, 7)),
        ("a=b@:5", (4, 3, 5)),
    ],
)
def test_a_shape_without_a_node_budget_drafts_complete_beams(text, shape):
    one = BenchMethod("a", "b", MethodSpec.parse(text).apply(method(node_budget=9)))
    found = one.shape(1)
    assert (found.beam_width, found.beam_length, found.node_budget) == shape
    proposer = one.proposer(Target(MODEL), 1)
    assert (proposer.size, proposer.length) == (found.max_nodes, found.depth)


def test_coupling_can_be_set_without_a_shape():
    spec, plain = MethodSpec.parse("a=b@uncoupled"), method(node_budget=9)
    assert spec.apply(plain) == MethodVariant(plain, None, coupled=False)
    assert BenchMethod("a", "b", spec.apply(plain)).shape(1) == BenchMethod("a", "b", plain).shape(1)


@pytest.mark.parametrize("shape", ["", "2x2:5,"])
def test_lookup_can_be_switched_off_and_on(shape):
    def drafts(option: str) -> DraftShape | None:
        return BenchMethod("a", "b", MethodSpec.parse(f"a=b@{shape}{option}").apply(method())).shape(1)

    assert drafts("nolookup") == drafts("lookup").with_lookup(False) != drafts("lookup")
    assert drafts("lookup") == drafts("coupled"), "on by default"


def test_methods_that_differ_only_in_coupling_are_equal_in_greedy_decoding():
    head = drafter()

    def made(text: str) -> BenchMethod:
        spec = MethodSpec.parse(text)
        return BenchMethod(spec.label, spec.path, spec.apply(method_of(head)))

    found = [made(text) for text in ("a=x", "b=x@uncoupled", "c=x@2x2", "d=x@2x2,uncoupled", "e=x", "f=y@uncoupled")]
    assert greedy_duplicates([BenchMethod(AUTOREGRESSIVE), *found], [1]) == {"b": "a", "d": "c"}
    head.config = head.config.model_copy(
        update={"shapes": (DraftShape(batch=2, beam_width=2, beam_length=2, node_budget=None),)}
    )
    assert greedy_duplicates([made("a=x"), made("b=x@4x3,uncoupled")], [1]) == {"b": "a"}
    assert greedy_duplicates([made("a=x"), made("b=x@4x3,uncoupled")], [1, 2]) == {}, "tuned differently for two rows"


def test_a_method_that_tuning_switched_off_is_measured_in_its_default_shape():
    tuned = drafter()
    off = (DraftShape(batch=2, beam_width=1, beam_length=0),)
    tuned.config = tuned.config.model_copy(update={"shapes": off})
    assert method_of(tuned).shape(2).beam_length == 0
    assert BenchMethod("a", "b", method_of(tuned)).shape(2).beam_length == 3


def test_a_method_that_cannot_draft_is_an_error_before_anything_runs(monkeypatch):
    monkeypatch.setattr("redrafter.bench.methods.load_drafter", lambda path, model, **_: drafter())
    found = load_methods(parse_methods(["a=x", "b=x@2x2"]), MODEL, [1, 4])
    assert [one.label for one in found] == ["a", "b"]
    assert found[0].method is found[1].method.method, "one folder is loaded once"
    with pytest.raises(RedrafterError, match="--method b: beam_width"):
        load_methods(parse_methods(["a=x", "b=x@62x2"]), MODEL, [1])


def test_weights_exclude_those_of_the_model():
    head = drafter()
    one, target = BenchMethod("a", "b", method_of(head)), Target(MODEL)
    assert one.num_parameters(target) == sum(p.numel() for p in head.parameters())
    assert one.num_bytes(target) == 4 * one.num_parameters(target)
    assert BenchMethod(AUTOREGRESSIVE).num_parameters(target) == 0


def test_weights_are_described():
    target = Target(MODEL)
    small = method_of(RecurrentDrafter.for_target(MODEL, draft_vocabulary=torch.arange(3, 23)))
    for one in (small, MethodVariant(small, shape_of(2, 2))):
        assert BenchMethod("a", "b", one).weights_description(target) == (
            "one recurrent step, 2 blocks of width 64",
            "20 of 61 tokens",
        )
    assert BenchMethod("a", "b", TwoModel(tiny_model(seed=1))).weights_description(target) == (
        "LlamaForCausalLM",
        "all tokens",
    )
    assert (
        BenchMethod("a", "b", PromptLookup()).weights_description(target)
        == BenchMethod(AUTOREGRESSIVE).weights_description(target)
        == ("", "")
    )


def test_drafts_are_described():
    target = Target(MODEL)
    drafts = [
        BenchMethod("a", "b", MethodVariant(method(), shape)).drafts_description(target, 1)
        for shape in (shape_of(1, 2), shape_of(4, 3, 9), shape_of(2, 3).with_lookup())
    ]
    assert drafts == [
        "one beam of 2 tokens",
        "4 beams of 3 tokens, the 9 most probable nodes",
        "2 beams of 3 tokens, with lookup",
    ]
    fitted = method_of(MedusaHeads.fresh(MODEL, heads=3, nodes=20))
    alike = method_of(MedusaHeads.fresh(MODEL, heads=3, nodes=20, beam_width=20, node_budget=20))
    alone = alike.shape(1).with_lookup(False)
    assert alone.max_nodes == 20, "as many nodes as beams would have"
    for medusa in (MethodVariant(alike, alone), MethodVariant(alike, alone, False)):
        assert BenchMethod("a", "b", medusa).drafts_description(target, 1) == "a tree of 20 nodes, 3 deep"
    assert BenchMethod("a", "b", fitted).drafts_description(target, 1) == "a tree of 30 nodes, 10 deep, with lookup"
    assert BenchMethod(AUTOREGRESSIVE).drafts_description(target, 1) == ""
