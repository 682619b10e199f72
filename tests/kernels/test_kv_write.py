"""The kernel that writes keys and values writes what a scatter does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_cpu, on_kernels

from redrafter.kernels.kv_write import kv_write, scatter


def case(device: str, *, batch: int, heads: int, positions: int, sizes: tuple[int, int], dtype=torch.float32):
    """Buffers of 12 slots that are views of a pool, and states that are transposed views, as models hand them over."""
    generator = torch.Generator().manual_seed(positions)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    buffers = [random(2, batch, heads, 12, size)[1] for size in sizes]
    states = [random(batch, positions, heads, size).transpose(1, 2) for size in sizes]
    slots = torch.stack([torch.randperm(12, generator=generator)[:positions] for _ in range(batch)]).to(device)
    return (*buffers, slots, *states)


@on_kernels
@pytest.mark.parametrize(
    ("batch", "heads", "positions", "sizes"), [(1, 1, 1, (8, 8)), (2, 3, 9, (16, 8)), (3, 2, 4, (20, 40))]
)
def test_as_a_scatter(device, batch, heads, positions, sizes):
    keys, values, *told = case(device, batch=batch, heads=heads, positions=positions, sizes=sizes)
    expected = keys.clone(), values.clone()
    scatter(*expected, *told)
    kv_write(keys, values, *told)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@on_cpu
def test_torch_compile_does_not_copy_the_cache():
    keys, values, slots, key, value = case("cpu", batch=2, heads=3, positions=4, sizes=(8, 8))
    expected = keys.clone(), values.clone()
    scatter(*expected, slots, key, value)
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def write(keys, values, key, value):
        kv_write(keys, values, slots, key, value)
        return keys[:, :, :6]

    got = torch.compile(write, backend=backend, fullgraph=True)(keys, values, key, value)
    assert torch.ops.redrafter.kv_write.default in seen
    assert got.data_ptr() == keys.data_ptr()
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
