"""Ctrl-C at every moment of a call: between any two events of a profiler, as the interpreter would have it.

A signal only sets a flag; Python raises KeyboardInterrupt later, where the interpreter looks at the flag. A profiler
in Python would look at it in its own code. So the last step is a profiler in C: it sets the flag, and the code
under test is the first to see it, be it in a callback, whose exceptions Python ignores.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count, repeat
from operator import length_hint
from typing import Any

__all__ = ["Swallowed", "each_moment", "interrupted_at", "signalled_at"]

_set_flag = ctypes.pythonapi.PyErr_SetInterrupt
_set_flag.argtypes, _set_flag.restype = [ctypes.py_object], ctypes.c_int
_SECONDS = 30


class Swallowed(AssertionError):
    """The call went on as if Ctrl-C had not been pressed."""


def each_moment(act: Callable[[], object], *, step: int = 1) -> Iterator[int]:
    """Interrupt a call at each of its moments, once per iteration, and yield the number of the moment.

    Raises:
        Swallowed: KeyboardInterrupt did not leave the call.
    """
    for moment in count(1, step):
        if not interrupted_at(moment, act):
            return
        yield moment


def interrupted_at(moment: int, act: Callable[[], object]) -> bool:
    """Interrupt a call at a moment; False if it ends before."""
    passed = 0
    to_press = iter((None,))
    ignored: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            sys.setprofile(_pressing(to_press))

    hook, sys.unraisablehook = sys.unraisablehook, lambda what: ignored.append(f"{what.exc_value!r} in {what.object!r}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    try:
        sys.setprofile(profile)
        try:
            act()
        finally:
            sys.setprofile(None)
    except KeyboardInterrupt:
        is_raised = True
    else:
        is_raised = False
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook
    if ignored or is_raised == bool(length_hint(to_press)):
        raise Swallowed(f"at moment {moment}: {ignored}")
    return is_raised


def signalled_at(moment: int, act: Callable[[], object], handler: Callable[[], object], *files: str) -> bool:
    """Run a signal handler at a moment of a call, of those in some files only; False if the call ends before."""
    passed = 0
    to_press = iter((None,))

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal passed
        passed += not files or frame.f_code.co_filename.endswith(files)
        if passed == moment:
            sys.setprofile(_pressing(to_press))

    def handle(number: int, frame: Any) -> None:
        sys.setprofile(None)
        handler()

    before = signal.signal(signal.SIGINT, handle)
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    try:
        sys.setprofile(profile)
        act()
    finally:
        sys.setprofile(None)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGINT, before)
    return not length_hint(to_press)


def _pressing(once: Iterator[None]) -> Callable[[Any, str, Any], object]:
    """Return a function in C for `sys.setprofile`, which presses Ctrl-C the first time that it is called."""
    return partial(max, key=partial(next, chain(map(_set_flag, once), repeat(0))))
