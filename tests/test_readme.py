"""What the README shows runs as it stands."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run_as_printed(monkeypatch, tmp_path):
    """One after the other; a later one goes on from those before."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for example in examples:
            exec(compile(example, "README.md", "exec"), names)
    text, figure = printed.getvalue().splitlines()
    assert "hotel" in text
    assert float(figure.removesuffix(" tokens per step")) > 2.5


def headings(page: str) -> set[str]:
    """What a link may name after `#`."""
    titles = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https://)(.*?)\)", README))))
def test_every_link_leads_to_a_page_and_its_heading(link):
    path, _, heading = link.partition("#")
    page = (ROOT / path).read_text()
    assert not heading or heading in headings(page)


@pytest.mark.parametrize("name", re.findall(r"^  (\w[\w/]*\.py|\w+/)", README, re.MULTILINE))
def test_the_tree_shows_what_is_there(name):
    assert (ROOT / "src" / "redrafter" / name).exists()


def test_the_tree_shows_every_module():
    tree = README[README.index("src/redrafter/\n") :]
    for path in (ROOT / "src" / "redrafter").iterdir():
        if path.name not in ("__pycache__", "assets", "py.typed"):
            assert path.name in tree, path.name
