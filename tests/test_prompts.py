"""Rows with prompts, valid and invalid."""

from __future__ import annotations

import pytest
import transformers

from redrafter import RedrafterError
from redrafter.data.files import read_records
from redrafter.data.prompts import prompt_ids


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


def lines(tmp_path, content: bytes):
    (tmp_path / "p.jsonl").write_bytes(content)
    return list(read_records([tmp_path / "p.jsonl"]))


def test_every_row_comes_with_its_location(tmp_path):
    found = lines(tmp_path, b'{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert [record for _, record in found] == [{"prompt": "a"}, {"prompt": "b"}]
    assert found[1][0] == f"{tmp_path}/p.jsonl line 4"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        (b'{"prompt": "a"}\n\n["b"]\n', "line 3 is not a JSON object"),
        (b'{"prompt": "a"}\n\xff\xfe\n', "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        lines(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RedrafterError, match=r"none\.jsonl cannot be read: No such file"):
        list(read_records([tmp_path / "none.jsonl"]))


def test_prompts_of_rows(tokenizer):
    def text(record):
        return tokenizer.decode(prompt_ids(record, tokenizer, "here"))

    user = {"role": "user", "content": "hi"}
    assert text({"prompt": "as it is"}) == "as it is"
    assert text({"messages": [user]}) == "<s>u:hi</s><s>a:"
    assert text({"turns": ["hi", "and then?"]}) == "<s>u:hi</s><s>a:"
    assert text({"messages": [user, {"role": "assistant", "content": "known"}]}) == "<s>u:hi</s><s>a:"


def test_an_end_token_that_a_tokenizer_adds_does_not_end_the_prompt(tokenizer):
    class Closing:
        eos_token_id = 2

        def __call__(self, text):
            return transformers.BatchEncoding({"input_ids": [*tokenizer(text).input_ids, 2]})

    assert prompt_ids({"prompt": "ab"}, Closing(), "here") == tokenizer("ab").input_ids


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({}, 'a row needs "messages"'),
        ({"prompt": 3}, '"prompt" must be text'),
        ({"prompt": ""}, "here: the prompt is empty"),
        ({"messages": []}, 'here: "messages" is empty'),
        ({"messages": [{"role": "user", "content": ""}]}, "here: the prompt is empty"),
        ({"turns": [""]}, "here: the prompt is empty"),
        ({"messages": ["hi"]}, 'message 1 of messages must be an object with a "role"'),
    ],
)
def test_a_row_without_a_prompt_raises_an_error(tokenizer, record, sentence):
    with pytest.raises(RedrafterError, match=sentence):
        prompt_ids(record, tokenizer, "here")


def test_a_conversation_needs_a_template(tokenizer):
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RedrafterError, match="has no chat template"):
        prompt_ids({"messages": [{"role": "user", "content": "hi"}]}, plain, "here")
