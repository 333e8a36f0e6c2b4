"""Run a function in a child process with a plan, and return how it ended.

A fault may kill the process, and a filter cannot be removed, so the function runs in a child. Starting Python and
importing numpy takes a hundred times as long as the function. Forking a process that has imported everything takes
some milliseconds, and a child that is still alive is used again. Each child inherits the same modules, hash seed and
descriptors, so that the n-th call is always the same one. The function must run in the parent first, because late
imports would be counted in each child.

A fork copies only the thread that calls it, so the parent must not have others.
"""

from __future__ import annotations

import _thread
import gc
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from tools.faults.injector import Fault, Injector
from tools.faults.jobs import Unavailable
from varstore.errors import StorageError, VarstoreError

__all__ = ["Child", "Run", "Said"]

_PATIENCE = 30
"""The time limit of a run in seconds, after which SIGALRM ends the child."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The report of a child whose function ended: its error, and the descriptors that it left open."""

    error: str
    """The class of the error; empty if the function returned."""
    message: str
    is_ours: bool
    """Whether it is in varstore's tree."""
    is_storage_error: bool
    left_open: tuple[str, ...]
    in_threads: tuple[str, ...]
    """Errors that ended a thread, and that nobody was told of."""


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
    synced: frozenset[int]
    """The inodes of the files and folders that were synced one by one."""
    killed_by: int
    """The signal that ended the child, or 0."""
    said: Said | None
    """None if the child was killed."""


class Child:
    """A child process that runs a function whenever it is told to; once killed, the next run starts another."""

    def __init__(
        self, injector: Injector, work: Callable[[], object], start: Callable[[], object] = lambda: None
    ) -> None:
        self._injector = injector
        self._work = work
        self._begin = start
        self._pid = 0
        self._orders: IO[bytes]
        self._reports: IO[bytes]

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, *, at: int, fault: Fault) -> Run:
        """Run the function in the working directory, with a fault at the call of this number.

        Raises:
            Unavailable: the calls of a child cannot be intercepted.
        """
        if not self._pid:
            self._start()
        self._injector.plan(at, fault)
        pickle.dump(os.getcwd(), self._orders)
        self._orders.flush()
        said, killed_by = None, 0
        try:
            said = pickle.load(self._reports)
        except EOFError:
            killed_by = os.WTERMSIG(self.stop())
        if isinstance(said, Unavailable):
            raise said
        calls = tuple(self._injector.calls)
        return Run(
            calls=calls,
            hit=self._injector.hit,
            call=calls[at - 1] if 0 < at <= len(calls) else "",
            where=self._injector.where,
            synced=self._injector.synced,
            killed_by=killed_by,
            said=said,
        )

    def _start(self) -> None:
        source, self._orders = _pipe()
        self._reports, sink = _pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._orders.close()
            self._reports.close()
            _be_child(self._injector, self._work, self._begin, source, sink)
        source.close()
        sink.close()

    def stop(self) -> int:
        """Let the child end if it lives, and return its wait status."""
        if not self._pid:
            return 0
        self._orders.close()
        self._reports.close()
        pid, self._pid = self._pid, 0
        return os.waitpid(pid, 0)[1]


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    source, sink = os.pipe()
    return open(source, "rb"), open(sink, "wb")


def _be_child(
    injector: Injector,
    work: Callable[[], object],
    start: Callable[[], object],
    source: IO[bytes],
    sink: IO[bytes],
) -> None:
    """Do as told until there are no more orders, then end without Python's exit handlers, which are the parent's."""
    try:
        gc.disable()  # what it closes would be counted, at any moment
        gc.freeze()  # so that the collections below look at little
        logging.disable()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unavailable = None
        try:
            injector.install()
        except Unavailable as error:
            unavailable = error
        start()
        while True:
            os.chdir(pickle.load(source))
            signal.alarm(_PATIENCE)
            pickle.dump(unavailable or _work(injector, work), sink)
            signal.alarm(0)
            sink.flush()
    finally:
        os._exit(0)


def _work(injector: Injector, work: Callable[[], object]) -> Said:
    before, threads = _descriptors(), _thread._count()
    name, message, is_ours, is_storage_error = "", "", False, False
    in_threads: list[str] = []
    threading.excepthook = lambda told: in_threads.append(f"{told.exc_type.__name__}: {told.exc_value}")
    try:
        injector.arm()
        work()
    except BaseException as error:  # Ctrl-C, too; its traceback would keep descriptors open
        name, message = type(error).__name__, str(error)
        is_ours, is_storage_error = isinstance(error, VarstoreError), isinstance(error, StorageError)
    while _thread._count() > threads:  # one may begin another, at any moment; SIGALRM comes if they do not end
        time.sleep(0.001)
    injector.disarm()
    gc.collect()
    return Said(
        error=name,
        message=message,
        is_ours=is_ours,
        is_storage_error=is_storage_error,
        left_open=tuple(sorted(target for _, target in _descriptors() - before)),
        in_threads=tuple(in_threads),
    )


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the one that listed them
            continue
    return found
