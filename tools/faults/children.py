"""Run a function in a child process with a plan, and return how it ended.

Each point needs its own process, because a fault may kill the process, and a filter cannot be removed. Starting Python
and importing numpy takes a hundred times as long as the function. Forking a process that has imported everything takes
about a millisecond. Each child also inherits the same modules, hash seed and descriptors, so that the n-th call is
always the same one. The function must run in the parent first, because late imports would be counted in each child.

A fork copies only the thread that calls it, so the parent must not have others.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tools.faults.injector import Fault, Injector
from tools.faults.jobs import Unavailable
from varstore.errors import StorageError

__all__ = ["Run", "Said", "run"]

_PATIENCE = 30
"""The time limit of a child in seconds, after which SIGALRM ends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The report of a child whose function ended: its error, and the descriptors that it left open."""

    error: str
    """The class of the error; empty if the function returned."""
    message: str
    is_storage_error: bool
    left_open: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What happened in a child."""

    calls: tuple[str, ...]
    """The names of the file system calls, in order."""
    hit: bool
    call: str
    """The call at which the fault was injected; empty if it was not reached."""
    where: str
    """Its file."""
    killed_by: int
    """The signal that ended the child, or 0."""
    said: Said | None
    """None if the child was killed."""


def run(injector: Injector, work: Callable[[], object], *, at: int, fault: Fault) -> Run:
    """Run the function in a child, with a fault at the call of this number.

    Raises:
        Unavailable: the calls of a child cannot be intercepted.
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
    """Run, report, and end without Python's exit handlers, which belong to the parent."""
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
