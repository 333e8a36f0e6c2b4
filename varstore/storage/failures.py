"""The one boundary at which what the operating system says becomes an error of varstore's tree."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from varstore.errors import OutOfSpace, StorageError, VarstoreError

__all__ = ["storage_error", "translated"]

_HINTS = {errno.ESPIPE: "the file system takes bytes only in their order; mount rclone with --vfs-cache-mode writes"}


def storage_error(error: OSError, path: str, doing: str) -> StorageError:
    """Return what the operating system said, with the place and what was being done."""
    reason = f"{doing}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(reason, number=error.errno, path=path, hint="free some space and try again")
    return StorageError(reason, number=error.errno, path=path, hint=_HINTS.get(error.errno or 0))


@contextlib.contextmanager
def translated(path: str, doing: str) -> Iterator[None]:
    """Raise every OSError of the block that is not of our tree as a StorageError."""
    try:
        yield
    except VarstoreError:
        raise
    except OSError as error:
        raise storage_error(error, path, doing) from error
