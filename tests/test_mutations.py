"""Every mutation of `mutations.py` applies to the sources; the script itself takes minutes."""

from __future__ import annotations

import pytest

from mutations import MUTATIONS, ROOT, Mutation, MutationError


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_mutation_applies(name):
    MUTATIONS[name].code()


@pytest.mark.parametrize(
    ("scope", "before", "message"),
    [
        ("no_such_function", "A", "in no_such_function, found 0 in 0 functions"),
        ("verify", "nothing.like(this)", "nothing.like"),
        ("verify", "A", "redrafter.decoding.verify.walk, redrafter"),
    ],
)
def test_an_error_says_what_does_not_apply(scope, before, message):
    with pytest.raises(MutationError, match=message):
        Mutation(scope, before, before, "verify").code()


def test_the_tests_that_run_first_exist():
    names = {test for mutation in MUTATIONS.values() for test in mutation.tests.split("[")[0].split("::")}
    sources = {file.name: file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    for name in names:
        assert any(name in file or f"def {name}" in text for file, text in sources.items()), name
