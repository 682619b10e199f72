"""Rows to tokens, and which of them are learnt."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from redrafter import RedrafterError
from redrafter.training.data import Row, collate, most_frequent, read_rows

MARKED = (
    "{% for m in messages %}<s>{{ m.role[0] + ':' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
DIALOGUE = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "oh"},
]


@pytest.fixture
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


def read(tmp_path, tokenizer, *records, max_length: int = 100) -> list[Row]:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return read_rows([tmp_path / "data.jsonl"], tokenizer, max_length=max_length)


def learnt(row: Row, tokenizer) -> str:
    return tokenizer.decode([i for i, trained in zip(row.input_ids, row.trained, strict=True) if trained])


@pytest.mark.parametrize("template", [None, MARKED])
def test_the_assistant_is_learnt_with_its_end_by_markers_or_by_comparison(tmp_path, tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    (row,) = read(tmp_path, tokenizer, {"messages": DIALOGUE})
    assert tokenizer.decode(row.input_ids) == "<s>u:hi</s><s>a:yes?</s><s>u:bye</s><s>a:oh</s>"
    assert learnt(row, tokenizer) == "yes?</s>oh</s>"


def test_of_a_prompt_and_its_text_the_text_is_learnt(tmp_path, tokenizer):
    (row,) = read(tmp_path, tokenizer, {"prompt": "once upon", "text": " a time", "tokens": 7})
    assert tokenizer.decode(row.input_ids) == "once upon a time"
    assert learnt(row, tokenizer) == " a time"


def test_of_plain_text_all_is_learnt_and_its_end(tmp_path, tokenizer):
    (row,) = read(tmp_path, tokenizer, {"text": "a time"})
    assert learnt(row, tokenizer) == "a time</s>"


def test_long_rows_are_cut(tmp_path, tokenizer):
    (row,) = read(tmp_path, tokenizer, {"text": "a time"}, max_length=4)
    assert learnt(row, tokenizer) == "a ti"
    assert len(row.trained) == 4


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"words": 3}, 'line 2: a row needs "messages" or "text"'),
        ({"text": 3}, 'line 2: a row needs "messages" or "text"'),
        ({"messages": "hi"}, "line 2"),
        ({"messages": [{"content": "hi"}]}, "line 2"),
        ({"messages": [{"role": "user"}]}, "line 2"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, record, sentence):
    with pytest.raises(RedrafterError, match=rf"data\.jsonl {sentence}"):
        read(tmp_path, tokenizer, {"text": "good"}, record)


@pytest.mark.parametrize("records", [[], [{"messages": DIALOGUE[:1]}], [{"text": ""}]])
def test_data_without_a_token_to_learn_is_refused(tmp_path, tokenizer, records):
    with pytest.raises(RedrafterError, match="no token to learn"):
        read(tmp_path, tokenizer, *records)


def test_batches_are_padded_right():
    batch = collate([Row([5, 6, 7], [False, True, True]), Row([8], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trained"].tolist() == [[False, True, True], [True, False, False]]
    assert batch["trained"].dtype == torch.bool


def test_the_draft_vocabulary_is_what_is_learnt_most():
    rows = [Row([9, 9, 9, 4, 4, 7, 2], [False, False, True, True, True, True, True]), Row([7, 2], [True, False])]
    assert most_frequent(rows, 2).tolist() == [4, 7]
    assert most_frequent(rows, 3).tolist() == [4, 7, 2]
    with pytest.raises(RedrafterError, match="4 kinds of tokens to learn, fewer than a draft vocabulary of 5"):
        most_frequent(rows, 5)
