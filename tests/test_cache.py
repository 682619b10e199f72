"""The slot cache against lists of slots written one by one."""

from __future__ import annotations

import gc
import weakref

import torch
from hypothesis import given
from hypothesis import strategies as st

from redrafter.core.cache import LayerShape, SlotCache

CPU = torch.device("cpu")
SHAPES = [  # two kinds of layers, mixed; keys and values differ in width, as in latent attention
    LayerShape(2, 4, 4, torch.float32, CPU),
    LayerShape(1, 6, 3, torch.float32, CPU),
    LayerShape(2, 4, 4, torch.float32, CPU),
]


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5))
def test_update_writes_each_row_at_its_own_slots(seed, batch, queries):
    generator = torch.Generator().manual_seed(seed)
    cache = SlotCache(SHAPES, batch=batch, slots=9)
    expected = [[torch.zeros(batch, s.heads, 9, size) for size in (s.key_size, s.value_size)] for s in SHAPES]
    for _ in range(2):
        start = torch.randint(0, 9 - queries + 1, (batch,), generator=generator)
        cache.window.slots = start[:, None] + torch.arange(queries)
        cache.window.visible = 8
        for index, shape in enumerate(SHAPES):
            new = [
                torch.randn(batch, shape.heads, queries, size, generator=generator)
                for size in (shape.key_size, shape.value_size)
            ]
            seen = cache.update(*new, index)
            for buffer, states, given_back in zip(expected[index], new, seen, strict=True):
                for row in range(batch):
                    for query in range(queries):
                        buffer[row, :, start[row] + query] = states[row, :, query]
                assert torch.equal(given_back, buffer[:, :, :8])


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 3))
def test_keep_moves_the_path_and_nothing_else_that_counts(seed, batch, length):
    generator = torch.Generator().manual_seed(seed)
    size = 1 + 2 * length
    cache = SlotCache(SHAPES, batch=batch, slots=12)
    for pool in cache.pools:
        pool.copy_(torch.randn(pool.shape, generator=generator))
    before = [pool.clone() for pool in cache.pools]
    committed = torch.randint(0, 12 - size + 1, (batch,), generator=generator)
    path = torch.stack(  # node numbers grow along a path
        [
            torch.cat((torch.zeros(1).long(), torch.randperm(size - 1, generator=generator)[:length].sort().values + 1))
            for _ in range(batch)
        ]
    )
    cache.keep(path, committed)
    for pool, old in zip(cache.pools, before, strict=True):
        for row in range(batch):
            start = int(committed[row])
            assert torch.equal(pool[:, row, :, :start], old[:, row, :, :start])
            for place, node in enumerate(path[row].tolist()):
                assert torch.equal(pool[:, row, :, start + place], old[:, row, :, start + node])


def test_layers_of_one_kind_share_one_tensor():
    cache = SlotCache(SHAPES, batch=2, slots=5)
    assert [tuple(pool.shape) for pool in cache.pools] == [
        (2, 2, 2, 5, 4), (2, 2, 2, 5, 4), (1, 2, 1, 5, 6), (1, 2, 1, 5, 3),
    ]  # fmt: skip
    cache.layers[2].keys.fill_(7)
    assert (cache.pools[0][1] == 7).all()
    assert (cache.pools[0][0] == 0).all()


def test_memory_is_free_as_soon_as_the_cache_is_dropped():
    gc.disable()
    try:
        cache = SlotCache(SHAPES, batch=1, slots=4)
        alive = weakref.ref(cache)
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_rows_of_another_cache_are_adopted_and_the_others_are_left():
    cache, other = SlotCache(SHAPES, batch=4, slots=6), SlotCache(SHAPES, batch=2, slots=3)
    for pool in other.pools:
        pool.copy_(torch.arange(1.0, pool.numel() + 1).view(pool.shape))
    cache.insert_rows([3, 1], other)
    for pool, source in zip(cache.pools, other.pools, strict=True):
        assert torch.equal(pool[:, 3, :, :3], source[:, 0])
        assert torch.equal(pool[:, 1, :, :3], source[:, 1])
        assert not pool[:, [0, 2]].any()
        assert not pool[..., 3:, :].any()


def test_rows_are_copied_as_often_as_they_are_named():
    cache = SlotCache(SHAPES, batch=3, slots=4)
    for pool in cache.pools:
        pool.copy_(torch.arange(1.0, pool.numel() + 1).view(pool.shape))
    taken = cache.of_rows(torch.tensor([2, 0, 2, 2]))
    assert taken.slots == 4
    for pool, source in zip(taken.pools, cache.pools, strict=True):
        assert torch.equal(pool, source[:, [2, 0, 2, 2]])
    assert taken.row_bytes == cache.row_bytes == sum(layer.nbytes // 3 for layer in cache.pools)
    taken.pools[0].zero_()
    assert cache.pools[0].all()
