"""A report in one file of HTML, which needs no network and no server."""

from __future__ import annotations

import contextlib
import os
import tempfile

from varstore.view.page import document
from varstore.view.survey import survey

__all__ = ["write_report"]


def write_report(path: str, target: str, *, progress: bool = False) -> tuple[int, int]:
    """Write a report on what `varstore.read` opens at `path` to the file `target`, which appears whole.

    An existing file is replaced. Values are read a few MiB at a time, and not compared with the digests.

    Returns:
        How many variables it shows, and its size in bytes.

    Raises:
        VarstoreError: `path` cannot be opened or read; see `varstore.stats`.
        OSError: `target` cannot be written.
    """
    data = survey(path, progress=progress)
    text = document(data).encode()
    folder, name = os.path.split(os.path.abspath(target))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name[:100]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return len(data["variables"]), len(text)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
