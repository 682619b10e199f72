"""Which slots of a runner are free, and which free slot a row gets.

Rows are kept in the first slots, because a step computes all slots up to the last one in use.  With prefixes, a row
takes a slot that holds the beginning of its prompt, or has it copied.  Does not know when rows finish.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from redrafter.decoding.state import Row
from redrafter.engine.prefixes import Prefixes
from redrafter.engine.runner import Runner


class Slots:
    """The slots of a runner."""

    def __init__(self, runner: Runner, count: int, *, prefixes: bool):
        """Uses the first `count` slots."""
        self._runner = runner
        self.free: list[int] = [*range(count)]
        """Free slots, as a heap."""
        self.prefixes = Prefixes(1 + runner.state.context.shape[1], runner.lag) if prefixes else None
        """Texts that are in the cache; None if they are not used again."""
        self._ended: dict[int, int] = {}  # free slots that the device still decodes, with the positions that they keep

    def take(self, row: Row, occupied: Iterable[int]) -> tuple[int, int]:
        """Takes a free slot for a row; returns it, and how many tokens of the prompt it holds already.

        `occupied` are the slots in use.
        """
        if self.prefixes is None:
            slot, found = heapq.heappop(self.free), 0
        else:
            slot, found = self._with_prefix(self.prefixes, row, occupied)
        self._ended.pop(slot, None)
        return slot, found

    def _with_prefix(self, prefixes: Prefixes, row: Row, occupied: Iterable[int]) -> tuple[int, int]:
        source, found = prefixes.find(row.prompt)
        count = self._runner.rounded(1 + max([*occupied, self.free[0]]))
        near = [slot for slot in self.free if slot < count]
        slot = source if source in near else prefixes.emptiest(near)
        self.free.remove(slot)
        heapq.heapify(self.free)
        continued = source == slot and found >= prefixes.length(slot) - self._runner.lag
        if prefixes.holds(slot) and not continued and self.free:
            spare = prefixes.emptiest(self.free)
            if not prefixes.holds(spare):  # the text that the row would overwrite is kept elsewhere
                self._ended[spare] = prefixes.length(slot)
                self._runner.state.copy(slot, spare, self._ended[spare])
                prefixes.move(slot, spare)
        if source not in (slot, -1):
            self._runner.state.copy(source, slot, found)
        prefixes.put(slot, row.prompt[:found])
        return slot, found

    def holds(self, slot: int, text: Sequence[int]) -> None:
        """A slot in use holds the keys and values of a text."""
        if self.prefixes is not None:
            self.prefixes.put(slot, text)

    def release(self, slot: int, text: Sequence[int]) -> None:
        """Frees a slot that holds the keys and values of a text."""
        heapq.heappush(self.free, slot)
        self._ended[slot] = max(1, len(text)) if self.prefixes is not None else 1
        self.holds(slot, text)

    def end(self) -> None:
        """Tells the device which slots are free."""
        if self._ended:
            self._runner.state.end(self._ended)
            self._ended = {}

    def move(self, source: int, used: int) -> int:
        """Moves a row, whose cache uses `used` positions, to the first free slot, which is returned."""
        target: int = heapq.heapreplace(self.free, source)
        self._runner.state.move(source, target, used)
        self._ended.pop(target, None)
        if self.prefixes is not None:
            self.prefixes.move(source, target)
        return target
