"""Make the folders of a save, each by the descriptor of the one that holds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from varstore.disk.threads import for_each
from varstore.errors import InvalidName
from varstore.storage import syscalls

__all__ = ["make_folders", "make_folders_by_level"]


def make_folders(names: Mapping[str, str], root: int, *, private: bool) -> None:
    """Make folders in an open one, in this order.

    `names` has, for each folder, what it is made for. In a folder that is `private`, to which only this user has
    access, a path is what it says. Elsewhere a part of it may become a link, so the folder that holds the next one is
    opened; it stays open, as variables come in groups.

    Raises:
        InvalidName: something has the name of a folder.
        OSError: a part of a path is a link, or the disk refused.
    """
    holder, fd = "", root
    try:
        for folder, name in names.items():
            above, _, last = ("", "", folder) if private else folder.rpartition("/")
            if above != holder:
                last_fd, holder, fd = fd, "", root  # before it is closed, since Ctrl-C may come just after that
                if last_fd != root:
                    os.close(last_fd)
                if above:
                    holder, fd = above, syscalls.folder_in(above, root)
            try:
                os.mkdir(last, dir_fd=fd)
            except FileExistsError as error:
                raise InvalidName(
                    "another variable already uses this folder: the file system ignores differences in case or accents",
                    variable=name,
                    found=folder,
                    hint="rename one of the two",
                ) from error
    finally:
        if fd != root:
            os.close(fd)


def make_folders_by_level(names: Mapping[str, str], root: int, *, private: bool, threads: int) -> None:
    """Make folders as `make_folders` does, those of one depth at the same time, for file systems whose calls wait.

    The kernel makes one folder at a time in each that holds some.
    """
    levels: dict[int, list[dict[str, str]]] = {}
    for folder, name in names.items():
        levels.setdefault(folder.count("/"), []).append({folder: name})
    for _, level in sorted(levels.items()):
        for_each(level, partial(make_folders, root=root, private=private), threads=threads)
