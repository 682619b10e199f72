"""The kernels compile for a GPU, by a compiler that needs none: the interpreter lets pass what hardware does not do."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

from redrafter.kernels.triton import attention, drafting, kv_write, verify  # noqa: E402

BEAMS = torch.zeros(2, 50, dtype=torch.long)


class Hopper:
    """What triton asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The kernels that are compiled instead of launched."""
    names: list[str] = []

    def launched(kernel, grid):
        def run(*told, **named):
            assert kernel.warmup(*told, grid=grid, **named).asm["cubin"]
            names.append(kernel.fn.__name__)

        return run

    monkeypatch.setattr(jit.KernelInterface, "__getitem__", launched)
    monkeypatch.setattr(driver, "_active", Hopper())
    return names


@pytest.mark.parametrize(
    ("dtype", "size", "nodes", "told"),
    [
        (torch.bfloat16, 128, 1, (None, None)),
        (torch.float16, 64, 64, (100, None)),
        (torch.float32, 256, 33, (None, 30.0)),
    ],
    ids=str,
)
def test_attention(dtype, size, nodes, told, compiled):
    query, key = torch.randn(1, 8, nodes, size, dtype=dtype), torch.randn(1, 4, 2048, size, dtype=dtype)
    mask = torch.zeros(1, 1, nodes, 3 + -(-nodes // 32), dtype=torch.long)
    attention.launch(query, key, key, mask, 0.1, *told, torch.randn(8))
    assert compiled[0] == "_attend"


@pytest.mark.parametrize("rows", [None, torch.zeros(2, dtype=torch.long)])
def test_what_is_written_to_the_cache(rows, compiled):
    keys, new = torch.randn(2, 4, 64, 128, dtype=torch.bfloat16), torch.randn(2, 4, 5, 128, dtype=torch.bfloat16)
    kv_write.launch(keys, keys.clone(), torch.zeros(2, 5, dtype=torch.long), rows, new, new)
    assert compiled == ["_kv_write"]


def test_drafting(compiled):
    drafting.topk(torch.randn(100, 8192, dtype=torch.bfloat16), 50)
    best = torch.randn(100, 50), torch.zeros(100, 50, dtype=torch.long), torch.randn(100)
    drafting.extend_beams(*best, torch.arange(90), BEAMS[..., None], torch.randn(2, 50), BEAMS)
    drafting.prefix_tree(torch.zeros(2, dtype=torch.long), torch.zeros(2, 10, 4, dtype=torch.long))
    levels = torch.zeros(2, 310, dtype=torch.long), torch.zeros(2, 310, dtype=torch.long), torch.randn(2, 310)
    drafting.most_probable(torch.zeros(2, dtype=torch.long), levels, 10, 100, 4, 32)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    drafting.moved(x[0], BEAMS[0], BEAMS, BEAMS, x, x[:, :1])
    drafting.silu_add(x, None, x)
    wanted = [
        "_best_of_chunk",
        "_best_of_row",
        "_extend_beams",
        "_prefix_tree",
        "_most_probable",
        "_moved",
        "_silu_add",
    ]
    assert compiled == wanted


def test_the_walk(compiled):
    numbers, flags = torch.zeros(2, 33, dtype=torch.long), torch.zeros(2, 33, 33, dtype=torch.bool)
    verify.walk(numbers, numbers, numbers, flags[:, 0], flags, numbers, 4)
    assert compiled == ["_walk"]
