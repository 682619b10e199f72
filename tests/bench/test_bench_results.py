"""Figures computed from handwritten records."""

from __future__ import annotations

import pytest

from redrafter.bench.methods import AUTOREGRESSIVE, TRANSFORMERS
from redrafter.bench.results import calls, parts, speeds


def decoding(method: str, category: str, number: int, tokens: int, seconds: float, **more):
    unit = {"kind": "decode", "method": method, "category": category, "temperature": 0.0, "batch": 1, "round": number}
    counts = {"tokens": tokens, "seconds": seconds, "steps": 10, "drafts": 10, "drafted": 0, "accepted": 0}
    return unit | counts | {"accepted_by_position": [], "first_token_seconds": [0.02, 0.04]} | more


OURS = {"drafted": 80, "accepted": 15, "accepted_by_position": [9, 6]}
RECORDS = [
    decoding(AUTOREGRESSIVE, "a", 0, 10, 1.0), decoding("ours", "a", 0, 30, 1.5, **OURS),
    decoding(TRANSFORMERS, "a", 0, 10, 2.0),
    decoding(AUTOREGRESSIVE, "a", 1, 10, 2.0), decoding("ours", "a", 1, 30, 2.0, **OURS),
    decoding(TRANSFORMERS, "a", 1, 10, 2.0),
    decoding(AUTOREGRESSIVE, "a", 2, 10, 1.0), decoding("ours", "a", 2, 30, 1.0, **OURS),
    decoding(AUTOREGRESSIVE, "b", 0, 20, 1.0), decoding("ours", "b", 0, 10, 0.5, **OURS, peak_memory_bytes=7),
    {"kind": "texts", "method": "ours", "category": "a", "temperature": 0.0, "batch": 1, "round": 0,
     "texts_compared": 4, "parted": [{"margin": 1.0, "rounding": 2.0, "explained": True}]},
    {"kind": "texts", "method": "ours", "category": "b", "temperature": 0.0, "batch": 1, "round": 0,
     "texts_compared": 2, "parted": [{"margin": 9.0, "rounding": 2.0, "explained": False}]},
]  # fmt: skip


def calls_of(method: str, number: int, seconds: list[float], *, prompt: float = 0.5, first_steps: float = 0.25):
    """Calls of 9 tokens, of which 4 are written after the first steps."""
    count = len(seconds)
    unit = {"kind": "calls", "method": method, "category": "all", "temperature": 0.0, "batch": 1, "round": number}
    parts = {"first_token_seconds": [prompt] * count, "starting_seconds": [first_steps] * count}
    parts |= {"decoding_seconds": [one - prompt - first_steps for one in seconds], "decoding_tokens": [4] * count}
    return unit | {"new_tokens": 9, "seconds": seconds} | parts


CALLS = [
    calls_of(AUTOREGRESSIVE, 0, [2.75, 4.75]), calls_of("ours", 0, [1.75, 1.75]),
    calls_of(TRANSFORMERS, 0, [3.5, 3.5], first_steps=1.0),
    calls_of(AUTOREGRESSIVE, 1, [2.75, 2.75]), calls_of("ours", 1, [1.75, 3.75]),
]  # fmt: skip


def cell(method: str, category: str):
    (found,) = (one for one in speeds(RECORDS) if (one["method"], one["category"]) == (method, category))
    return found


def test_medians_over_rounds_and_ratios_within_a_round():
    ours = cell("ours", "a")
    assert ours["rounds"] == 3
    assert ours["tokens_per_second"] == {"median": 20.0, "least": 15.0, "most": 30.0}
    assert ours["speed_up"] == {"median": 3.0, "least": 2.0, "most": 3.0}  # 20/10, 15/5, 30/10
    assert ours["speed_up_over_transformers"] == {"median": 3.5, "least": 3.0, "most": 4.0}  # of the rounds with both
    paired = {(one["method"], one["category"]): one for one in speeds(RECORDS, flat={"ours": TRANSFORMERS})}
    assert paired["ours", "a"]["speed_up_over_unfolded"] == ours["speed_up_over_transformers"]
    assert "speed_up_over_unfolded" not in ours
    assert ours["tokens_per_step"] == 2.5
    assert ours["acceptance_by_position"] == [0.9, 0.6]
    assert ours["nodes_per_draft"] == 8.0
    assert ours["step_ms"] == 150.0
    assert ours["first_token_ms"] == pytest.approx(30.0)
    undrafted = cell(AUTOREGRESSIVE, "a")
    assert "speed_up" not in undrafted
    assert undrafted["speed_up_over_transformers"]["median"] == 1.5  # 10/5 and 5/5
    assert "tokens_per_step" not in cell(TRANSFORMERS, "a")
    assert cell(TRANSFORMERS, "a")["speed_up"]["most"] == 1.0


def test_complete_calls_are_compared_round_by_round():
    found = {one["method"]: one for one in calls(RECORDS + CALLS)}
    ours = found["ours"]
    assert (ours["new_tokens"], ours["rounds"], ours["requests"]) == (9, 2, 2)
    assert ours["seconds"] == {"median": 2.25, "least": 1.75, "most": 2.75}  # a round's mean call
    assert ours["speed_up"] == {"median": 1.5714, "least": 1.0, "most": 2.1429}  # 7.5 / 3.5 and 5.5 / 5.5
    assert ours["speed_up_over_transformers"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert (ours["first_token_ms"], ours["first_steps_ms"]) == (500.0, 250.0)
    assert ours["decoding"]["tokens_per_second"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert ours["decoding"]["speed_up"] == {"median": 2.0, "least": 1.0, "most": 3.0}  # 4 / (8/6), 2 / 2
    assert "speed_up" not in found[AUTOREGRESSIVE]
    assert found[TRANSFORMERS]["speed_up"]["median"] == pytest.approx(7.5 / 7, rel=1e-4)
    assert calls(RECORDS) == []


def test_calls_that_end_with_their_first_steps_have_no_decoding_figures():
    short = [one | {"decoding_tokens": [0, 0], "decoding_seconds": [0.1, 0.1]} for one in CALLS]
    for one in calls(short):
        assert one["decoding"] == {}
        assert one["seconds"]["median"] > 0


def test_all_categories_are_summed_over_complete_rounds():
    ours = cell("ours", "all")
    assert ours["rounds"] == 1
    assert ours["tokens_per_second"]["median"] == 20.0  # 40 tokens in 2 seconds
    assert ours["speed_up"]["median"] == pytest.approx(20 / 15, rel=1e-4)
    assert ours["tokens_per_step"] == 2.5
    assert ours["peak_memory_bytes"] == 7
    assert not any((one["method"], one["category"]) == (TRANSFORMERS, "all") for one in speeds(RECORDS))


def test_equal_and_diverging_texts_are_counted():
    assert cell("ours", "a")["texts_equal"] == 3
    assert cell("ours", "a")["texts_parted_without_reason"] == 0
    total = cell("ours", "all")
    assert (total["texts"], total["texts_equal"], total["texts_parted_without_reason"]) == (6, 4, 1)
    assert total["largest_margin_in_roundings"] == 4.5


def test_the_rest_of_a_step_is_the_step_without_its_parts():
    unit = {"kind": "parts", "method": "ours", "category": "all", "temperature": 0.0, "batch": 1, "round": 0}
    one = unit | {"context": 30, "nodes": 21, "step_ms": 10.0, "draft_ms": 2.0, "verify_ms": 7.0}
    found = parts([one, one | {"verify_ms": 9.0}])
    assert [part["rest_ms"] for part in found] == [1.0, 0.0]
    assert found[0]["nodes"] == 21
