"""The versions of vLLM that the plug-in knows, and the functions of vLLM that it replaces or calls.

Guarantees that vLLM is not changed if its version or one of these functions is unknown.  vLLM has no stable interface
for proposers, so each version must be tried before it is added here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from redrafter.errors import RedrafterError

OLDEST, NEWEST = Version("0.26"), Version("0.33")
"""The first and last known minor versions."""


def check_version(version: str) -> None:
    """Raises RedrafterError for a version of vLLM that the plug-in does not know."""
    try:
        minor = Version(".".join(map(str, Version(version).release[:2])))
    except InvalidVersion:
        minor = Version("0")
    if not OLDEST <= minor <= NEWEST:
        raise RedrafterError(
            f"Method redrafter supports vLLM {OLDEST} to {NEWEST}, not {version}; install one of these, or a newer "
            "redrafter."
        )


def check_signature(function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Raises RedrafterError unless the function's parameters begin with the expected names.

    Later parameters must have defaults.
    """
    found = inspect.signature(function).parameters
    names, rest = list(found)[: len(expected)], list(found.values())[len(expected) :]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    unknown = [one.name for one in rest if one.default is one.empty and one.kind not in variadic]
    if names != list(expected) or unknown:
        raise RedrafterError(
            f"This build of vLLM is unknown to method redrafter: {function.__qualname__} takes "
            f"({', '.join(found)}) instead of ({', '.join(expected)}); install a released vLLM {OLDEST} to {NEWEST}."
        )
