"""A file or folder appears whole or not at all: it is written beside its target and takes the name last."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from varstore.errors import CheckpointExists, StorageError, VarstoreError
from varstore.storage import syscalls
from varstore.storage.failures import storage_error

__all__ = ["new_folder", "replacing", "target_of"]


def target_of(path: str) -> str:
    """Return the absolute path at which something new may appear: its directory is resolved, its own name is not.

    Whoever may write to the directory could plant a link there, which would turn what is written elsewhere.

    Raises:
        CheckpointExists: there is a symbolic link at `path`.
    """
    folder, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", os.curdir, os.pardir):  # no name of its own, so nobody planted it
        return os.path.realpath(path)
    target = os.path.join(os.path.realpath(folder), name)
    if os.path.islink(target):
        raise CheckpointExists(
            "there is a symbolic link at this path, and what is written never follows one",
            path=path,
            found=f"a link to {os.readlink(target)!r}",
            hint="remove the link, or name the place that it leads to",
        )
    return target


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Open a new file beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    Raises:
        CheckpointExists: there is a symbolic link at `path`.
        OutOfSpace, StorageError: the operating system refused; what stood at `path` is untouched.
    """
    target = target_of(path)
    temporary = _beside(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            syscalls.sync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        _remove(temporary)
        if isinstance(error, StorageError):
            raise
        raise storage_error(error, path, "writing failed") from error
    except BaseException:
        _remove(temporary)
        raise


def _beside(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name[:200]}.{os.urandom(4).hex()}.tmp")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Make a folder beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    Raises:
        CheckpointExists: there is something at `path` other than an empty folder, a symbolic link too.
        OutOfSpace, StorageError: the operating system refused.
    """
    target = target_of(path)
    temporary = _beside(target)
    try:
        if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
            raise CheckpointExists("the path is taken", path=path, hint="choose another, or remove what is there")
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        _remove_tree(temporary)
        if isinstance(error, VarstoreError):
            raise
        raise storage_error(error, path, "writing failed") from error
    except BaseException:
        _remove_tree(temporary)
        raise
