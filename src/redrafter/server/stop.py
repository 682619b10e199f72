"""Cuts text at stop strings.

Guarantees that the text before the first complete stop string is returned, whatever pieces the text arrives in, and
that nothing is returned early that may turn out to be the beginning of a stop string.  Does not know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Passes on text up to the stop string that is completed first; of several, the longest."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = stops
        self.found = False
        """Whether the text contained a stop string."""
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown now; none after a stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        kept = self._possible_beginning()
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """The text that was held back, when no more text follows."""
        rest, self._held = "" if self.found else self._held, ""
        return rest

    def _possible_beginning(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0
