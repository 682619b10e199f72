"""With `fast=False` no Triton kernel is launched.

Runs on a GPU (`-m gpu`) and, started once more by test_interpreted.py, under Triton's interpreter.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interpreting import on_kernels

from conftest import tiny_model
from redrafter import EagleHead, MedusaHeads, RecurrentDrafter, TwoModel, generate
from redrafter.core.shapes import DraftShape
from redrafter.kernels import has_kernels, kernels_enabled
from redrafter.targets.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
SHAPES = {
    "beams": DraftShape(beam_width=2, beam_length=2),
    "budget": DraftShape(beam_width=2, beam_length=2, node_budget=4),
}


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    from triton.runtime import jit

    names, launch = [], jit.KernelInterface.__getitem__

    def recorded(kernel, grid):
        names.append(kernel.fn.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", recorded)
    return names


@on_kernels
@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        ("none", None, {"_kv_write", "_attend", "_walk"}),
        ("recurrent", "beams", {"_best_of_row", "_extend_beams", "_prefix_tree", "_moved", "_silu_add"}),
        ("recurrent", "budget", {"_most_probable"}),
        ("eagle", "beams", {"_attend", "_kv_write"}),
        ("medusa", "budget", {"_best_of_row"}),
        ("two models", "beams", {"_prefix_tree"}),
    ],
)
def test_without_fast_no_kernel_is_launched(method, shape, expected, device, launches):
    model = tiny_model().to(device)
    drafter = {
        "none": lambda: None,
        "recurrent": lambda: RecurrentDrafter.for_target(model),
        "eagle": lambda: EagleHead.fresh(model),
        "medusa": lambda: MedusaHeads.fresh(model, heads=2),
        "two models": lambda: TwoModel(model),
    }[method]
    has_kernels(torch.device(device))  # runs a kernel once per process
    with kernels_enabled(False):
        drafter = drafter()
    launches.clear()
    settings = {"max_new_tokens": 4} | ({} if shape is None else {"shape": SHAPES[shape]})
    plain = generate(model, drafter, [[5, 9, 12]], fast=False, **settings)
    assert launches == []
    assert generate(model, drafter, [[5, 9, 12]], **settings).new_tokens == plain.new_tokens
    assert expected <= set(launches)
    assert Target(model).tree_kernels, "the first call did not decide about kernels for the later ones"


@on_kernels
def test_kernels_are_disabled_in_this_thread_only(device):
    device = torch.device(device)
    with kernels_enabled(False), ThreadPoolExecutor(1) as pool:
        assert not has_kernels(device)
        assert pool.submit(has_kernels, device).result()
    assert has_kernels(device)
