"""Structured output: texts are valid, equal with and without a drafter, and scores are a function of the text."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import redrafter
from redrafter import RedrafterError, generate
from redrafter.server.structured import make_processor

DEMO = Path(redrafter.__file__).parent / "assets" / "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["New York", "Los Angeles"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["pool", "gym"]}, "maxItems": 2},
    },
    "required": ["city", "stars", "tags"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,8}( [a-z]{1,9}){2,5}\."
SAMPLED = {"do_sample": True, "temperature": 1.2, "seed": 5}
VOCABULARY = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "redrafter-demo-12m")


@pytest.fixture(scope="module")
def pair():
    model = AutoModelForCausalLM.from_pretrained(DEMO / "redrafter-demo-12m")
    return model, redrafter.RecurrentDrafter.from_pretrained(DEMO / "drafter", target=model)


def is_hotel(text: str) -> bool:
    value = json.loads(text)
    return (
        value["city"] in ("New York", "Los Angeles")
        and value["stars"] in range(1, 6)
        and set(value["tags"]) <= {"pool", "gym"}
        and value.keys() == {"city", "stars", "tags"}
    )


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("form", "valid"),
    [({"json_schema": SCHEMA}, is_hotel), ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text))],
    ids=["schema", "regex"],
)
def test_texts_are_valid_and_do_not_depend_on_the_drafter(form, valid, settings, pair, tokenizer):
    model, drafter = pair
    chat = [{"role": "user", "content": "Please find me a hotel in New York with a good rating."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
    texts = []
    for drafts in (None, drafter):
        processor = make_processor(tokenizer, VOCABULARY, **form)
        out = generate(
            model, drafts, [prompt], max_new_tokens=120, tokenizer=tokenizer, logits_processor=[processor], **settings
        )
        assert out.finish_reasons == ["eos"]
        texts.append(out.new_tokens[0])
    assert texts[0] == texts[1]
    assert out.stats.accepted > 0
    assert valid(out.texts[0])


def allowed(processor, text: list[int], size: int = VOCABULARY) -> set[int]:
    """The tokens that may follow a text."""
    scores = processor(torch.tensor([text]), torch.zeros(1, size))
    assert set(scores.unique().tolist()) <= {0.0, -torch.inf}
    return set((scores[0] == 0).nonzero()[:, 0].tolist())


def test_the_processor_is_a_function_of_the_text(tokenizer):
    prompt, draw = [7, 8, 9], random.Random(0)
    texts = []
    for _ in range(4):  # random walks through the grammar
        processor, text = make_processor(tokenizer, VOCABULARY, json_schema=SCHEMA), list(prompt)
        while len(text) < 40 and text[-1] != tokenizer.eos_token_id:
            choices = allowed(processor, text)
            texts.append((list(text), choices))
            text.append(draw.choice(sorted(choices)))
    reused = make_processor(tokenizer, VOCABULARY, json_schema=SCHEMA)
    allowed(reused, prompt)
    draw.shuffle(texts)
    assert len({len(choices) for _, choices in texts}) > 5
    for text, choices in texts:
        assert allowed(reused, text) == choices


def test_a_text_may_end_exactly_where_the_grammar_does(tokenizer):
    end = tokenizer.eos_token_id
    digits = {tokenizer.encode(digit)[0] for digit in "0123456789"}
    one, two = tokenizer.encode("12")
    processor = make_processor(tokenizer, VOCABULARY, regex="[0-9]{1,2}")
    assert allowed(processor, [5]) == digits
    assert allowed(processor, [5, one]) == digits | {end}
    assert allowed(processor, [5, one, two]) == {end}
    several = make_processor(tokenizer, VOCABULARY, regex="[0-9]", end_tokens={end, 3})
    assert allowed(several, [5]) == digits
    assert allowed(several, [5, one]) == {end, 3}


def test_special_tokens_and_padding_of_the_vocabulary_are_forbidden(tokenizer):
    larger = VOCABULARY + 64
    choices = allowed(make_processor(tokenizer, larger, regex="(.|\n)*"), [5], larger)
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert len(special) == 4
    assert not choices & special
    assert max(choices) < VOCABULARY
    assert len(choices) > 0.9 * VOCABULARY


def test_any_object_is_json_object(tokenizer):
    def accepts(text: str) -> bool:
        processor = make_processor(tokenizer, VOCABULARY, json_object=True)
        allowed(processor, [5])
        try:
            return tokenizer.eos_token_id in allowed(processor, [5, *tokenizer.encode(text)])
        except RedrafterError:
            return False

    assert accepts("{}")
    assert accepts('{\n    "a": [1, "b", null],\n    "c": {"d": true}\n}')
    assert not accepts("[1]")
    assert not accepts('{"a": 1')
    assert not accepts('{"a":' + 100 * " " + "1}")  # a model must not write whitespace without end


@pytest.mark.parametrize(
    ("form", "cause"),
    [
        ({"json_schema": {"type": "objct"}}, "objct"),
        ({"json_schema": {"$ref": "#/$defs/missing"}}, "missing"),
        ({"json_schema": {"enum": [object()]}}, "serializable"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "missing"),
        ({}, "exactly one"),
        ({"json_object": True, "regex": "a"}, "exactly one"),
        ({"regex": "a", "end_tokens": ()}, "end token"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(form, cause, tokenizer):
    with pytest.raises(RedrafterError, match=cause) as error:
        make_processor(tokenizer, VOCABULARY, **form)
    assert "\n" not in str(error.value)


def test_a_processor_serves_one_prompt(tokenizer):
    processor = make_processor(tokenizer, VOCABULARY, regex="a*")
    allowed(processor, [5, 6])
    for text in ([5], [5, 7], [8, 6, 9]):
        with pytest.raises(RedrafterError, match="one prompt"):
            allowed(processor, text)


def test_a_token_that_the_grammar_forbids_is_an_error_once(tokenizer):
    processor = make_processor(tokenizer, VOCABULARY, regex="[0-9]+")
    choices = allowed(processor, [5])
    with pytest.raises(RedrafterError, match="does not allow token"):
        allowed(processor, [5, *tokenizer.encode("x")])
    assert allowed(processor, [5]) == choices


def test_without_llguidance_the_error_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RedrafterError, match=r"redrafter\[server\]"):
        make_processor(tokenizer, VOCABULARY, json_object=True)
