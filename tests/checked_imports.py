"""An import hook that checks shapes and types of arguments and results, by jaxtyping and beartype.

As `jaxtyping.install_import_hook`, but several times as fast: it does not bind signatures at each call, and functions
without shapes are checked without a scope for the names of dimensions.  In each test the first calls of a function are
checked, and of later ones a share: a decode step makes thousands of calls with the same shapes.
`jaxtyping.config.jaxtyping_disable` switches all checks off.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source
from types import CodeType
from typing import Any

import beartype
import jaxtyping

CHECKERS: dict[tuple[Any, ...], Any] = {}
"""Checkers of nested functions, by module, name, code and annotations."""


FIRST, EVERY = 12, 16
"""In each test, all of a function's first calls and one in so many of the later ones are checked."""

CALLS: Counter[Any] = Counter()
"""Calls in this test, by function."""


def install(modules: Sequence[str]) -> None:
    """Checks the functions of these modules, and of modules inside them, from their import on."""
    sys.meta_path.insert(0, Finder(modules))


def is_due(function: Any) -> bool:
    """Counts a call; whether it is to be checked."""
    if jaxtyping.config.jaxtyping_disable:  # torch.compile would compile anew for every count
        return False
    count = CALLS[function]
    CALLS[function] = count + 1
    return count < FIRST or count % EVERY == 0


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises if an argument or its result has another type or shape than annotated."""
    shaped = any("[Tensor, " in str(annotation) for annotation in function.__annotations__.values())
    if "<locals>" in function.__qualname__:  # defined at every call: building a checker takes longer than calling it
        due = shaped and is_due(function.__code__)
        return jaxtyping.jaxtyped(typechecker=cached_checker)(function) if due else function
    function.__annotations__ = {name: resolved(hint, function) for name, hint in function.__annotations__.items()}
    try:
        checker = beartype.beartype(function)
    except beartype.roar.BeartypeDecorHintPep673Exception:  # Self, which needs the class
        return function

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if not is_due(function):
            return function(*args, **kwargs)
        if not shaped:
            return checker(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):
            return checker(*args, **kwargs)

    return scoped


def resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """The object that an annotation names; Any if it is not defined yet, or only for type checkers."""
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError:
        return Any


def cached_checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype` for the signatures that jaxtyping makes of a nested function."""
    key = (function.__module__, function.__qualname__, function.__code__, *function.__annotations__.values())
    if key not in CHECKERS:
        CHECKERS[key] = beartype.beartype(function)
    return CHECKERS[key]


class Decorate(ast.NodeTransformer):
    """Adds `@checked` to every function."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        decorator = ast.parse("__import__('checked_imports').checked", mode="eval").body
        node.decorator_list.append(ast.copy_location(decorator, node))
        return node


class Loader(SourceFileLoader):
    """Compiles decorated sources, without reading or writing `__pycache__`."""

    def get_code(self, fullname: str) -> CodeType:
        tree = Decorate().visit(ast.parse(decode_source(self.get_data(self.path))))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class Finder(PathFinder):
    """Finds the modules to check."""

    def __init__(self, modules: Sequence[str]):
        self.modules = tuple(modules)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # type: ignore[override]
        if not any(fullname == module or fullname.startswith(f"{module}.") for module in self.modules):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec
