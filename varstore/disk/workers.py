"""Run jobs on a few threads that never outlive the call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from varstore.errors import UsageError

__all__ = ["run", "thread_count"]

_DEFAULT_LIMIT = 8


def thread_count(threads: int | None) -> int:
    """Return the number of threads asked for, or one for each processor up to eight.

    Raises:
        UsageError: not a positive number.
    """
    if threads is None:
        return min(_DEFAULT_LIMIT, len(os.sched_getaffinity(0)))
    if threads < 1:
        raise UsageError("threads must be at least 1", found=threads)
    return threads


def run(jobs: Iterable[Callable[[], None]], threads: int) -> None:
    """Run all jobs, the caller's thread among the workers.

    Jobs are taken from the iterable one at a time, so a generator may do ordered work between them. The
    first exception, Ctrl-C included, stops the others after their present job and surfaces as itself.
    """
    crew = _Crew(jobs)
    helpers = [threading.Thread(target=crew.work, name=f"varstore-{i}", daemon=True) for i in range(1, threads)]
    for helper in helpers:
        helper.start()
    try:
        crew.work()
    except BaseException as error:  # Ctrl-C between two jobs
        crew.fail(error)
    finally:
        for helper in helpers:
            helper.join()
    if crew.error is not None:
        raise crew.error


class _Crew:
    def __init__(self, jobs: Iterable[Callable[[], None]]) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def work(self) -> None:
        try:
            while self.error is None:
                with self._lock:
                    job = None if self.error else next(self._jobs, None)
                if job is None:
                    return
                job()
        except BaseException as error:  # handed to the caller of run
            self.fail(error)
