"""Keys and values in slots, behind the `Cache` protocol of transformers.

Guarantees that every row has its own length, that a slot is a position, and that memory is allocated once.  Differences
between versions of transformers' cache are handled here.  Does not know trees; callers pass the slots to write or move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from redrafter.kernels import has_kernels
from redrafter.kernels.kv_write import kv_write, scatter


@dataclass(frozen=True)
class LayerShape:
    """Cached tensors of one layer: number of heads, sizes of a key and a value, dtype and device."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass
class Window:
    """What the next update of all layers reads and writes."""

    slots: Int[Tensor, "B Q"]
    """Destination of the new keys and values."""
    visible: int | None
    """Number of leading slots that attention sees; None for all, if attention knows each row's length."""
    rows: Int[Tensor, " B"] | None = None
    """The cache's rows that receive them; None for the first B rows in order."""
    only_new: bool = False
    """Whether attention sees the new states alone, because the texts begin with them."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache.  Models call `update` without positions; the shared window provides the slots."""

    def __init__(self, window: Window, keys: Tensor, values: Tensor):
        super().__init__()
        self.window, self.keys, self.values, self.is_initialized = window, keys, values, True
        self._write = kv_write if has_kernels(keys.device, keys.dtype) else scatter

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new states [B, heads, Q, size] at the window's slots; returns what attention sees."""
        window, device = self.window, self.keys.device
        rows = None if window.rows is None else window.rows.to(device)
        self._write(self.keys, self.values, window.slots.to(device), rows, key_states, value_states)
        if window.only_new:
            return key_states, value_states
        if window.visible is None:
            return self.keys, self.values
        return self.keys[:, :, : window.visible], self.values[:, :, : window.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible slots and no offset.  Used by models that make or ignore the mask."""
        if self.window.only_new:
            return query_length if isinstance(query_length, int) else len(query_length), 0
        return self.window.visible or self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Always 0: rows have different lengths, and positions are passed explicitly."""
        return 0

    def get_max_length(self) -> int:
        """The number of slots."""
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No effect: the cache has allocated the memory."""


class OneLayer(Cache):  # type: ignore[misc]
    """A cache with one layer, whatever index it is called with, so that compiled code serves every layer."""

    def __init__(self, layer: SlotLayer):
        super().__init__(layers=[layer])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `SlotLayer.update`."""
        return self.layers[0].update(key_states, value_states)  # type: ignore[no-any-return]


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers, with one tensor [layers, B, heads, S, size] for layers of equal shape.

    Layers hold no reference to the cache, so that its memory is released immediately.
    """

    def __init__(self, shapes: list[LayerShape], *, batch: int, slots: int):
        pools = []
        for shape in dict.fromkeys(shapes):
            layers = sum(other == shape for other in shapes)
            for size in (shape.key_size, shape.value_size):
                sizes = (layers, batch, shape.heads, slots, size)
                pools.append(torch.zeros(sizes, dtype=shape.dtype, device=shape.device))
        self._share(shapes, pools)

    def _share(self, shapes: list[LayerShape], pools: list[Tensor]) -> None:
        """Makes a cache of pools: a pair of keys and values [layers, B, heads, S, size] for each shape of layer."""
        self.shapes, self.pools = shapes, pools
        self.batch, self.slots = pools[0].shape[1], pools[0].shape[3]
        self.window = Window(torch.zeros((self.batch, 0), dtype=torch.long), self.slots)
        layers: dict[int, SlotLayer] = {}
        for shape, keys, values in zip(dict.fromkeys(shapes), pools[::2], pools[1::2], strict=True):
            members = [i for i, other in enumerate(shapes) if other == shape]
            layers |= {member: SlotLayer(self.window, keys[i], values[i]) for i, member in enumerate(members)}
        super().__init__(layers=[layers[i] for i in range(len(shapes))])
        self.per_layer = [OneLayer(layer) for layer in self.layers]
        """A cache for each layer alone."""

    def view(self, rows: slice) -> SlotCache:
        """A cache of some of the rows, which shares their memory and has its own window."""
        cache = object.__new__(SlotCache)
        cache._share(self.shapes, [pool[:, rows] for pool in self.pools])
        return cache

    @property
    def visible(self) -> int:
        """Slots that attention sees in the next update."""
        return self.window.visible or self.slots

    def keep(self, path: Int[Tensor, "B K"], length: Int[Tensor, " B"]) -> None:
        """Moves the nodes `path`, at slots `length + path`, to slots `length … length + K - 1`."""
        for pool in self.pools:
            source = (length[:, None] + path).to(pool.device)
            target = (length[:, None] + torch.arange(path.shape[1], device=length.device)).to(pool.device)
            layers, _, heads, _, size = pool.shape
            shape = (layers, -1, heads, -1, size)
            moved = pool.gather(3, source[None, :, None, :, None].expand(shape))
            pool.scatter_(3, target[None, :, None, :, None].expand(shape), moved)

    def copy_row(self, source: int, target: int, slots: int) -> None:
        """Copies the first `slots` slots of a row to another row."""
        for pool in self.pools:
            pool[:, target, :, :slots] = pool[:, source, :, :slots]

    def of_rows(self, rows: Int[Tensor, " R"]) -> SlotCache:
        """A new cache with copies of the given rows, which may repeat."""
        copies = SlotCache(self.shapes, batch=len(rows), slots=self.slots)
        for pool, source in zip(copies.pools, self.pools, strict=True):
            pool.copy_(source[:, rows.to(source.device)])
        return copies

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return sum(pool.nbytes for pool in self.pools) // self.batch
