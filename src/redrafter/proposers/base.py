"""What a drafting method must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from redrafter.sampling import Draw
from redrafter.tree import DraftTree


@runtime_checkable
class Proposer(Protocol):
    """Proposes trees of a fixed shape.  Decoding is exact whatever they hold."""

    @property
    def length(self) -> int:
        """L, the most drafted tokens on one path; the guaranteed token is not counted."""
        ...

    @property
    def size(self) -> int:
        """N, nodes of every tree, counting the root."""
        ...

    @property
    def positions(self) -> int:
        """Last positions whose hidden states a draft is made from."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Whose layers a draft runs, the target's aside."""
        ...

    def propose(self, context: Tensor, root: Tensor, draw: Draw) -> DraftTree:
        """Trees [B, N] below the guaranteed tokens `root` [B]; `context` [B, positions x state]: what the target
        knows at the last positions, the last of which is where it chose them.

        `draw` is how the target will choose after nodes of depth 0 to L; a proposer may use it, or not.
        """
        ...
