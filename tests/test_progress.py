"""Progress of long commands: a bar on a terminal, otherwise lines."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from redrafter.utils import progress as module
from redrafter.utils.progress import Progress, track

LINE = r"{} of 8 rows, some words(, [\d.]+ (rows/s|s each))?(, (\d:\d\d:\d\d left|time left unknown))?"


def until(done) -> None:
    """Waits for a condition."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_lines_come_even_if_nothing_finishes(monkeypatch):
    monkeypatch.setattr(module, "FIRST", 0.001)
    monkeypatch.setattr(module, "INTERVAL", 0.001)
    out = io.StringIO()
    with Progress("rows", 8, done=3, details=lambda: "some words", console=Console(file=out)) as progress:
        until(lambda: out.getvalue().count("\n") >= 2)
        assert re.fullmatch(LINE.format(3), out.getvalue().splitlines()[0])
        assert "time left unknown" in out.getvalue()
        progress.update(5.9)
        until(lambda: "5 of 8 rows" in out.getvalue().splitlines()[-1])
        progress.update(8)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(LINE.format(8), lines[-1])
    assert "left" not in lines[-1]
    assert all(re.fullmatch(LINE.format(r"\d"), line) for line in lines)
    assert re.search(r"[\d.]+ (rows/s|s each), \d:\d\d:\d\d left", out.getvalue())


def test_work_that_fails_at_once_shows_no_progress():
    out = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress("rows", 8, console=Console(file=out)):
        raise ValueError("no")
    assert out.getvalue() == ""


def test_a_terminal_has_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress("rows", 8, done=3, details=lambda: "some words", console=console) as progress:
        progress.print("beside [it]")
        progress.update(8)
    assert "beside [it]" in out.getvalue()
    assert "8 of 8 rows, some words" in out.getvalue()
    assert "\u2501" in out.getvalue(), "the bar"


def test_a_quiet_console_shows_nothing():
    out = io.StringIO()
    with Progress("rows", 2, console=Console(file=out, quiet=True)) as progress:
        progress.advance()
    assert progress.done == 1
    assert out.getvalue() == ""


def test_items_are_tracked(capsys, monkeypatch):
    monkeypatch.setattr(module, "FIRST", 0.001)
    monkeypatch.setattr(module, "INTERVAL", 0.001)
    err = ""
    for item in track([4, 5], "numbers", name=str):
        err += capsys.readouterr().err
        while f"{item - 4} of 2 numbers, {item}" not in err:
            time.sleep(0.002)
            err += capsys.readouterr().err
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^2 of 2 numbers(, .*)?\n$", err, re.MULTILINE)


@pytest.mark.parametrize("always", [False, True])
def test_work_that_ends_at_once_shows_nothing_or_the_last_line(always):
    out = io.StringIO()
    with Progress("rows", 8, done=3, always=always, console=Console(file=out)) as progress:
        progress.update(8)
    assert out.getvalue().startswith("8 of 8 rows") == always
    assert out.getvalue().count("\n") == always


@pytest.mark.parametrize("command", ["eval", "check", "tune"])
def test_commands_show_progress_on_stderr(say, monkeypatch, model_folder, drafter_folder, tmp_path, command):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"prompt": "upon"}\n')
    words = [command, "--model", model_folder, "--drafter", drafter_folder, "--max-new-tokens", 4]
    words += ["--data" if command == "eval" else "--prompts", prompts]
    if command == "tune":
        words += ["--dry-run", "--repeats", 1, "--batch-sizes", 1, "--widths", 2, "--lengths", 2, "--budgets", 4]
    plain = say(*words)
    assert plain[0] == 0
    init = module.Progress.__init__
    monkeypatch.setattr(module.Progress, "__init__", lambda *a, **more: init(*a, **more | {"always": True}))
    status, out, err = say(*words)
    assert status == 0
    assert ("of 2 texts" if command == "tune" else "4 of 4 texts") in err
    assert "texts/s" not in out
    assert out.count("\n") == plain[1].count("\n")
