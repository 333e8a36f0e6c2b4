"""Pause Python's garbage collector while many small, long-lived objects are created."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Run the block without garbage collections.

    Each collection visits every object of the process, and none of the new objects can be garbage yet. In a process
    that has imported a large framework, the collections would take longer than creating the objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
