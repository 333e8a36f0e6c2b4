"""Run something in a child under a plan, and tell how it ended.

Why children of one warm process. A fault may kill, and a filter cannot be taken away, so each point needs a process of
its own. To start Python and import numpy takes a hundred times as long as the work; a fork of a process that has
imported everything takes about a millisecond, and the child inherits the same modules, the same hash seed and the same
descriptors each time, which is also what makes the n-th call the same one. Run the work once in the parent first: what
it imports late would be counted in every child.

A fork copies only the thread that makes it, so the parent must have no others.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tools.faults.injector import Fault, Injector, Unavailable
from varstore.errors import StorageError

__all__ = ["Run", "Said", "run"]

_PATIENCE = 30
"""Seconds; a child that takes longer hangs, and is ended by SIGALRM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a child says when the work came back: with which error, and which descriptors it left open."""

    error: str
    """The class; empty where it returned."""
    message: str
    is_storage_error: bool
    left_open: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What happened in a child."""

    calls: tuple[str, ...]
    """The names of the file system calls that were made, in order."""
    hit: bool
    call: str
    """The call that was to be met; empty where it never came."""
    where: str
    """Its file."""
    killed_by: int
    """The signal, 0 where the child ended by itself."""
    said: Said | None
    """None where it was killed."""


def run(injector: Injector, work: Callable[[], object], *, at: int, fault: Fault) -> Run:
    """Do the work in a child, with a fault at the call of this number.

    Raises:
        Unavailable: the calls of a child cannot be caught.
    """
    injector.plan(at, fault)
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_child(injector, work, sink)
    os.close(sink)
    with open(source, "rb") as pipe:
        told = pipe.read()
    killed_by = os.WTERMSIG(os.waitpid(pid, 0)[1])
    said = pickle.loads(told) if told else None
    if isinstance(said, Unavailable):
        raise said
    calls = tuple(injector.calls)
    return Run(
        calls=calls,
        hit=injector.hit,
        call=calls[at - 1] if 0 < at <= len(calls) else "",
        where=injector.where,
        killed_by=killed_by,
        said=said,
    )


def _be_child(injector: Injector, work: Callable[[], object], sink: int) -> None:
    """Work, tell, and end without what Python does at its exit: it is the parent's to do."""
    try:
        signal.alarm(_PATIENCE)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(sink, pickle.dumps(_work(injector, work)))
    finally:
        os._exit(0)


def _work(injector: Injector, work: Callable[[], object]) -> Said | Unavailable:
    try:
        injector.install()
    except Unavailable as unavailable:
        return unavailable
    before = _descriptors()
    name, message, is_storage_error = "", "", False
    try:
        injector.arm()
        work()
    except BaseException as error:  # Ctrl-C, too
        name, message, is_storage_error = type(error).__name__, str(error), isinstance(error, StorageError)
    finally:
        injector.disarm()
    left_open = tuple(sorted(target for _, target in _descriptors() - before))
    return Said(error=name, message=message, is_storage_error=is_storage_error, left_open=left_open)


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the one that listed them
            continue
    return found
