"""How a save outlives a power cut: what is made durable, in which order, and with which calls.

The law: nothing is durable before what it vouches for. A power cut may come between any two calls, and a file
system may write back what was written in any order, so each step waits for the one before it:

1. every ``out`` and ``meta``, then the folders that hold their names;
2. the manifest, whose digests vouch for them;
3. the marker, which vouches for the manifest, then the staging folder, which holds the names of both;
4. the rename that gives the checkpoint its name, then the parent folder, which holds that name, and each parent
   folder that the save had to make;
5. only then may an old checkpoint go, whose place the new one took.

Step 1 is `Durability`'s; steps 2 to 5 are `Staging.commit`'s. For step 1 there are two ways. A file system that
is flushed whole (syncfs) writes thousands of files in the time of a few, but waits for the data of other programs
as well. So a save of a few variables syncs each file as it is written, and a larger one flushes once, at the end.
Where that call is missing, or does not reach the store (FUSE, 9p and SMB answer it at once), each file is synced at
the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import NamedTuple

from varstore.disk.threads import for_each
from varstore.storage import syscalls

__all__ = ["SYNC_EACH", "Durability", "is_synced_whole", "sync_each"]

SYNC_EACH = 4
"""Variables; a durable save of more flushes the file system once instead of every file."""


class Durability(NamedTuple):
    """What one save does to make its files durable: nothing, or one of the two ways.

    With `each`, every file is made durable as it is written.
    """

    durable: bool
    each: bool

    def sync_all(
        self,
        dir_fd: int,
        variables: Collection[str],
        parents: Collection[str],
        attached: Iterable[str] = (),
        *,
        threads: int = 1,
    ) -> None:
        """Make durable what was written below a folder: those of variables with their files, and their parents.

        The names of `attached` files are made durable with the folder itself, at the commit.

        More `threads` are for file systems whose calls wait for a server.

        Raises:
            OSError: the disk refused, and what was written may be lost.
        """
        if not self.durable:
            return
        if not self.each and is_synced_whole(dir_fd):
            return
        files = [f"{folder}/{name}" for folder in variables for name in ("meta", "out")]
        files += attached
        if self.each:
            files = []
        if threads == 1:
            sync_each(dir_fd, files, {*parents, *variables})
            return
        for_each(files, partial(syscalls.sync_path, dir_fd=dir_fd), threads=threads)
        for_each({*parents, *variables}, partial(syscalls.sync_path, folder=True, dir_fd=dir_fd), threads=threads)


def is_synced_whole(fd: int) -> bool:
    """Make a file system durable with one call; false if there is none that reaches its store.

    Raises:
        OSError: the disk refused, and what was written may be lost.
    """
    try:
        syscalls.sync_file_system(fd)
    except OSError as error:
        if not syscalls.is_missing(error):
            raise
        return False
    return True


def sync_each(dir_fd: int, files: Iterable[str], folders: Iterable[str]) -> None:
    """Make files durable, and then folders; their paths are relative to an open one."""
    for path in files:
        syscalls.sync_path(path, dir_fd=dir_fd)
    for path in folders:
        syscalls.sync_path(path, folder=True, dir_fd=dir_fd)
