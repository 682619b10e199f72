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


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_update_writes_each_row_at_its_own_slots(seed, batch, queries, mapped, only_new):
    """Also into other rows of the cache, and where attention sees the new states alone."""
    generator = torch.Generator().manual_seed(seed)
    cache = SlotCache(SHAPES, batch=batch + 2, slots=9)
    expected = [[torch.zeros(batch + 2, s.heads, 9, size) for size in (s.key_size, s.value_size)] for s in SHAPES]
    for _ in range(2):
        start = torch.randint(0, 9 - queries + 1, (batch,), generator=generator)
        rows = torch.randperm(batch + 2, generator=generator)[:batch] if mapped else None
        cache.window.slots = start[:, None] + torch.arange(queries)
        cache.window.visible, cache.window.rows, cache.window.only_new = 8, rows, only_new
        for index, shape in enumerate(SHAPES):
            new = [
                torch.randn(batch, shape.heads, queries, size, generator=generator)
                for size in (shape.key_size, shape.value_size)
            ]
            seen = cache.update(*new, index)
            for buffer, states, given_back in zip(expected[index], new, seen, strict=True):
                for row in range(batch):
                    for query in range(queries):
                        buffer[row if rows is None else rows[row], :, start[row] + query] = states[row, :, query]
                assert torch.equal(given_back, states if only_new else buffer[:, :, :8])
    for pool, layers in zip(cache.pools[:2], zip(expected[0], expected[2], strict=True), strict=True):
        assert torch.equal(pool[0], layers[0])
        assert torch.equal(pool[1], layers[1])


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


def numbered(**sizes: int) -> SlotCache:
    """A cache in which every entry is another number."""
    cache = SlotCache(SHAPES, **sizes)
    for pool in cache.pools:
        pool.copy_(torch.arange(1.0, pool.numel() + 1).view(pool.shape))
    return cache


def test_a_row_is_copied_and_the_others_are_left():
    cache, before = numbered(batch=4, slots=6), numbered(batch=4, slots=6)
    cache.copy_row(3, 1, 4)
    for pool, old in zip(cache.pools, before.pools, strict=True):
        assert torch.equal(pool[:, 1, :, :4], old[:, 3, :, :4])
        assert torch.equal(pool[:, 1, :, 4:], old[:, 1, :, 4:])
        assert torch.equal(pool[:, [0, 2, 3]], old[:, [0, 2, 3]])


def test_a_view_shares_the_memory_of_its_rows_and_has_its_own_window():
    cache = numbered(batch=4, slots=6)
    view = cache.view(slice(1, 3))
    assert (view.batch, view.slots, view.row_bytes) == (2, 6, cache.row_bytes)
    cache.window.visible, view.window.visible = 5, 3
    view.window.slots = torch.tensor([[0], [2]])
    keys, values = torch.full((2, 2, 1, 4), -1.0), torch.full((2, 2, 1, 4), -2.0)
    seen, _ = view.update(keys, values, 2)  # the third layer is the second of its kind
    assert torch.equal(seen, cache.pools[0][1, 1:3, :, :3])
    for pool, value in zip(cache.pools, (-1, -2), strict=False):
        assert (pool[1, 1, :, 0] == value).all()
        assert (pool[1, 2, :, 2] == value).all()
        assert int((pool < 0).sum()) == 2 * 2 * 4
    view.keep(torch.tensor([[0, 2], [0, 2]]), torch.tensor([1, 3]))
    for pool, old in zip(cache.pools[2:], numbered(batch=4, slots=6).pools[2:], strict=True):
        assert torch.equal(pool[:, 1, :, 2], old[:, 1, :, 3])
        assert torch.equal(pool[:, 2, :, 4], old[:, 2, :, 5])
        assert torch.equal(pool[:, [0, 3]], old[:, [0, 3]])


def test_rows_are_copied_as_often_as_they_are_named():
    cache = numbered(batch=3, slots=4)
    taken = cache.of_rows(torch.tensor([2, 0, 2, 2]))
    assert taken.slots == 4
    for pool, source in zip(taken.pools, cache.pools, strict=True):
        assert torch.equal(pool, source[:, [2, 0, 2, 2]])
    assert taken.row_bytes == cache.row_bytes == sum(layer.nbytes // 3 for layer in cache.pools)
    taken.pools[0].zero_()
    assert cache.pools[0].all()
