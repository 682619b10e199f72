"""Mutual exclusion per model: calls that share a model run it one at a time.

Guarantees that there is no deadlock between calls that use several models.  Does not know what runs under a lock.
"""

from __future__ import annotations

import threading
import weakref

from torch import nn

_registry = threading.Lock()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class ModelLock:
    """A context manager that holds the locks of all given models.  Reentrant within a thread."""

    def __init__(self, *models: nn.Module):
        with _registry:
            locks = {_locks.setdefault(model, threading.RLock()) for model in models}
        self._locks = sorted(locks, key=id)  # the same order in all threads

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.acquire()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.release()
