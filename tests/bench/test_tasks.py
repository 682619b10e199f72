"""Prompts by category, and deterministic samples of them."""

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


def test_a_sample_is_evenly_spaced_over_each_category(tokenizer):
    tasks = by_category(rows(a=10, b=2), tokenizer, count=3)
    assert texts(tasks, tokenizer, "a") == ["a 0", "a 3", "a 6"]
    assert texts(tasks, tokenizer, "b") == ["b 0", "b 1"]
    assert (tasks.of, tasks.too_long) == ({"a": 10, "b": 2}, 0)
    assert [tokenizer.decode(ids) for ids in tasks.mixed] == ["a 0", "b 0", "a 3", "b 1", "a 6"]
    assert tasks.repeated(7) == [*tasks.mixed, *tasks.mixed[:2]]
    again = by_category(rows(a=10, b=2), tokenizer, count=3)
    assert again.digest == tasks.digest != by_category(rows(a=10, b=2), tokenizer, count=2).digest


def test_the_first_turn_of_a_chat_is_the_prompt(tokenizer):
    tasks = by_category([("line 1", {"turns": ["hi", "more"], "kind": "chat"})], tokenizer, key="kind")
    assert texts(tasks, tokenizer, "chat")[0].endswith("u:hi</s><s>a:")


def test_a_file_without_categories_is_one_category(tmp_path):
    plain, labelled = tmp_path / "plain.jsonl", tmp_path / "labelled.jsonl"
    plain.write_text('{"prompt": "x"}\n')
    labelled.write_text('{"prompt": "y", "kind": "z"}\n{"prompt": "w"}\n')
    (where, first), *others = read([plain, labelled], "kind")
    assert first == {"prompt": "x", "kind": "plain"}
    assert where.endswith("plain.jsonl line 1")
    assert [record.get("kind") for _, record in others] == ["z", None]


def test_prompts_that_are_too_long_are_excluded_before_sampling(tokenizer):
    mixed = [("line 1", {"prompt": "long " * 9, "category": "a"}), *rows(a=2)]
    tasks = by_category(mixed, tokenizer, count=2, max_tokens=10)
    assert texts(tasks, tokenizer, "a") == ["a 0", "a 1"]
    assert (tasks.of, tasks.too_long) == ({"a": 2}, 1)
    with pytest.raises(RedrafterError, match="too long"):
        by_category(mixed[:1], tokenizer, max_tokens=10)


def test_bad_rows_are_errors_with_their_location(tokenizer):
    with pytest.raises(RedrafterError, match=r'line 2: .*no "category"'):
        by_category([*rows(a=1), ("line 2", {"prompt": "x"})], tokenizer)
    with pytest.raises(RedrafterError, match=r'line 1: .*"all" is reserved'):
        by_category(rows(all=1), tokenizer)
    with pytest.raises(RedrafterError, match="line 1: "):
        by_category([("line 1", {"category": "a"})], tokenizer)
