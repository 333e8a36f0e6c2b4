"""Look at what is at a path; `os.path.isdir` and its like take a refusal of the system for "there is nothing"."""

from __future__ import annotations

import os
import stat

from varstore.storage.failures import storage_error

__all__ = ["kind_of"]


def kind_of(path: str | os.PathLike[str]) -> int:
    """Return the kind of what a path leads to, such as `stat.S_IFDIR`; 0 if there is nothing.

    Raises:
        StorageError: the operating system refused.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise storage_error(error, os.fspath(path), "it cannot be examined") from error
