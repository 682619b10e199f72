"""The README's code runs as printed; its links, figures and source tree are right."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md")
SOURCES = ROOT / "src" / "redrafter"


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_python_examples_run_as_printed(monkeypatch, tmp_path):
    """Later examples use names of earlier ones."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(example, "README.md", "exec"), names)
    text, figure = printed.getvalue().splitlines()
    assert "hotel" in text
    assert float(figure.removesuffix(" tokens per step")) > 2.5


def test_there_are_two_setup_commands():
    """`.ci/run` runs these lines."""
    assert len(re.findall(r"^pip install", README, re.MULTILINE)) == 2


def test_the_commands_exist():
    reference = (ROOT / "docs" / "commands.md").read_text()
    for command, options in re.findall(r"redrafter (\w+) +(--[^\n#]*)", README):
        assert f"redrafter {command}" in reference
        section = reference[reference.index(f"redrafter {command}") :]
        for option in re.findall(r"--[\w-]+", options):
            assert option in section, (command, option)


def headings(page: str) -> set[str]:
    """What a link may name after `#`."""
    titles = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[str, str]]:
    pattern = r"\]\((?!https://)(.*?)\)"
    return [(name, link) for name in PAGES for link in sorted(set(re.findall(pattern, (ROOT / name).read_text())))]


@pytest.mark.parametrize(("name", "link"), [*links(), *(("README.md", f"#{word}") for word in ["results"])])
def test_every_link_leads_to_a_page_and_its_heading(name, link):
    path, _, heading = link.partition("#")
    page = (ROOT / (path or name)).read_text()
    assert not heading or heading in headings(page)


def rows(page: str) -> dict[str, list[list[str]]]:
    """The rows of a page's tables by their first cell."""
    found: dict[str, list[list[str]]] = {}
    for line in page.splitlines():
        if line.startswith("| "):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(first, []).append(cells)
    return found


NAMES = {
    "two models": ("two models, tree", "two models, tree by the noise"),
    "EAGLE": ("EAGLE", "EAGLE, by the noise"),
}
"""Rows of the comparison that a row of the README shows, greedy and at temperature 1, if they have other names."""


@pytest.mark.parametrize("method", ["transformers", "recurrent", "Medusa", "EAGLE", "two models", "prompt lookup"])
def test_the_figures_are_those_of_the_documentation(method):
    """Tests of bench compare the documentation's tables with the files of results."""
    shown = [cell.split(", ") for cell in rows(README)[method][0]]
    bundled = rows((ROOT / "docs" / "results.md").read_text())[method]
    for figure, decoding in zip(shown[0], ("greedy", "temperature 1"), strict=True):
        (row,) = [row for row in bundled if decoding in row]
        assert any(cell.split(" ")[0] == figure for cell in row), (figure, row)
    compared = rows((ROOT / "docs" / "comparison.md").read_text())
    greedy, sampled = (compared[name][0] for name in NAMES.get(method, (method, method)))
    for figures, column in ((shown[1], 0), (shown[2], 4)):
        assert figures == [greedy[column].split(" ")[0], sampled[column + 1].split(" ")[0]]


def test_the_tree_shows_every_package():
    tree = README[README.index("src/redrafter/\n") : README.index("tests/ ")]
    shown = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert shown == {path.name for path in SOURCES.iterdir() if path.is_dir() and path.name != "__pycache__"}
