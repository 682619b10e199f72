"""Modules import at their top; import-linter checks the layers (`lint-imports`, contracts in pyproject.toml)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "src" / "redrafter"
LAZY = ("cli", "assets")
"""Folders whose functions may import: commands start fast because they import heavy modules late."""

OPTIONAL = ("redrafter.kernels.triton", "redrafter.bench.plots", "redrafter.integrations.vllm")
"""Modules that import packages which may be absent: triton, matplotlib and vllm."""


def inner_imports(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that functions import."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    yield from (f"{node.module}.{name.name}" for name in node.names)
                elif isinstance(node, ast.Import):
                    yield from (name.name for name in node.names)


def modules() -> list[Path]:
    return [path for path in SOURCES.rglob("*.py") if path.relative_to(SOURCES).parts[0] not in LAZY]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCES)))
def test_functions_import_only_modules_that_need_optional_packages(path):
    """Any other import inside a function would hide a cycle."""
    found = [name for name in inner_imports(ast.parse(path.read_text())) if name.startswith("redrafter")]
    assert [name for name in found if not name.startswith(OPTIONAL)] == []
