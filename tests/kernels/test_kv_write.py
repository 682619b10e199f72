"""The kernel that writes keys and values writes what a scatter does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_cpu, on_kernels

from redrafter.kernels.kv_write import kv_write, scatter


def case(
    device: str, *, batch: int, heads: int, positions: int, sizes: tuple[int, int], mapped=False, dtype=torch.float32
):
    """Buffers of 12 slots that are views of a pool, and states that are transposed views, as models hand them over."""
    generator = torch.Generator().manual_seed(positions)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    buffers = [random(2, batch + 2, heads, 12, size)[1] for size in sizes]
    rows = torch.randperm(batch + 2, generator=generator)[:batch].to(device) if mapped else None
    states = [random(batch, positions, heads, size).transpose(1, 2) for size in sizes]
    slots = torch.stack([torch.randperm(12, generator=generator)[:positions] for _ in range(batch)]).to(device)
    return (*buffers, slots, rows, *states)


@on_kernels
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "positions", "sizes"), [(1, 1, 1, (8, 8)), (2, 3, 9, (16, 8)), (3, 2, 4, (20, 40))]
)
def test_as_a_scatter(device, batch, heads, positions, sizes, mapped):
    keys, values, *told = case(device, batch=batch, heads=heads, positions=positions, sizes=sizes, mapped=mapped)
    expected = keys.clone(), values.clone()
    scatter(*expected, *told)
    kv_write(keys, values, *told)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@on_cpu
@pytest.mark.parametrize("mapped", [False, True])
def test_a_scatter_writes_each_state_to_its_slot(mapped):
    """Of its own row, or of the row that is named."""
    keys, values, slots, rows, key, value = case("cpu", batch=2, heads=3, positions=4, sizes=(8, 5), mapped=mapped)
    before = keys.clone(), values.clone()
    scatter(keys, values, slots, rows, key, value)
    for buffer, old, states in ((keys, before[0], key), (values, before[1], value)):
        for row in range(2):
            for position in range(4):
                old[row if rows is None else rows[row], :, slots[row, position]] = states[row, :, position]
        assert torch.equal(buffer, old)


@on_cpu
def test_torch_compile_does_not_copy_the_cache():
    keys, values, slots, rows, key, value = case("cpu", batch=2, heads=3, positions=4, sizes=(8, 8))
    expected = keys.clone(), values.clone()
    scatter(*expected, slots, rows, key, value)
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def write(keys, values, key, value):
        kv_write(keys, values, slots, rows, key, value)
        return keys[:, :, :6]

    got = torch.compile(write, backend=backend, fullgraph=True)(keys, values, key, value)
    assert torch.ops.redrafter.kv_write.default in seen
    assert got.data_ptr() == keys.data_ptr()
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
