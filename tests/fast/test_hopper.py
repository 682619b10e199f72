"""The kernels compile for a GPU, by a compiler that needs none: the interpreter lets pass what hardware does not do."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

from redrafter.kernels.triton import attention, drafting, product  # noqa: E402
from redrafter.kernels.triton import kv_write as store

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
    mask = torch.zeros(1, 1, nodes, 2 + -(-nodes // 32), dtype=torch.long)
    attention.launch(query, key, key, mask, 0.1, *told, torch.randn(8))
    assert compiled[0] == "_attend"


def test_what_is_written_to_the_cache(compiled):
    keys, new = torch.randn(2, 4, 64, 128, dtype=torch.bfloat16), torch.randn(2, 4, 5, 128, dtype=torch.bfloat16)
    store.launch(keys, keys.clone(), torch.zeros(2, 5, dtype=torch.long), new, new)
    assert compiled == ["_store"]


def test_drafting(compiled):
    drafting.top(torch.randn(100, 8192, dtype=torch.bfloat16), 50)
    best = torch.randn(100, 50), torch.zeros(100, 50, dtype=torch.long), torch.randn(100)
    drafting.grow(*best, torch.arange(90), BEAMS[..., None], torch.randn(2, 50), BEAMS)
    drafting.prefix_tree(torch.zeros(2, dtype=torch.long), torch.zeros(2, 10, 4, dtype=torch.long))
    levels = torch.zeros(2, 310, dtype=torch.long), torch.zeros(2, 310, dtype=torch.long), torch.randn(2, 310)
    drafting.most_probable(torch.zeros(2, dtype=torch.long), levels, 10, 100, 4, 32)
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    drafting.moved(x[0], BEAMS[0], BEAMS, BEAMS, x, x[:, :1])
    drafting.activated(x, None, x)
    wanted = ["_best_of_chunk", "_best_of_row", "_grow", "_fold", "_most_probable", "_moved", "_activated"]
    assert compiled == wanted


@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    [(1, 2304, 768), (1, 12_288, 4096), (10, 2304, 768), (10, 4096, 11_008), (10, 1536, 70), (32, 32_000, 4096)],
)
def test_products_of_16_bits(rows, columns, inner, compiled):
    weight = torch.empty(columns, inner, dtype=torch.bfloat16)
    x, onto = weight.new_empty(1, rows, inner), weight.new_empty(1, rows, columns - 768)
    product.product(x, weight, onto[:, :1], onto=onto, silu=True, begin=768)
    product.product(x.half(), weight.half())
    assert compiled == ["_product", "_product"]


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (16, torch.float16), (50, torch.bfloat16), (1, torch.float32)], ids=str
)
def test_products_of_8_bits(rows, dtype, compiled):
    weight, scale = torch.empty(1536, 768, dtype=torch.int8), torch.empty(1536)
    x = torch.empty(rows, 768, dtype=dtype)
    product.product(x, weight, scale.to(dtype), scale=scale, onto=x.new_empty(rows, 1536), silu=True)
    assert compiled == ["_product"]
