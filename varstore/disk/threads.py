"""Run jobs on a few threads that never outlive the call."""

from __future__ import annotations

import _thread
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from varstore.errors import UsageError
from varstore.storage import syscalls

__all__ = [
    "SLOW",
    "Ending",
    "Job",
    "Lane",
    "do_here_until_slow",
    "for_each",
    "in_lanes",
    "piece",
    "run",
    "start",
    "thread_count",
]

Item = TypeVar("Item")

Job = Callable[[], bool | None]
"""A piece of work. It returns True if more of it is left; the same thread then calls it again."""

_DEFAULT_LIMIT = 8
_MOST = 32
"""Threads where calls wait for a server: it answers many in the time of one."""
_WAIT = 1e-3
"""Seconds that a few calls wait, for which one more thread is of use."""
_QUICK = 100e-6
"""Seconds for the files of one small variable; of calls that take longer, the disk or a server does most."""
SLOW = 2e-3
"""Seconds for a few calls, as to open or to make a folder; those that take longer wait for a server."""


def thread_count(threads: int | None, seconds: float = 0.0) -> int:
    """Return the number of threads asked for, or one for each processor up to eight.

    Where the first calls, a few, took more `seconds` than `SLOW`, they wait for a server, and there is a thread for
    each millisecond, up to 32.

    Raises:
        UsageError: not a positive number.
    """
    if threads is None:
        usual = min(_DEFAULT_LIMIT, len(syscalls.processors(0)))
        return max(usual, min(_MOST, int(seconds / _WAIT) if seconds > SLOW else 0))
    if not isinstance(threads, int) or threads < 1:
        raise UsageError("threads must be at least 1", found=threads)
    return threads


def piece(items: int) -> int:
    """Return how many of these items one thread does at a time where calls wait: so few that many threads wait."""
    return max(1, items // _MOST)


def run(jobs: Iterable[Job], threads: int, *, on_failure: Callable[[], None] | None = None) -> None:
    """Run all jobs in the caller's thread and up to `threads - 1` others, which start only if there is a job.

    If the system refuses more threads, the jobs run in those that did start. Jobs are taken from the iterable one at
    a time, so a generator may do ordered work between them. The first exception, Ctrl-C included, stops the other
    threads after their current piece, and is raised unchanged. `on_failure` is called at once, to wake whoever waits
    for a piece that will never be done.
    """
    crew = _Crew(jobs, on_failure)
    while not crew.is_over:
        try:
            crew.go_on(threads)
        except BaseException as error:  # Ctrl-C between two jobs, or while helpers are waited for
            crew.error = crew.error or error
    failure, crew.error = crew.error, None
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # what it refers to, descriptors among them, is freed without a garbage collection


def start(target: Callable[[], object], *, name: str, daemon: bool) -> bool:
    """Start a thread; False where there can be no more: at a limit, or when the interpreter ends.

    Only the main thread is interrupted by Ctrl-C, and what it must not do is done apart, in a thread that is begun in
    one step. Ctrl-C within `Thread.start` can leave a lock taken that the new thread waits for without end. And the
    last reference to a `Thread` is not to be dropped by the main thread: `threading` is told of that by a callback,
    and Python ignores what a callback raises, Ctrl-C included.
    """
    started: list[bool] = []

    def launch() -> None:
        with contextlib.suppress(RuntimeError, MemoryError):
            threading.Thread(target=target, name=name, daemon=daemon).start()
            started.append(True)

    _apart(launch)
    return bool(started)


def _apart(work: Callable[[], None]) -> None:
    """Do something short where Ctrl-C does not interrupt it, and wait for it; not at all if that is not possible."""
    if threading.get_ident() != threading.main_thread().ident:
        work()
        return
    if sys.is_finalizing():  # a new thread would never run
        return
    working = threading.Lock()
    working.acquire()

    def do() -> None:
        try:
            work()
        finally:
            working.release()

    try:
        (_,) = map(_thread.start_new_thread, (do,), ((),))  # a single step: Ctrl-C comes before it or after it
    except RuntimeError:
        return
    interruption: BaseException | None = None
    is_done = False
    while not is_done:
        try:
            with working:
                is_done = True
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


class Ending:
    """How work in another thread ended. It is told once, and waited for from anywhere.

    A `concurrent.futures.Future` would be left locked by Ctrl-C at some moments, and whoever tells or asks would wait
    without end. Here the lock says only that there is something to know, so nobody is misled if it stays taken.
    """

    def __init__(self) -> None:
        self.is_told = False
        self.error: BaseException | None = None
        self.is_raised = False
        """Whether `check` has raised the error."""
        self._unknown = threading.Lock()
        self._unknown.acquire()

    def tell(self, error: BaseException | None = None) -> None:
        """Say that it ended, with this error or well."""
        self.error = error
        self.is_told = True
        self._unknown.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is told, for at most `timeout` seconds; tell whether it is."""
        if not self.is_told:
            try:
                self._unknown.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX))
            finally:
                if self.is_told:
                    with contextlib.suppress(RuntimeError):  # another one who waited was faster
                        self._unknown.release()
        return self.is_told

    def check(self) -> None:
        """Raise the error that it ended with, if there is one."""
        if self.error is not None:
            self.is_raised = True
            raise self.error


class Lane:
    """The pieces of one file, each done once; `step` does the next piece that no thread has started."""

    def __init__(self, pieces: Iterable[tuple[Any, ...]], do: Callable[..., None]) -> None:
        """Take the pieces, such as (start, stop), and what does one of them, given as its arguments."""
        self._pieces = deque(pieces)
        self._do: Callable[..., None] | None = do

    @property
    def left(self) -> int:
        """How many pieces no thread has begun with."""
        return len(self._pieces)

    def step(self) -> bool:
        """Do a piece; False where none is left."""
        do = self._do
        try:
            piece = self._pieces.popleft()
        except IndexError:
            return False
        if not self._pieces:
            self._do = None  # lets go of the values that it holds
        assert do is not None
        do(*piece)
        return True


def in_lanes(work: Iterable[Lane | Job]) -> Iterator[Job]:
    """Yield jobs so that each thread stays in one lane; at the end, idle threads help with the fullest lane.

    Threads that write to one file wait for each other in the kernel, and a disk reads ahead where one thread reads on.
    """
    lanes = []
    for item in work:
        if not isinstance(item, Lane):
            yield item
            continue
        if item.left > 1:
            lanes.append(item)
        yield item.step
    while lanes and (lane := max(lanes, key=lambda lane: lane.left)).left:
        yield lane.step


def do_here_until_slow(
    groups: Iterable[Sequence[Item]], do: Callable[[Sequence[Item]], None], *, calls_wait: bool = False
) -> Iterator[Job]:
    """Do groups of small things here while that is quick, and yield them where threads would help: they wait.

    Threads that make quick calls wait for the interpreter longer than they save. Where `calls_wait`, as far as is
    known, the first group says whether it was but a busy machine.
    """
    calls_are_slow = False
    quick = SLOW if calls_wait else _QUICK
    for group in groups:
        if calls_are_slow:
            yield partial(do, group)
            continue
        start = time.perf_counter()
        do(group)
        calls_are_slow = time.perf_counter() - start > quick * len(group)


def for_each(items: Iterable[Item], do: Callable[[Item], object], *, threads: int = 1) -> None:
    """Do something with each item, in any order: here while that is quick, on many threads once two wait in a row.

    With more `threads`, it is known that calls wait, and as many are used from the first.
    """
    left = iter(items)
    last = 0.0
    if threads == 1:
        for item in left:
            start = time.perf_counter()
            do(item)
            seconds = time.perf_counter() - start
            if min(last, seconds) > SLOW:
                threads = thread_count(None, seconds)
                break
            last = seconds
        else:
            return
    run((partial(_ignoring, do, item) for item in left), threads)


def _ignoring(do: Callable[[Item], object], item: Item) -> None:
    do(item)  # what it returns does not say that there is more


class _Crew:
    """Those who do the jobs of one `run`: the caller, and helpers, each of whom is counted before its thread begins."""

    def __init__(self, jobs: Iterable[Job], on_failure: Callable[[], None] | None) -> None:
        self.error: BaseException | None = None
        self.is_over = False
        """Whether no job is done any more, and no helper will begin one."""
        self._jobs = iter(jobs)
        self._on_failure = on_failure
        self._is_begun = False
        self._is_drained = False
        self._taking = threading.Lock()
        self._counting = threading.Lock()
        self._busy = threading.Lock()
        """Held as long as anybody helps; a lock taken by `with` cannot be lost to Ctrl-C, as a condition can."""
        self._helping = 0

    def go_on(self, threads: int) -> None:
        """Do the jobs, and return when nobody does any: helpers use the caller's files. After Ctrl-C, call it again.

        `Thread.join` would not do: after an interruption, it treats the thread as finished.
        """
        if not self._is_begun:
            self._is_begun = True
            first = self._take()
            if first and threads > 1:
                _apart(partial(self._start_helpers, threads - 1))
            self._work(first)
        if self.error is not None and self._on_failure:
            self._on_failure()
        while not self.is_over:
            with self._busy:
                pass
            with self._counting:
                self.is_over = not self._helping

    def _start_helpers(self, count: int) -> None:
        for number in range(1, count + 1):
            with self._counting:
                if self.is_over or self._is_drained or self.error is not None:
                    return
                if not self._helping:
                    self._busy.acquire()
                self._helping += 1
            try:
                threading.Thread(target=self._help, name=f"varstore-{number}", daemon=True).start()
            except (RuntimeError, MemoryError):
                self._leave()
                return

    def _leave(self) -> None:
        with self._counting:
            self._helping -= 1
            if not self._helping:
                self._busy.release()

    def _help(self) -> None:
        try:
            self._work(self._take())
        finally:
            self._leave()

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        if self._on_failure:
            self._on_failure()

    def _take(self) -> Job | None:
        """Return the next job, None where there is none, or none is to be begun any more."""
        try:
            with self._taking:
                job = None if self.error else next(self._jobs, None)
                self._is_drained = job is None
                return job
        except BaseException as error:  # handed to the caller of run
            self._fail(error)
            return None

    def _work(self, job: Job | None) -> None:
        """Do this job and then one after the other."""
        try:
            while job is not None:
                while job() and self.error is None:
                    pass
                job = None  # what it held is free while the next one is made
                job = self._take()
        except BaseException as error:  # handed to the caller of run
            self._fail(error)
