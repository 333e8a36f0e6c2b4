"""Run jobs on a few threads that never outlive the call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from varstore.errors import UsageError

__all__ = ["Job", "run", "thread_count"]

Job = Callable[[], bool | None]
"""A piece of work; it returns True where there is more of it, which the same thread then does next."""

_DEFAULT_LIMIT = 8


def thread_count(threads: int | None) -> int:
    """Return the number of threads asked for, or one for each processor up to eight.

    Raises:
        UsageError: not a positive number.
    """
    if threads is None:
        return min(_DEFAULT_LIMIT, len(os.sched_getaffinity(0)))
    if not isinstance(threads, int) or threads < 1:
        raise UsageError("threads must be at least 1", found=threads)
    return threads


def run(jobs: Iterable[Job], threads: int) -> None:
    """Run all jobs, the caller's thread among the workers.

    Jobs are taken from the iterable one at a time, so a generator may do ordered work between them. The
    first exception, Ctrl-C included, stops the others after their present piece and surfaces as itself.
    """
    crew = _Crew(jobs)
    try:
        for number in range(1, threads):
            threading.Thread(target=crew.help, name=f"varstore-{number}", daemon=True).start()
        crew.work()
    except BaseException as error:  # Ctrl-C between two jobs
        crew.fail(error)
    crew.wait()
    if crew.error is not None:
        raise crew.error


class _Crew:
    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._helping = 0
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def help(self) -> None:
        """Work in a thread of its own, unless all is over already."""
        with self._changed:
            if self.error is not None:
                return
            self._helping += 1
        try:
            self.work()
        finally:
            with self._changed:
                self._helping -= 1
                self._changed.notify()

    def wait(self) -> None:
        """Return when no helper works any more, however often Ctrl-C interrupts: they use the caller's files.

        `Thread.join` would not do: interrupted, it takes the thread for ended.
        """
        while self._helping:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._helping)
            except BaseException as error:
                self.fail(error)

    def work(self) -> None:
        try:
            while self.error is None:
                with self._lock:
                    job = None if self.error else next(self._jobs, None)
                if job is None:
                    return
                while job() and self.error is None:
                    pass
                job = None  # what it held is free while the next one is made
        except BaseException as error:  # handed to the caller of run
            self.fail(error)
