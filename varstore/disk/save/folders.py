"""Make the folders of a save, each by the descriptor of the one that holds it."""

from __future__ import annotations

import os

from varstore.storage import syscalls

__all__ = ["Folders"]


class Folders:
    """Folders below an open one; the one that held the last is kept open, since variables come in groups."""

    def __init__(self, fd: int) -> None:
        self._root = self._fd = fd
        self._holder = ""

    def make(self, folder: str) -> None:
        """Make a folder whose holder exists; no part of its path may be a link.

        Raises:
            OSError: FileExistsError if something has its name.
        """
        holder, _, name = folder.rpartition("/")
        if holder != self._holder:
            self.close()
            self._fd = syscalls.folder_in(holder, self._root) if holder else self._root
            self._holder = holder
        os.mkdir(name, dir_fd=self._fd)

    def close(self) -> None:
        """Give up the descriptor."""
        fd, self._fd, self._holder = self._fd, self._root, ""
        if fd != self._root:
            os.close(fd)
