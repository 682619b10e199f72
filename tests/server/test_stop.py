"""Text is cut before the first complete stop string, however it is split into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redrafter.server.stop import StopCutter

letters = st.text("ab", max_size=12)


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    cutter = StopCutter(stops)
    return "".join(map(cutter.push, pieces)) + cutter.rest(), cutter.found


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(pieces=st.lists(letters, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_do_not_matter(pieces, stops):
    assert cut(pieces, stops) == reference("".join(pieces), stops)


@given(text=letters, stop=st.text("ab", min_size=1, max_size=4))
def test_nothing_is_shown_that_a_stop_string_takes_back(text, stop):
    cutter, shown = StopCutter([stop]), ""
    for letter in text:
        shown += cutter.push(letter)
        assert reference(text, [stop])[0].startswith(shown)


@pytest.mark.parametrize(("text", "shown"), [("one STO", "one "), ("one ST", "one "), ("one S ", "one S ")])
def test_only_a_possible_beginning_is_held_back(text, shown):
    assert StopCutter(["STOP"]).push(text) == shown
