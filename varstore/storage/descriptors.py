"""Descriptors that Ctrl-C cannot lose.

Python raises KeyboardInterrupt after any call into C, and before the first step of any function. So a descriptor that
`os.open` returned may never get a name, and an ``__exit__`` that would close it may never begin. `syscalls.open_fd`
opens and returns in one step. What stays open longer than one function belongs to a generator, which Python closes
with its owner if nobody did before; a descriptor joins its list in the step after it is opened.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from functools import partial

__all__ = ["closing"]


def closing(descriptors: list[int]) -> Generator[None, None, None]:
    """Return what closes these descriptors, and those added to the list until then: its `close`, or its own end."""
    held = _held(descriptors)
    next(held)
    return held


def _held(descriptors: list[int]) -> Generator[None, None, None]:
    # made here, so that it is one step there
    close_all: Callable[[], object] = partial(deque, map(os.close, descriptors), maxlen=0)
    try:
        yield
    finally:
        try:
            close_all()
        finally:
            close_all()  # those after one that could not be closed
