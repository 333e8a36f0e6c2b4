"""A report in one file of HTML, which needs no network and no server."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

import varstore as vs
from varstore.errors import StorageError
from varstore.view.comparison import compare
from varstore.view.page import document
from varstore.view.run import follow, steps_at
from varstore.view.survey import survey

__all__ = ["STEPS", "write_report"]

STEPS = 32
"""Steps of a run in which norms are measured."""


def write_report(
    path: str, target: str, *, compare_with: str | None = None, steps: int = STEPS, progress: bool = False
) -> tuple[int, int]:
    """Write a report on what `varstore.read` opens at `path` to the file `target`, which appears whole.

    An existing file is replaced. Values are read a few MiB at a time, and not compared with the digests. `compare_with`
    is the path of an earlier one, from which it differs. Of a run, norms are measured in at most so many `steps`.

    Returns:
        How many variables it shows, and its size in bytes.

    Raises:
        VarstoreError: a path cannot be opened or read; see `varstore.stats` and `varstore.diff`.
        StorageError: `target` cannot be written; if its folder does not exist, before anything is read.
    """
    folder, name = os.path.split(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise StorageError("there is no such directory", path=os.path.dirname(target), number=errno.ENOENT)
    opened = vs.read(path)
    data = survey(path, opened, progress=progress)
    if compare_with is not None:
        compare(data, opened, compare_with, progress=progress)
    if (run := steps_at(path)) is not None:
        follow(data, opened, run, most=steps, progress=progress)
    text = document(data).encode()
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise StorageError(f"writing failed: {error.strerror}", path=target, number=error.errno) from error
        raise
    return len(data["variables"]), len(text)
