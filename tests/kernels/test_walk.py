"""The kernel that walks trees against the plain walk; on a GPU, or under Triton's interpreter (test_interpreted.py)."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_kernels

from conftest import random_tree
from redrafter.core.tree import DraftTree, prefix_tree
from redrafter.decoding import verify
from redrafter.decoding.verify import plain_walk, walk


def check(tree: DraftTree, choice: torch.Tensor, length: int, device: str, monkeypatch) -> None:
    expected = plain_walk(tree, choice, length=length)
    monkeypatch.setattr(verify, "plain_walk", None)  # must not stand in for the kernel
    moved = DraftTree(
        *(getattr(tree, name).to(device) for name in ("tokens", "parents", "depth", "valid", "ancestors"))
    )
    path, accepted = walk(moved, choice.to(device), length=length)
    assert torch.equal(path.cpu(), expected[0])
    assert torch.equal(accepted.cpu(), expected[1])


@on_kernels
@pytest.mark.parametrize("malformed", [False, True])
@pytest.mark.parametrize(("batch", "size", "length"), [(9, 1, 0), (20, 2, 1), (40, 9, 4), (40, 12, 2), (9, 100, 6)])
def test_the_kernel_agrees_on_any_tree(device, batch, size, length, malformed, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    tree = random_tree(batch, size, vocabulary=2, malformed=malformed, generator=generator)
    check(tree, torch.randint(0, 2, tree.tokens.shape, generator=generator), length, device, monkeypatch)


@on_kernels
def test_the_kernel_agrees_on_folded_beams(device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tree = prefix_tree(torch.zeros(30, dtype=torch.long), torch.randint(0, 2, (30, 5, 4), generator=generator))
    check(tree, torch.randint(0, 2, tree.tokens.shape, generator=generator), 4, device, monkeypatch)
