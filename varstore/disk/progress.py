"""Progress in bytes: a callback, a bar, or nothing, which costs nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Progress", "reporting"]

Progress = Callable[[int, int], None] | bool | None
"""What callers give: a function of (bytes done, bytes in all), True for a bar on the terminal, or None."""


_EVERY = 0.1
"""Seconds between two pictures of the bar, which those who work draw: there may be no thread to be had for it."""


@contextlib.contextmanager
def reporting(progress: Progress, total: int, title: str) -> Iterator[Callable[[int], None] | None]:
    """Yield what the workers call with each number of bytes done, or None where nobody listens."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _bar(total, title) as advance:
            yield advance
    else:
        yield _counting(progress, total)


def _counting(callback: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    lock = threading.Lock()
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            callback(done, total)

    callback(0, total)
    return advance


@contextlib.contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = time.monotonic()

    def advance(nbytes: int) -> None:
        nonlocal shown
        bar.advance(task, nbytes)
        if time.monotonic() - shown >= _EVERY:
            shown = time.monotonic()
            bar.refresh()

    with Progress(title, *columns, console=console, disable=not console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total)
        yield advance
