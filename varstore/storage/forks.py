"""What a forked process must not take for its own: locks, and threads that only its parent has.

A child begins with a copy of all memory and of all descriptors, and with one thread. So a lock that another thread
held is held forever in the child, a save that another thread carries out never ends there, and the descriptor by which
a save locks its staging folder keeps that lock as long as the child lives. Whoever holds such a thing registers, and
is told in every child. A child closes descriptors and never unlocks: the lock is the parent's as well.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from varstore.storage import syscalls

__all__ = ["Held", "no_fork", "tell_children"]

Parent = TypeVar("Parent")

_parents: dict[int, tuple[weakref.ref[Any], Callable[[Any], None]]] = {}
"""As in `varstore.disk.read.checkpoint`: single steps, no lock, and no callback in Python."""

no_fork = threading.RLock()
"""Held from the moment a descriptor is opened until it is registered. Forks wait, except for one by the same thread."""


def tell_children(parent: Parent, let_go: Callable[[Parent], None]) -> None:
    """Call ``let_go(parent)`` in every process that is forked from this one as long as `parent` lives."""
    _parents[id(parent)] = weakref.ref(parent, partial(_parents.pop, id(parent))), let_go


class Held:
    """What only this process holds, such as a locked file: a child closes its copy, and leaves the rest alone."""

    def __init__(self, close: Callable[[], object]) -> None:
        self.is_ours = True
        self._close = close
        tell_children(self, Held._let_go)

    def _let_go(self) -> None:
        self.is_ours = False
        with contextlib.suppress(OSError):
            self._close()


def _in_child() -> None:
    for known, let_go in list(_parents.values()):
        parent = known()
        if parent is not None:
            let_go(parent)
    no_fork.release()


syscalls.at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=_in_child)
