"""Texts whose keys and values are in the cache, so that a prompt with the same beginning need not be read again.

Every slot keeps the text that was decoded in it until another row overwrites it.  Does not know tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

LEAST = 32
"""Tokens of the shortest beginning that is used again."""


@dataclass(frozen=True)
class _Text:
    head: list[int]
    """The first LEAST tokens."""
    tokens: np.ndarray
    freed: int
    """When the text was decoded, for texts of free slots."""


@dataclass
class Prefixes:
    """The texts by slot."""

    margin: int
    """Tokens at the end of a prompt that must be read anyway."""
    loss: int = 0
    """Tokens at the end of a text that a proposer's memory may lack."""
    queries: int = 0
    """Prompt tokens that were looked up."""
    hits: int = 0
    """Prompt tokens that were found."""
    _texts: dict[int, _Text] = field(default_factory=dict)
    _clock: count[int] = field(default_factory=count)

    def put(self, slot: int, text: Sequence[int]) -> None:
        """The slot holds the keys and values of this text."""
        if len(text) < LEAST:
            self._texts.pop(slot, None)
        else:
            self._texts[slot] = _Text([*text[:LEAST]], np.array(text), next(self._clock))

    def move(self, source: int, target: int) -> None:
        """The text of a slot is now in another slot, and no longer in the first."""
        if source in self._texts:
            self._texts[target] = self._texts.pop(source)

    def find(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot whose text shares the longest beginning with a prompt, and how many tokens can be used; (-1, 0) for
        none."""
        self.queries += len(prompt)
        most, head, tokens = len(prompt) - self.margin, [*prompt[:LEAST]], np.array(prompt)
        best = (0, -1)
        for slot, text in self._texts.items():
            if text.head == head:
                size = min(len(tokens), len(text.tokens) - self.loss)
                differs = np.flatnonzero(tokens[:size] != text.tokens[:size])
                best = max(best, (min(int(differs[0]) if len(differs) else size, most), slot))
        if best[0] < LEAST:
            return -1, 0
        self.hits += best[0]
        return best[1], best[0]

    def emptiest(self, slots: Collection[int]) -> int:
        """The slot without a text, or else with the oldest one; of several, the first."""
        return min(slots, key=lambda slot: (self._texts[slot].freed if slot in self._texts else -1, slot))

    def holds(self, slot: int) -> bool:
        """Whether the slot holds a text."""
        return slot in self._texts

    def length(self, slot: int) -> int:
        """The number of tokens of a slot's text."""
        return len(self._texts[slot].tokens)
