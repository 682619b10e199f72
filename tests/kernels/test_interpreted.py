"""The kernels' tests once more, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_under_the_interpreter():
    pytest.importorskip("triton")
    told = os.environ | {"TRITON_INTERPRET": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        told.pop(name, None)
    files = [
        str(Path(__file__).with_name(f"test_{name}.py"))
        for name in ("attention", "drafting", "kv_write", "walk", "disabled")
    ]
    words = ["-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "not gpu", *files]
    run = subprocess.run([sys.executable, *words], env=told, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
