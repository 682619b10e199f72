"""The package as a whole: what it exports, what it costs to import."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import redrafter
from checked_imports import checked
from redrafter.core.tree import prefix_tree


def test_every_public_name_is_there():
    for name in redrafter.__all__:
        assert getattr(redrafter, name) is not None
    assert set(redrafter.__all__) == set(dir(redrafter))
    assert redrafter.__version__ == version("redrafter")


def test_the_docs_show_every_public_name():
    page = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: redrafter\.(\w+)$", page, re.MULTILINE)
    assert {*shown, "__version__"} == set(redrafter.__all__)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(redrafter, "nothing")


def test_neither_the_package_nor_the_command_line_loads_torch_before_it_is_needed():
    program = "import sys, redrafter, redrafter.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tests_check_shapes_at_every_call():
    violation = (jaxtyping.TypeCheckError, beartype.roar.BeartypeCallHintViolation)
    with pytest.raises(violation, match="prefix_tree"):
        prefix_tree(torch.zeros(2, dtype=torch.long), torch.zeros((3, 4, 2), dtype=torch.long))
    with pytest.raises(violation, match="prefix_tree"):
        prefix_tree(torch.zeros(2), torch.zeros((2, 4, 2), dtype=torch.long))
    with pytest.raises(violation, match="nested"):
        nested(torch.zeros(2))


def nested(argument):
    @checked
    def inner(matrix: Float[Tensor, "rows columns"]) -> None: ...

    inner(argument)
