"""Run jobs on a few threads that never outlive the call."""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from varstore.errors import UsageError
from varstore.storage import syscalls

__all__ = ["Job", "Lane", "in_lanes", "run", "shared_if_slow", "start", "thread_count"]

Item = TypeVar("Item")

Job = Callable[[], bool | None]
"""A piece of work. It returns True if more of it is left; the same thread then calls it again."""

_DEFAULT_LIMIT = 8
_QUICK = 100e-6
"""Seconds for the files of one small variable; of calls that take longer, the disk or a server does most."""


def thread_count(threads: int | None) -> int:
    """Return the number of threads asked for, or one for each processor up to eight.

    Raises:
        UsageError: not a positive number.
    """
    if threads is None:
        return min(_DEFAULT_LIMIT, len(syscalls.processors(0)))
    if not isinstance(threads, int) or threads < 1:
        raise UsageError("threads must be at least 1", found=threads)
    return threads


def run(jobs: Iterable[Job], threads: int, *, on_failure: Callable[[], None] | None = None) -> None:
    """Run all jobs in the caller's thread and up to `threads - 1` others, which start only if there is a job.

    If the system refuses more threads, the jobs run in those that did start. Jobs are taken from the iterable one at
    a time, so a generator may do ordered work between them. The first exception, Ctrl-C included, stops the other
    threads after their current piece, and is raised unchanged. `on_failure` is called at once, to wake whoever waits
    for a piece that will never be done.
    """
    crew = _Crew(jobs, on_failure)
    try:
        first = crew.take()
        if first and threads > 1:
            start(*(threading.Thread(target=crew.help, name=f"varstore-{n}", daemon=True) for n in range(1, threads)))
        crew.work(first)
    except BaseException as error:  # Ctrl-C between two jobs
        crew.fail(error)
    crew.wait()
    if crew.error is not None:
        raise crew.error


def start(*threads: threading.Thread) -> bool:
    """Start threads; False where there can be no more: at a limit, or when the interpreter ends.

    Ctrl-C within `Thread.start` can leave a lock taken that the new thread waits for without end. Only the main thread
    is interrupted; there, a thread that is begun in one step starts the others.
    """
    starting = threading.Lock()
    starting.acquire()
    started: list[threading.Thread] = []

    def launch() -> None:
        try:
            with contextlib.suppress(RuntimeError, MemoryError):
                for thread in threads:
                    thread.start()
                    started.append(thread)
        finally:
            starting.release()

    if threading.get_ident() == threading.main_thread().ident:
        try:
            _thread.start_new_thread(launch, ())
        except RuntimeError:
            return False
        with starting:
            pass
    else:
        launch()
    return len(started) == len(threads)


class Lane:
    """The pieces (start, stop) of one file, each done once; `step` does the next piece that no thread has started."""

    def __init__(self, pieces: Iterable[tuple[int, int]], do: Callable[[int, int], None]) -> None:
        self._pieces = deque(pieces)
        self._do: Callable[[int, int], None] | None = do

    @property
    def left(self) -> int:
        """How many pieces no thread has begun with."""
        return len(self._pieces)

    def step(self) -> bool:
        """Do a piece; False where none is left."""
        do = self._do
        try:
            start, stop = self._pieces.popleft()
        except IndexError:
            return False
        if not self._pieces:
            self._do = None  # lets go of the values that it holds
        assert do is not None
        do(start, stop)
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


def shared_if_slow(groups: Iterable[Sequence[Item]], do: Callable[[Sequence[Item]], None]) -> Iterator[Job]:
    """Do groups of small things here while that is quick, and yield them where threads would help: they wait.

    Threads that make quick calls wait for the interpreter longer than they save.
    """
    calls_are_slow = False
    for group in groups:
        if calls_are_slow:
            yield partial(do, group)
            continue
        start = time.perf_counter()
        do(group)
        calls_are_slow = time.perf_counter() - start > _QUICK * len(group)


class _Crew:
    def __init__(self, jobs: Iterable[Job], on_failure: Callable[[], None] | None) -> None:
        self._jobs = iter(jobs)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._busy = threading.Lock()
        """Held as long as anybody helps; a lock taken by `with` cannot be lost to Ctrl-C, as a condition can."""
        self._helping = 0
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        if self._on_failure:
            self._on_failure()

    def help(self) -> None:
        """Work in a helper thread, unless a job has already failed."""
        with self._counting:
            if self.error is not None:
                return
            if not self._helping:
                self._busy.acquire()
            self._helping += 1
        try:
            self.work(self.take())
        finally:
            with self._counting:
                self._helping -= 1
                if not self._helping:
                    self._busy.release()

    def wait(self) -> None:
        """Return when no helper is working any more, however often Ctrl-C interrupts: helpers use the caller's files.

        `Thread.join` would not do: after an interruption, it treats the thread as finished.
        """
        while self._helping:
            try:
                with self._busy:
                    pass
            except BaseException as error:
                self.fail(error)

    def take(self) -> Job | None:
        """Return the next job, None where there is none, or none is to be begun any more."""
        try:
            with self._lock:
                return None if self.error else next(self._jobs, None)
        except BaseException as error:  # handed to the caller of run
            self.fail(error)
            return None

    def work(self, job: Job | None) -> None:
        """Do this job and then one after the other."""
        try:
            while job is not None:
                while job() and self.error is None:
                    pass
                job = None  # what it held is free while the next one is made
                job = self.take()
        except BaseException as error:  # handed to the caller of run
            self.fail(error)
