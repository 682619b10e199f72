"""Which drafted tokens the target would have written itself.

Acceptance is exact for any tree: every emitted token is the target's own choice, and a drafted token is kept only where
it equals that choice.  Does not know how the choices were made.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from redrafter.tree import DraftTree


def walk(
    tree: DraftTree, choice: Int[Tensor, "B N"], *, length: int
) -> tuple[Int[Tensor, "B path"], Int[Tensor, " B"]]:
    """From the root, descend while the target's choice is a child.

    `choice[b, n]` is the token the target writes after node n; `length` bounds the depth of the trees.  Returns the
    nodes of the accepted path by depth (`path = length + 1`; entry 0 is the root, entries past the path's end are 0)
    and the number of drafted tokens accepted.

    Siblings differ, so at most one node of each depth matches all the way up.
    """
    matches = tree.tokens == choice.gather(1, tree.parents)
    matches[:, 0] = True
    accepted = (matches[:, None] | ~tree.ancestors).all(dim=2) & tree.valid
    nodes = torch.arange(tree.size, device=choice.device).expand_as(choice)
    place = torch.where(accepted, tree.depth, length + 1)
    path = choice.new_zeros((choice.shape[0], length + 2)).scatter_(1, place, nodes)[:, : length + 1]
    return path, accepted.sum(dim=1) - 1
