"""The one boundary at which what the operating system says becomes an error of varstore's tree."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from types import TracebackType

from varstore.errors import CheckpointNotFound, OutOfSpace, StorageError, VarstoreError

__all__ = ["no_directory", "storage_error", "translated"]

_HINTS = {errno.ESPIPE: "the file system takes bytes only in their order; mount rclone with --vfs-cache-mode writes"}


def storage_error(error: OSError, path: str, doing: str) -> StorageError:
    """Return what the operating system said, with the place and what was being done."""
    reason = f"{doing}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(reason, number=error.errno, path=path, hint="free some space and try again")
    return StorageError(reason, number=error.errno, path=path, hint=_HINTS.get(error.errno or 0))


def no_directory(path: str) -> CheckpointNotFound:
    """Return the error for a path that should lead to a directory and does not."""
    if os.path.lexists(path):
        return CheckpointNotFound("this is a file, and a directory is expected", path=path)
    return CheckpointNotFound("there is no such directory", path=path)


def translated(path: str, doing: str) -> AbstractContextManager[None]:
    """Raise every OSError of the ``with`` block that is not of our tree as a StorageError."""
    return _Translation(path, doing)


class _Translation(AbstractContextManager[None]):
    """A class, since entering a generator costs as much as a call of the system, and every read enters this."""

    __slots__ = ("_doing", "_path")

    def __init__(self, path: str, doing: str) -> None:
        self._path = path
        self._doing = doing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, VarstoreError):
            raise storage_error(error, self._path, self._doing) from error
