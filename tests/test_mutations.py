"""Every expression that `mutations.py` breaks stands in the sources, once; the script itself takes minutes."""

from __future__ import annotations

import pytest

from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_broken_is_there(mutation):
    name, old, new = MUTATIONS[mutation]
    text = (ROOT / "src" / "redrafter" / name).read_text()
    assert text.count(old) == 1
    compile(text.replace(old, new), name, "exec")
