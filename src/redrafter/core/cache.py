"""Keys and values in per-row slots, behind the Hugging Face `Cache` protocol.

Promises: every row has its own length, a slot is a position, memory is allocated once.  All that differs between
versions of transformers' cache lives here.  Does not know trees: it is told which slots to write and which to move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from redrafter.kernels import has_kernels
from redrafter.kernels.kv_write import scatter, store


@dataclass(frozen=True)
class LayerShape:
    """What one layer of the target keeps: heads, sizes of a key and of a value, dtype and device."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Window:
    """What the layers' next update reads and writes; shared by all of them."""

    slots: Int[Tensor, "B Q"]
    """Where the new keys and values go."""
    visible: int | None
    """Slots that attention sees, from the first; None is all, for attention that knows each row's length."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of the cache; models call `update` without positions, so the shared window tells the slots."""

    def __init__(self, window: Window, keys: Tensor, values: Tensor):
        super().__init__()
        self.window, self.keys, self.values, self.is_initialized = window, keys, values, True
        self.quick = has_kernels(keys.device, keys.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new states [B, heads, Q, size] at the window's slots; returns all visible slots."""
        slots = self.window.slots.to(self.keys.device)
        write = store if self.quick else scatter
        write(self.keys, self.values, slots, key_states, value_states)
        if self.window.visible is None:
            return self.keys, self.values
        visible = self.window.visible
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible slots, no offset.  Only consulted where a model ignores the mask it is given."""
        return self.window.visible or self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Always 0: rows differ, and positions are always passed."""
        return 0

    def get_max_length(self) -> int:
        """All slots."""
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: allocated by the cache."""


class OneLayer(Cache):  # type: ignore[misc]
    """A cache as one layer of the model sees it: no index is asked for, so compiled code serves every layer."""

    def __init__(self, layer: SlotLayer):
        super().__init__(layers=[layer])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As its layer's."""
        return self.layers[0].update(key_states, value_states)  # type: ignore[no-any-return]


class SlotCache(Cache):  # type: ignore[misc]
    """All layers' keys and values, each kind of layer in one tensor [layers, B, heads, S, size].

    Layers do not know the cache, so that its memory is free the moment it is dropped.
    """

    def __init__(self, shapes: list[LayerShape], *, batch: int, slots: int):
        self.window = Window(torch.zeros((batch, 0), dtype=torch.long), slots)
        self.shapes, self.batch, self.slots = shapes, batch, slots
        self.pools: list[Tensor] = []
        layers: dict[int, SlotLayer] = {}
        for shape in dict.fromkeys(shapes):
            members = [i for i, other in enumerate(shapes) if other == shape]
            keys, values = (
                torch.zeros((len(members), batch, shape.heads, slots, size), dtype=shape.dtype, device=shape.device)
                for size in (shape.key_size, shape.value_size)
            )
            self.pools += [keys, values]
            layers |= {member: SlotLayer(self.window, keys[i], values[i]) for i, member in enumerate(members)}
        super().__init__(layers=[layers[i] for i in range(len(shapes))])
        self.alone = [OneLayer(layer) for layer in self.layers]
        """Each layer's own view."""

    @property
    def visible(self) -> int:
        """Slots that the next update hands to attention."""
        return self.window.visible or self.slots

    def keep(self, path: Int[Tensor, "B K"], length: Int[Tensor, " B"]) -> None:
        """Moves the tree nodes `path`, which sit at slots `length + path`, to slots `length … length + K - 1`."""
        for pool in self.pools:
            source = (length[:, None] + path).to(pool.device)
            target = (length[:, None] + torch.arange(path.shape[1], device=length.device)).to(pool.device)
            layers, _, heads, _, size = pool.shape
            shape = (layers, -1, heads, -1, size)
            moved = pool.gather(3, source[None, :, None, :, None].expand(shape))
            pool.scatter_(3, target[None, :, None, :, None].expand(shape), moved)

    def insert_rows(self, rows: list[int], other: SlotCache) -> None:
        """Takes over another cache's rows, as many of their slots as fit, as the given rows of this one."""
        fit = min(self.slots, other.slots)
        for pool, source in zip(self.pools, other.pools, strict=True):
            pool[:, rows, :, :fit] = source[..., :fit, :]

    def of_rows(self, rows: Int[Tensor, " R"]) -> SlotCache:
        """Another cache that holds the given rows of this one, a row as often as it is named."""
        taken = SlotCache(self.shapes, batch=len(rows), slots=self.slots)
        for pool, source in zip(taken.pools, self.pools, strict=True):
            pool.copy_(source[:, rows.to(source.device)])
        return taken

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(pool.nbytes for pool in self.pools) // self.batch
