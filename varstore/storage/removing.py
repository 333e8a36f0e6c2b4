"""Remove folders by their descriptors: no link is followed, no other mount is entered.

A path means what it says only at the moment when the kernel follows it. So each folder is opened, and what is in it is
removed by its name there; a folder that is another mount, or a link by then, stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from varstore.layout.names import MANIFEST, MARKER
from varstore.storage import syscalls
from varstore.storage.claims import is_named

__all__ = ["Each", "empty", "remove", "remove_empty", "remove_file", "remove_written"]

Each = Callable[[Iterable[Any], Callable[[Any], object]], None]
"""A function that does something with each of several things, in any order."""

_USUAL = ("out", "meta")
"""What a save writes into a variable's folder."""
_HIDDEN = re.compile(r"\.fuse_hidden[0-9a-f]+")
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}
_PAUSES = (0.01, 0.05, 0.2, 0.5)
_FEW = 3
"""Folders; where there are no more, those in them are removed by the function that is given."""


def remove(name: str, dir_fd: int, *, each: Each | None = None) -> bool:
    """Remove a folder, its marker first: whoever still reads from it sees that it is going. Tell whether it is gone.

    What cannot be removed stays, and so do the folders above it. The folders in it are removed with `each`.
    """
    try:
        fd = syscalls.folder_in(name, dir_fd, same_mount=True)
    except OSError:
        return False
    try:
        remove_file(MARKER, fd)
        empty(fd, each=each)
        if not is_named(fd, name, dir_fd):
            return False
    finally:
        os.close(fd)
    return remove_empty(name, dir_fd)


def empty(fd: int, *, but: Collection[str] = (), each: Each | None = None) -> None:
    """Remove all that can be removed from an open folder, except what has one of these names; see `remove`."""
    try:
        found = [entry for entry in syscalls.entries_in(fd) if entry[0] not in but]
    except OSError:
        return
    folders = [name for name, is_folder in found if is_folder]
    for name, is_folder in found:
        if not is_folder:
            remove_file(name, fd)
    if each is not None and len(folders) > _FEW:
        each(folders, partial(_remove_below, dir_fd=fd))
        return
    for name in folders:  # directly: a function between would halve the depth that the recursion limit allows
        _remove_below(name, fd, each=each)


def _remove_below(name: str, dir_fd: int, *, each: Each | None = None) -> None:
    try:
        fd = syscalls.folder_in(name, dir_fd, same_mount=True)
    except OSError:
        return
    try:
        is_usual = remove_file("out", fd) and remove_file("meta", fd)
        if not (is_usual and remove_empty(name, dir_fd)):  # there is more than in most folders of a checkpoint
            empty(fd, each=each)
            remove_empty(name, dir_fd)
    finally:
        os.close(fd)


def remove_written(name: str, dir_fd: int) -> None:
    """Remove what a save writes into a folder, ``out`` and ``meta`` in it and below, and what is empty then.

    What somebody put beside it stays, and so does another checkpoint.
    """
    with contextlib.suppress(OSError):
        fd = syscalls.folder_in(name, dir_fd, same_mount=True)
        try:
            found = dict(syscalls.entries_in(fd))
            if MARKER in found or MANIFEST in found:
                return
            for below, is_folder in found.items():
                if is_folder:
                    remove_written(below, fd)
                elif below in _USUAL:
                    remove_file(below, fd)
        finally:
            os.close(fd)
        remove_empty(name, dir_fd)


def remove_file(name: str, dir_fd: int) -> bool:
    """Remove a file, or a link itself, if that can be; tell whether it was."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:
        return False
    return True


def remove_empty(name: str, dir_fd: int) -> bool:
    """Remove a folder, if that can be; tell whether it is gone.

    A file of FUSE that was closed a moment ago is only hidden when it is removed, and goes a moment later.
    """
    for pause in (*_PAUSES, None):
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if pause is None or error.errno not in _NOT_EMPTY or not _holds_only_hidden(name, dir_fd):
                return False
            time.sleep(pause)
        else:
            return True
    return False


def _holds_only_hidden(name: str, dir_fd: int) -> bool:
    with contextlib.suppress(OSError):
        fd = syscalls.folder_in(name, dir_fd)
        try:
            return all(map(_HIDDEN.match, syscalls.names_in(fd)))
        finally:
            os.close(fd)
    return False
