"""A file or folder appears whole or not at all: it is written beside its target and takes the name last."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from varstore.errors import CheckpointExists, OutOfSpace, StorageError, VarstoreError

__all__ = ["new_folder", "replacing"]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a new file beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    Raises:
        OutOfSpace, StorageError: the operating system refused; what stood at `path` is untouched.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        if isinstance(error, StorageError):
            raise
        kind = OutOfSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"cannot write: {error.strerror or error}", path=path, number=error.errno) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a folder beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    Raises:
        CheckpointExists: there is something at `path` other than an empty folder.
        OutOfSpace, StorageError: the operating system refused.
    """
    parent, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(parent, f".{name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise CheckpointExists("the path is taken", path=path, hint="choose another, or remove what is there")
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, VarstoreError):
            raise
        kind = OutOfSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"cannot write: {error.strerror or error}", path=path, number=error.errno) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
