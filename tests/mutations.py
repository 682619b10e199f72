"""Breaks the decode step in one place at a time and checks that a test fails each time.

    python tests/mutations.py [WORD ...]

Each mutation names a module, class or function and changes one expression in its syntax tree. The tests are imported
and collected once; each mutation runs in a forked process, which replaces the code of the function and runs tests until
one fails. That test must then pass in a fork without the mutation. Exit status 1 if a mutation makes no test fail.

A mutation does not depend on formatting, on local names, or on the file that its class or function is in.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "redrafter"
TESTS = (
    *("test_verify.py", "test_tree.py", "test_noise.py", "test_cache.py", "test_warping.py", "test_sampling.py"),
    *("test_target.py", "proposers", "test_decoding.py", "engine/test_scheduler.py"),
)
"""Files or folders of tests that must detect every mutation."""
SECONDS = 600
"""Time limit of one run of the tests."""


class MutationError(Exception):
    """A mutation that does not apply to the sources."""


@dataclass(frozen=True)
class Mutation:
    """One change of one expression, in patterns of Python expressions.

    A single capital letter in a pattern matches any expression, and the same expression if it occurs again. `before`
    must match exactly one expression of the functions in `scope`; `after` replaces it.
    """

    scope: str
    """A module, class or function: consecutive parts of its dotted name, as `step` or `Decoder.step`."""
    before: str
    after: str
    tests: str
    """A part of the names of the tests that run first; the others follow if none of them fails."""

    def code(self) -> tuple[Function, types.CodeType]:
        """The function and its code after the mutation.  Raises MutationError if it does not apply."""
        pattern = expression(self.before)
        scope = [one for one in functions() if f".{self.scope}." in f".{one.module}.{one.name}."]
        matches = [
            (function, node, bound)
            for function in scope
            for node in ast.walk(function.node)
            if (bound := match(pattern, node)) is not None
        ]
        if len(matches) != 1:
            where = ", ".join(f"{one.module}.{one.name}" for one, *_ in matches) or f"{len(scope)} functions"
            raise MutationError(
                f"expected one match of `{self.before}` in {self.scope}, found {len(matches)} in {where}; "
                "adapt scope and pattern to the sources"
            )
        function, node, bound = matches[0]
        tree = Replace(node, substitute(expression(self.after), bound)).visit(copy_around(function.tree, node))
        compiled = compile(ast.fix_missing_locations(tree), str(function.file), "exec")
        return function, next(code for code in codes(compiled) if code.co_qualname == function.name)

    def apply(self) -> None:
        """Replaces the code of the function in this process."""
        function, code = self.code()
        found: Any = importlib.import_module(function.module)
        for part in function.name.split("."):
            found = inspect.getattr_static(found, part)
        while not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__"):
            found = next(
                getattr(found, name) for name in ("fget", "__wrapped__", "__func__", "func") if hasattr(found, name)
            )
        if (found.__code__.co_qualname, found.__code__.co_filename) != (code.co_qualname, str(function.file)):
            raise MutationError(f"{function.name} is {found.__code__}, not the function of {function.file}")
        found.__code__ = code


MUTATIONS = {
    "walk: a node is compared with the choice after itself": Mutation(
        "verify", "T.tokens == C.gather(1, P)", "T.tokens == C", "test_verify.py"
    ),
    "walk: a node is kept without its ancestors": Mutation(
        "verify", "(M[:, None] | ~T.ancestors).all(dim=2) & M", "M", "test_verify.py"
    ),
    "walk: padding is kept": Mutation("consistent", "A & self.valid", "A", "test_verify.py"),
    "walk: the last drafted token is not counted": Mutation(
        "verify", "torch.where(A[:, 0], D[:, 0], -1)", "torch.where(A[:, 0], D[:, 0] // 2, -1)", "test_verify.py"
    ),
    "walk: nodes of another depth or other ancestors are kept": Mutation(
        "verify", "T.consistent()", "T.valid", "test_verify.py"
    ),
    "walk: equal siblings are counted twice": Mutation(
        "verify", "torch.where(A[:, 0], D[:, 0], -1)", "A.sum(dim=1) - 1", "test_verify.py"
    ),
    "noise: by the node's number, not its depth": Mutation(
        "sampling",
        "N[R, T.depth]",
        "N[R, torch.arange(T.size) % N.shape[1]]",
        "test_sampling.py",
    ),
    "noise: drafts use that of the position before": Mutation(
        "SamplingNoise", "self.gumbel[:, D]", "self.gumbel[:, D - 1]", "test_a_head_that_knows_the_target"
    ),
    "noise: depends on the row's index in the batch": Mutation(
        "sampling",
        "gumbel(S, P, V)",
        "gumbel(S + torch.arange(len(S)), P, V)",
        "test_eagle_drafts.py::test_every_draft_is_that_of_a_plain_search[sampled-True-shape0",
    ),
    "noise: the same at every position": Mutation(
        "noise", "_splitmix(S)[:, None] + P", "_splitmix(S)[:, None] + 0 * P", "test_noise.py"
    ),
    "noise: the same for every seed": Mutation(
        "noise", "_splitmix(S)[:, None] + P", "_splitmix(0 * S)[:, None] + P", "test_noise.py"
    ),
    "noise: one position late after a step": Mutation(
        "sampling",
        "R.length[:, None] + 1 + torch.arange(D, device=V)",
        "R.length[:, None] + 1 + (D > 1) + torch.arange(D, device=V)",
        "test_any_tree_gives_the_same_text",
    ),
    "ahead: a finished row continues": Mutation(
        "scheduler", "T.get(O.slot) is not O", "O.slot not in T", "test_a_step_launched_before"
    ),
    "ahead: tokens that are not read yet are not visible": Mutation(
        "Scheduler._launch", "len(P) * (R.length + 1)", "0 * len(P)", "test_a_step_launched_before"
    ),
    "mask: nodes see their siblings": Mutation(
        "tree_mask", "A.gather(2, N) & I[:, None]", "I[:, None]", "test_tree.py"
    ),
    "mask: nodes do not see the slot before the root": Mutation("tree_mask", "I < 0", "I < -1", "test_tree.py"),
    "mask: the window is one slot longer": Mutation(
        "tree_mask", "A - B[:, None] < W", "A - B[:, None] <= W", "test_tree.py"
    ),
    "mask: positions by the node's number, not its depth": Mutation(
        "Target.forward", "L[:, None] + T.depth", "L[:, None] + torch.arange(T.size, device=L.device)", "test_target.py"
    ),
    "tree: a node's parent is not its ancestor": Mutation("ancestors_of", "range(D)", "range(D - 1)", "test_tree.py"),
    "eagle: a feature is paired with its own token, not the next one": Mutation(
        "proposers.eagle", "(I + 1).minimum(E)", "I.minimum(E)", "test_a_head_that_knows_the_target"
    ),
    "eagle: the last token of the last step is not read": Mutation(
        "proposers.eagle",
        "F.clamp(min=0)",
        "(F + 1).clamp(min=0)",
        "test_eagle_drafts.py::test_every_draft_is_that_of_a_plain_search[greedy-False-shape3",
    ),
    "eagle: beams keep the features of other beams": Mutation(
        "proposers.eagle",
        "P[..., None, None]",
        "(0 * P)[..., None, None]",
        "test_eagle_drafts.py::test_every_draft_is_that_of_a_plain_search[greedy-False-shape1",
    ),
    "cache: nothing is moved": Mutation(
        "Decoder.step", "S.cache.keep(P, L)", "None", "test_any_tree_gives_the_same_text"
    ),
    "cache: moved one slot too far": Mutation(
        "SlotCache.keep",
        "L[:, None] + torch.arange(P, device=D)",
        "1 + L[:, None] + torch.arange(P, device=D)",
        "test_cache.py",
    ),
    "cache: keys are moved, values are not": Mutation(
        "SlotCache.keep", "self.pools", "self.pools[::2]", "test_cache.py"
    ),
    "cache: all rows move what the first row moves": Mutation(
        "SlotCache.keep", "L[:, None] + path", "L[:, None] + path[:1]", "test_cache.py"
    ),
    "keep: a finished row continues": Mutation(
        "Decoder.step", "R.alive * (A + 1)", "A + 1", "test_a_row_that_ended_stays"
    ),
    "keep: the drafter receives the root's state, not the last node's": Mutation(
        "Decoder.step", "_latest(C, H, A)", "_latest(C, H, 0 * A)", "test_counts_of_a_perfect_drafter"
    ),
    "keep: the drafter receives positions with one missing": Mutation(
        "step",
        "E[:, None] + 1 + torch.arange(N, device=D)",
        "E[:, None] + torch.arange(N, device=D)",
        "test_a_malformed_root_is_an_error",
    ),
    "memory: the tokens of the last step are not read": Mutation(
        "two_model",
        "(R.length - self.length).clamp(min=0)",
        "R.length",
        "test_a_target_that_drafts_for_itself",
    ),
    "memory: the first token of the last step is not read": Mutation(
        "two_model",
        "R.length - self.length",
        "R.length - self.length + 1",
        "test_two_model.py::test_every_draft_is_that_of_a_plain_search[False-greedy-shape3",
    ),
    "memory: prompts are not read": Mutation(
        "step", "P.read(M, C, H)", "None", "test_eagle_drafts.py::test_every_draft"
    ),
    "memory: a row that moves leaves it behind": Mutation(
        "State.copy", "self.memory.copy_row(S, T, U)", "None", "test_rows_move_together"
    ),
    "cache: a row that moves leaves it behind": Mutation(
        "State.copy", "self.cache.copy_row(S, T, U)", "None", "test_rows_move_together"
    ),
    "reading: steps move the states of prompts that are being read": Mutation(
        "Decoder.step", "_latest(C, H, N - 1)", "_latest(C, H, (N - 1).clamp(min=0))", "test_the_drafter_is_given"
    ),
    "reading: later parts of a prompt go into the first row": Mutation(
        "Target.read_prompt", "C.view(slice(R, R + 1))", "C.view(slice(0, 1))", "test_a_prompt_that_is_read_in_parts"
    ),
    "settings: all rows have the temperature of the first": Mutation(
        "warping", "S / _aligned(T, S)", "S / _aligned(T[:1], S)", "test_warping.py"
    ),
    "settings: all rows have the smallest top-k": Mutation(
        "within_top_k", "(K - 1).clamp(0, S - 1)", "(K - 1).clamp(0, S - 1).amin().expand_as(K)", "test_warping.py"
    ),
    "settings: a nucleus ends among equal scores": Mutation(
        "warping", "A & ~B & ~C & ~D", "A & ~B & ~C", "test_warping.py"
    ),
    "settings: a row that drafts none has its draft verified": Mutation(
        "Decoder.step", "T.valid & (D == 1)[:, None]", "T.valid", "test_rows_with_different_settings"
    ),
    "penalties: the root is counted twice": Mutation(
        "occurrences",
        "torch.cat((torch.zeros_like(B[..., :1]), B[..., 1:]), dim=2)",
        "B",
        "test_sampling.py",
    ),
    "penalties: tokens of the prompt are counted": Mutation(
        "occurrences", "W & (I >= P[:, None])", "W", "test_sampling.py"
    ),
    "memory: attention does not reach the beams": Mutation(
        "State.set_visible",
        "S + self.memory.slots - self.cache.slots",
        "S",
        "test_two_model.py::test_every_draft_is_that_of_a_plain_search[False-greedy-shape2",
    ),
    "draft: beams see their neighbours": Mutation("parallel_chains", "A % W == 0", "A % W >= 0", "test_tree.py"),
    "draft: the root is found at its own position": Mutation(
        "continuations", "torch.where(P < E, R, -1)", "torch.where(P <= E, R, -1)", "test_prompt_lookup"
    ),
    "draft: what follows the text is drafted": Mutation(
        "continuations", "A + 1 + I % P", "A + 1 + I % (P + 1)", "test_prompt_lookup"
    ),
}


@dataclass(frozen=True)
class Function:
    """A function of the package: its module, qualified name, file, and syntax trees of the file and of itself."""

    module: str
    name: str
    file: Path
    tree: ast.Module
    node: ast.AST


@functools.cache
def functions() -> list[Function]:
    """All functions and methods, without Triton kernels."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
            elif isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")

    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        if "triton" not in file.parts and "assets" not in file.parts:
            tree = ast.parse(file.read_text())
            module = ".".join(file.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")
            found += [Function(module, name, file, tree, node) for name, node in inside(tree, "")]
    return found


def expression(text: str) -> ast.expr:
    """The syntax tree of an expression."""
    return ast.parse(text, mode="eval").body


def match(pattern: Any, node: Any, bound: dict[str, ast.AST] | None = None) -> dict[str, ast.AST] | None:
    """What the capital letters of a pattern stand for, if it matches."""
    bound = {} if bound is None else bound
    if isinstance(pattern, ast.Name) and len(pattern.id) == 1 and pattern.id.isupper():
        if not isinstance(node, ast.expr):
            return None
        same = pattern.id not in bound or ast.dump(bound[pattern.id]) == ast.dump(node)
        return bound | {pattern.id: node} if same else None
    if isinstance(pattern, list):
        if not isinstance(node, list) or len(pattern) != len(node):
            return None
        for one, other in zip(pattern, node, strict=True):
            bound = match(one, other, bound)
            if bound is None:
                return None
        return bound
    if not isinstance(pattern, ast.AST):
        return bound if type(pattern) is type(node) and pattern == node else None
    if type(pattern) is not type(node):
        return None
    for name, value in ast.iter_fields(pattern):
        if name != "ctx":
            bound = match(value, getattr(node, name), bound)
            if bound is None:
                return None
    return bound


def substitute(pattern: ast.expr, bound: dict[str, ast.AST]) -> ast.expr:
    """A pattern with its capital letters replaced."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return copy.deepcopy(bound.get(node.id, node))

    return Fill().visit(copy.deepcopy(pattern))


class Replace(ast.NodeTransformer):
    """Replaces one node by another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def copy_around(tree: ast.Module, node: ast.AST) -> ast.Module:
    """A copy of a module that shares one of its nodes."""
    return copy.deepcopy(tree, {id(node): node})


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code objects inside another."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from codes(constant)


class Runner:
    """A pytest plugin that runs the collected tests in forked processes, under one mutation each."""

    def __init__(self, words: list[str]):
        self.names = [name for name in MUTATIONS if not words or any(word in name for word in words)]
        self.undetected: list[str] = []
        self.failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        if session.testsfailed or not items:
            raise MutationError("the tests could not be collected")
        jobs = {
            name: functools.partial(self.first_failure, ordered(items, MUTATIONS[name]), MUTATIONS[name])
            for name in self.names
        }
        killers = forked(jobs)
        tests = {test for test, _ in killers.values() if test}
        passing = forked({test: functools.partial(self.first_failure, [by_id(items)[test]], None) for test in tests})
        for name, (test, seconds) in killers.items():
            detected = bool(test) and passing[test][0] == ""
            self.undetected += [] if detected else [name]
            note = test if detected or not test else f"{test} fails without the mutation too"
            print(f"{'detected' if detected else 'MISSED':8s}  {name:66s} {seconds:5.1f} s  {note}")
        print(f"{len(killers) - len(self.undetected)} of {len(killers)} mutations make a test fail")
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def first_failure(self, items: list[pytest.Item], mutation: Mutation | None) -> str:
        """The first test that fails; empty if all pass."""
        if mutation is not None:
            mutation.apply()
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return self.failed
        return ""


def by_id(items: list[pytest.Item]) -> dict[str, pytest.Item]:
    return {item.nodeid: item for item in items}


def ordered(items: list[pytest.Item], mutation: Mutation) -> list[pytest.Item]:
    """The tests that are likely to detect a mutation first, then those of the other files as in `TESTS`."""

    def rank(item: pytest.Item) -> tuple[bool, int]:
        place = next(i for i, one in enumerate(TESTS) if item.path.is_relative_to(ROOT / "tests" / one))
        return mutation.tests not in item.nodeid, place

    return sorted(items, key=rank)


def forked(jobs: dict[str, Callable[[], str]]) -> dict[str, tuple[str, float]]:
    """Each job's result and seconds; each runs in its own process, as many at a time as there are cores."""
    with tempfile.TemporaryDirectory() as folder:
        running: dict[int, str] = {}
        waiting = list(enumerate(jobs))
        while waiting or running:
            if waiting and len(running) < (os.cpu_count() or 1):
                number, name = waiting.pop(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
                    process = os.fork()
                if not process:
                    run_and_exit(jobs[name], Path(folder) / str(number))
                running[process] = name
                continue
            process, status = os.wait()
            name = running.pop(process)
            if status:
                how = (
                    f"took more than {SECONDS} s" if os.waitstatus_to_exitcode(status) == -signal.SIGALRM else "crashed"
                )
                text = Path(folder, str(list(jobs).index(name)) + ".log").read_text()
                raise MutationError(f"The tests {how} under “{name}”:\n{text[-2000:]}")
        return {name: json.loads(Path(folder, str(number)).read_text()) for number, name in enumerate(jobs)}


def run_and_exit(job: Callable[[], str], result: Path) -> None:
    """Writes a job's result and ends this process."""
    status = 1
    try:
        signal.alarm(SECONDS)
        log = os.open(f"{result}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        began = time.perf_counter()
        result.write_text(json.dumps((job(), time.perf_counter() - began)))
        status = 0
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(status)


def main(words: list[str]) -> None:
    """Runs all mutations, or those whose name contains one of the words."""
    for name, mutation in MUTATIONS.items():
        try:
            mutation.code()
        except MutationError as error:
            raise SystemExit(f"Mutation “{name}” does not apply: {error}.") from None
    sys.path.insert(0, str(SOURCES.parent))  # not an installed copy
    runner = Runner(words)
    paths = [str(ROOT / "tests" / one) for one in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-o", "addopts=", "-m", "not gpu"]
    status = pytest.main(["-s", *options, *paths], plugins=[runner])
    raise SystemExit(int(status) or bool(runner.undetected))


if __name__ == "__main__":
    main(sys.argv[1:])
