"""The Python examples of docs/serving.md run as printed."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


def test_the_engines_examples_run_as_printed():
    """Later examples use names of earlier ones."""
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(example, "serving.md", "exec"), names)
    lines = printed.getvalue().splitlines()
    answers = ast.literal_eval(lines[-1])
    assert len(answers) == len(names["prompts"]) == 2
    assert all([*answers, *lines])
