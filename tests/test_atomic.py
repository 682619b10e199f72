"""Atomic writing: complete files or the previous ones, and no temporary files."""

from __future__ import annotations

import os

import pytest

from redrafter.utils.atomic import write_all_atomically, write_atomically


def test_bytes_and_functions_write_a_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(path, lambda temporary: temporary.write_text("two"))
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "write"])
def test_if_one_file_fails_none_is_replaced(tmp_path, monkeypatch, broken):
    first, second = tmp_path / "first", tmp_path / "second"
    write_all_atomically({first: b"1", second: b"2"})

    def fail(*_):
        raise OSError(28, "No space left on device")

    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_all_atomically({first: b"3", second: fail if broken == "write" else b"4"})
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"2")
    assert sorted(tmp_path.iterdir()) == [first, second]
