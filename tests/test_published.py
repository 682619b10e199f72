"""Drafters of public models in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redrafter.proposers.loading import load_head
from redrafter.utils.hub import count_parameters

DRAFTERS = Path(__file__).parent.parent / "drafters"


@pytest.mark.skipif(not DRAFTERS.is_dir(), reason="only a checkout contains drafters")
@pytest.mark.parametrize("folder", sorted(DRAFTERS.glob("*/")), ids=lambda folder: folder.name)
def test_a_drafter_loads_and_its_card_describes_it(folder):
    head = load_head(folder)
    card = (folder / "README.md").read_text()
    assert head.config.target
    assert f"base_model: {head.config.target}\n" in card
    assert re.search(r"^license: \S+$", card, re.MULTILINE)
    assert f"| parameters | {count_parameters(head):,} |" in card
