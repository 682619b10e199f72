"""Exact, fast speculative decoding with a recurrent drafter (arXiv 2403.09919).

These names are the public API.  Each is imported on first access, so `import redrafter` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redrafter.engine.engine import Engine
    from redrafter.engine.generate import generate, stream
    from redrafter.engine.results import Event, Generation, Stats
    from redrafter.errors import RedrafterError
    from redrafter.heads.eagle import EagleHead
    from redrafter.heads.medusa import MedusaHeads
    from redrafter.heads.recurrent import DrafterConfig, RecurrentDrafter
    from redrafter.integrations.transformers import custom_generate
    from redrafter.proposers.prompt_lookup import PromptLookup
    from redrafter.proposers.two_model import TwoModel

__version__ = "0.1.0"

_MODULES = {
    "DrafterConfig": "heads.recurrent",
    "EagleHead": "heads.eagle",
    "Engine": "engine.engine",
    "Event": "engine.results",
    "Generation": "engine.results",
    "MedusaHeads": "heads.medusa",
    "PromptLookup": "proposers.prompt_lookup",
    "RecurrentDrafter": "heads.recurrent",
    "RedrafterError": "errors",
    "Stats": "engine.results",
    "TwoModel": "proposers.two_model",
    "custom_generate": "integrations.transformers",
    "generate": "engine.generate",
    "stream": "engine.generate",
}

__all__ = [  # noqa: RUF022
    "generate",
    "stream",
    "Engine",
    "custom_generate",
    "RecurrentDrafter",
    "MedusaHeads",
    "EagleHead",
    "TwoModel",
    "PromptLookup",
    "DrafterConfig",
    "Generation",
    "Event",
    "Stats",
    "RedrafterError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"redrafter.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
