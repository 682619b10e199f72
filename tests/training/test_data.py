"""Rows to tokens, and which of them are learnt."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from redrafter import RedrafterError
from redrafter.data.examples import Row, collate, coverage, most_frequent, pack, read_rows, split

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
        ({"words": 3}, 'line 2: a row needs "messages"'),
        ({"text": 3}, 'line 2: "text" must be text'),
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


def test_rows_without_a_token_to_learn_are_neither_trained_on_nor_held_out():
    rows = [Row([number] * 3, [number % 2 == 0] * 3) for number in range(10)]
    rows.append(Row([99] * 3, [True, False, False]))  # the first one has no context
    kept, held_out = split(rows, 2, seed=3)
    assert [row.input_ids[0] for row in kept + held_out if row.input_ids[0] % 2] == []
    assert (len(kept), len(held_out)) == (3, 2)
    assert split(rows[::2][:5], 2, seed=3) == (kept, held_out), "the choice is among those that teach something"
    with pytest.raises(RedrafterError, match="none of the 5"):
        split(rows, 5, seed=0)


@given(trained=st.lists(st.booleans(), max_size=30), reach=st.integers(1, 40))
def test_what_is_before_a_token_to_learn(trained, reach):
    wanted = [any(trained[i + 1 : i + 1 + reach]) for i in range(len(trained))]
    assert Row([7] * len(trained), trained).before_learnt(reach) == wanted


def test_batches_are_padded_right():
    batch = collate([Row([5, 6, 7], [False, True, True]), Row([8], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trained"].tolist() == [[False, True, True], [False, False, False]]
    assert batch["trained"].dtype == torch.bool
    assert "continuations" not in batch


def test_rows_that_share_an_entry_keep_their_numbers_and_learn_no_first_token():
    one = Row([5, 6, 7], [True] * 3, [[6, 7], [7, 9], [9, -1]])
    batch = collate([[one, Row([8, 4], [True] * 2)], Row([3], [True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 4], [3, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch["trained"].tolist() == [[False, True, True, False, True], [False] * 5]
    assert batch["continuations"][0].tolist() == [[6, 7], [7, 9], [9, -1], [-1, -1], [-1, -1]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 12))
def test_packing_loses_no_row_and_overfills_no_group(sizes, length):
    rows = [Row([i] * size, [True] * size) for i, size in enumerate(sizes)]
    groups = pack(rows, length)
    assert sorted(row.input_ids[0] for group in groups for row in group) == list(range(len(rows)))
    assert all(len(group) == 1 or sum(len(row.input_ids) for row in group) <= length for group in groups)
    totals = sorted(sum(len(row.input_ids) for row in group) for group in groups)
    assert len(totals) == 1 or totals[0] + totals[1] > length  # no two groups could have been one


def test_the_draft_vocabulary_is_what_is_learnt_most():
    rows = [Row([9, 9, 9, 4, 4, 7, 2], [False, False, True, True, True, True, True]), Row([7, 2], [True, False])]
    assert most_frequent(rows, 2).tolist() == [4, 7]
    assert most_frequent(rows, 3).tolist() == [4, 7, 2]
    with pytest.raises(RedrafterError, match="4 different tokens"):
        most_frequent(rows, 5)
    assert coverage(rows, torch.tensor([4, 7])) == pytest.approx(4 / 6), "twice 4, twice 7, twice 2"
    assert coverage(rows, torch.tensor([4, 60])) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes?"}]},
        {"input_ids": [1, 87, 28, 74, 75, 2, 1, 67, 28, 91, 71, 85, 33, 2], "loss_mask": [0] * 9 + [1] * 5},
    ],
)
def test_every_way_to_write_a_dialogue(tmp_path, tokenizer, record):
    (row,) = read(tmp_path, tokenizer, record)
    (same,) = read(tmp_path, tokenizer, {"messages": DIALOGUE[:2]})
    assert row == same


def test_of_a_prompt_and_its_completion_the_completion_and_its_end_are_learnt(tmp_path, tokenizer):
    (row,) = read(tmp_path, tokenizer, {"prompt": "once upon", "completion": " a time"})
    assert learnt(row, tokenizer) == " a time</s>"


def test_only_the_completion_is_learnt_of_messages(tmp_path, tokenizer):
    tokenizer.chat_template = MARKED
    (row,) = read(tmp_path, tokenizer, {"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]})
    assert learnt(row, tokenizer) == "oh</s>"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"input_ids": [1, 10**6], "loss_mask": [0, 1]}, '"input_ids" must be whole numbers from 0 to 258'),
        ({"input_ids": [1, True], "loss_mask": [0, 1]}, '"input_ids" must be'),
        ({"input_ids": [1, 2], "loss_mask": [1]}, '"input_ids" needs a "loss_mask"'),
        ({"input_ids": [1, 2]}, '"input_ids" needs a "loss_mask"'),
        ({"input_ids": [1, 2], "loss_mask": [1, 1], "continuations": [[3]]}, '"continuations" must be'),
    ],
)
def test_bad_ids_are_named(tmp_path, tokenizer, record, sentence):
    with pytest.raises(RedrafterError, match=rf"line 1: {sentence}"):
        read(tmp_path, tokenizer, record)


def test_bad_rows_can_be_passed_over_and_are_all_told(tmp_path, tokenizer):
    lines = ["{", json.dumps({"words": 1}), json.dumps({"text": "good"}), "[1]"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    told: list[str] = []
    (row,) = read_rows([tmp_path / "data.jsonl"], tokenizer, skip=told.append)
    assert learnt(row, tokenizer) == "good</s>"
    assert [sentence.split(" line ")[1][0] for sentence in told] == ["1", "2", "4"]
