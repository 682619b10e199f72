"""Counts against a loop over events written by hand."""

from __future__ import annotations

from redrafter.engine.results import Event, Stats, finished

EVENTS = [
    Event(0, [5], 0, 0, None),
    Event(1, [6], 0, 0, "eos"),
    Event(0, [7, 8, 9], 2, 4, None),
    Event(2, [3], 0, 0, None),
    Event(0, [1, 2], 2, 4, "length"),
    Event(2, [4, 4], 1, 4, "eos"),
]


def test_rows_come_out_as_they_end_with_their_own_counts():
    ended = list(finished(EVENTS, rows=3, positions=3))
    assert [one.row for one in ended] == [1, 0, 2]
    assert [one.new_tokens for one in ended] == [[6], [5, 7, 8, 9, 1, 2], [3, 4, 4]]
    assert [one.finish_reason for one in ended] == ["eos", "length", "eos"]
    stats = ended[1].stats
    assert (stats.steps, stats.tokens, stats.drafted, stats.accepted) == (3, 6, 8, 4)
    assert stats.accepted_by_position == [2, 2, 0]
    assert stats.tokens_per_step == 2
    assert ended[0].stats.seconds <= ended[2].stats.seconds


def test_a_row_is_given_out_before_the_stream_goes_on():
    read = []

    def events():
        for event in EVENTS:
            read.append(event)
            yield event

    next(finished(events(), rows=3, positions=3))
    assert len(read) == 2


def test_nothing_written_is_no_division():
    assert Stats().tokens_per_step == 0
