"""The loose pair of a directory's descriptor and path, which `disk/save` still passes along; see `directory`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from varstore.errors import UnsafeContent
from varstore.layout.location import Location
from varstore.storage.directory import Directory

__all__ = ["not_regular", "open_file", "open_root", "opened_file"]


@contextlib.contextmanager
def open_root(location: Location) -> Iterator[int]:
    """Hold a descriptor of a checkpoint's directory, only if it is still the same checkpoint."""
    with Directory(location) as directory:
        yield directory.fd


def _held(root_fd: int, root: str) -> Directory:
    return Directory(Location(root, root), root_fd)


def open_file(root_fd: int, relative: str, *, root: str, variable: str | None = None) -> int:
    """Open a file below a checkpoint."""
    return _held(root_fd, root).open(relative, variable=variable)


@contextlib.contextmanager
def opened_file(root_fd: int, relative: str, *, root: str, variable: str | None = None) -> Iterator[tuple[int, int]]:
    """Hold a regular file open: its descriptor and its size in bytes."""
    directory = _held(root_fd, root)
    fd = directory.open(relative, variable=variable)
    try:
        yield fd, directory.size(fd, relative, variable)
    finally:
        os.close(fd)


def not_regular(root: str, relative: str, variable: str | None) -> UnsafeContent:
    """Return the error for a pipe, device or directory where a file belongs."""
    return _held(-1, root).not_regular(relative, variable)
