"""Prompts by category, and a sample of them that is the same each time."""

from __future__ import annotations

import pytest
import transformers

from redrafter import RedrafterError
from redrafter.bench.tasks import by_category, read


@pytest.fixture
def tokenizer(model_folder):
    return transformers.AutoTokenizer.from_pretrained(model_folder)


def rows(**counts: int):
    found = [(name, {"prompt": f"{name} {i}", "category": name}) for name, n in counts.items() for i in range(n)]
    return [(f"line {number}", row) for number, (_, row) in enumerate(found, start=1)]


def texts(tasks, tokenizer, name):
    return [tokenizer.decode(ids) for ids in tasks.prompts[name]]


def test_a_sample_is_spread_over_the_rows_of_each_category(tokenizer):
    tasks = by_category(rows(a=10, b=2), tokenizer, count=3)
    assert texts(tasks, tokenizer, "a") == ["a 0", "a 3", "a 6"]
    assert texts(tasks, tokenizer, "b") == ["b 0", "b 1"]
    assert (tasks.of, tasks.too_long) == ({"a": 10, "b": 2}, 0)
    assert [tokenizer.decode(ids) for ids in tasks.mixed] == ["a 0", "b 0", "a 3", "b 1", "a 6"]
    assert tasks.repeated(7) == [*tasks.mixed, *tasks.mixed[:2]]
    again = by_category(rows(a=10, b=2), tokenizer, count=3)
    assert again.digest == tasks.digest != by_category(rows(a=10, b=2), tokenizer, count=2).digest


def test_chats_are_asked_by_their_first_turn(tokenizer):
    tasks = by_category([("line 1", {"turns": ["hi", "more"], "kind": "chat"})], tokenizer, key="kind")
    assert texts(tasks, tokenizer, "chat")[0].endswith("u:hi</s><s>a:")


def test_a_file_without_categories_is_one(tmp_path):
    plain, told = tmp_path / "plain.jsonl", tmp_path / "told.jsonl"
    plain.write_text('{"prompt": "x"}\n')
    told.write_text('{"prompt": "y", "kind": "z"}\n{"prompt": "w"}\n')
    (where, first), *others = read([plain, told], "kind")
    assert first == {"prompt": "x", "kind": "plain"}
    assert where.endswith("plain.jsonl line 1")
    assert [record.get("kind") for _, record in others] == ["z", None]


def test_prompts_that_do_not_fit_are_left_out_before_the_sample(tokenizer):
    mixed = [("line 1", {"prompt": "long " * 9, "category": "a"}), *rows(a=2)]
    tasks = by_category(mixed, tokenizer, count=2, room=10)
    assert texts(tasks, tokenizer, "a") == ["a 0", "a 1"]
    assert (tasks.of, tasks.too_long) == ({"a": 2}, 1)
    with pytest.raises(RedrafterError, match="All 1 prompts are too long"):
        by_category(mixed[:1], tokenizer, room=10)


def test_bad_rows_are_named(tokenizer):
    with pytest.raises(RedrafterError, match='line 2: the row has no "category", which others have'):
        by_category([*rows(a=1), ("line 2", {"prompt": "x"})], tokenizer)
    with pytest.raises(RedrafterError, match='line 1: the category "all" stands for all'):
        by_category(rows(all=1), tokenizer)
    with pytest.raises(RedrafterError, match="line 1: a row needs"):
        by_category([("line 1", {"category": "a"})], tokenizer)
