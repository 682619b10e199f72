"""Turns of threads: who may run a model, which several calls of a process may share.

Promises that what holds a turn of some models holds it alone, and that no two wait for each other.  Does not know what
is done in a turn.
"""

from __future__ import annotations

import threading
import weakref

from torch import nn

_making = threading.Lock()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class ModelLock:
    """A context in which no other thread runs these models by a turn of its own; one thread may enter several."""

    def __init__(self, *models: nn.Module):
        with _making:
            found = {_locks.setdefault(model, threading.RLock()) for model in models}
        self._locks = sorted(found, key=id)  # one order for all

    def __enter__(self) -> None:
        for lock in self._locks:
            lock.acquire()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.release()
