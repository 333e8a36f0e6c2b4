"""The variables of a save with an encoding: each ``out`` is a shard of compressed chunks (FORMAT F9).

Threads compress groups of chunks, each its own. Where a chunk lies is known only when those before it are compressed,
so a group is written by the thread that made the last one that was missing. Where compression saves next to nothing,
the values are written as they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from varstore.disk.blocks import BlockHasher, digest_block, spans, write_block
from varstore.disk.encodings.companions import read_level, shard_of
from varstore.disk.encodings.zarr import index, pack
from varstore.disk.save.staging import Staging
from varstore.disk.threads import Lane
from varstore.errors import FormatError, StorageError
from varstore.layout.encodings import RAW, ZARR
from varstore.layout.manifest import BLOCK, Entry
from varstore.layout.shards import DOCUMENT, LEVELS, SMALLEST, Level, Shard
from varstore.storage import syscalls
from varstore.storage.directory import Directory, closing
from varstore.values.plan import Outcome, PlannedVariable, SavePlan

__all__ = ["EncodedFiles", "copy_companions", "require_links"]

_AT_MOST = 0.97
"""Of the size of the values; what is not smaller than that is not worth decoding."""


class EncodedFiles:
    """Makes the jobs that write encoded variables; their digests go to `digests` and `outcomes`, by name."""

    def __init__(
        self,
        staging: Staging,
        digests: dict[str, bytes],
        outcomes: dict[str, Outcome],
        advance: Callable[[int], None] | None,
        plan: SavePlan,
    ) -> None:
        self._staging = staging
        self._digests = digests
        self._outcomes = outcomes
        self._advance = advance
        self._level = plan.level
        self._parents = frozenset(plan.parents)
        self._used = plan.used
        self._open: set[_ShardFile] = set()
        self.folders: list[str] = []
        """Folders that have a ``zarr.json``."""

    def takes(self, variable: PlannedVariable) -> bool:
        """Return whether a variable is to be encoded: not a small one, nor one that a graph reads or above another."""
        is_free = variable.folder not in self._parents and variable.name not in self._used
        return variable.nbytes >= SMALLEST and is_free

    def lane(self, variable: PlannedVariable, array: np.ndarray, ended: Callable[[], None] | None) -> Lane:
        """Create the file and return what writes it; `ended`, if given, is called at its end."""
        out = _ShardFile(variable.file, array, self._level, dir_fd=self._staging.fd)
        self._open.add(out)
        step = max(1, BLOCK // out.shard.chunk_nbytes)
        groups = [(start, min(start + step, out.shard.count)) for start in range(0, out.shard.count, step)]
        return Lane(groups, partial(self._write, variable, out, ended))

    def _write(
        self, variable: PlannedVariable, out: _ShardFile, ended: Callable[[], None] | None, start: int, stop: int
    ) -> None:
        nbytes = out.write(start, stop)
        if out.is_written:
            sync = self._staging.durability.each
            self._digests[variable.name], outcome = out.finish(fsync=sync)
            self._outcomes[variable.name] = outcome
            self._open.remove(out)
            if outcome.encoding == ZARR.name:
                self.folders.append(variable.folder)
                _write_companions(variable.folder, out.shard, self._level, self._staging.fd, sync=sync)
            if ended:
                ended()
        if self._advance:
            self._advance(nbytes)

    def close(self) -> None:
        """Give up the files of a save that failed."""
        for out in self._open:
            out.close()


class _ShardFile:
    """A new ``out``: `write` its groups of chunks from any thread, and `finish` when all are written."""

    def __init__(self, path: str, array: np.ndarray, level: Level, *, dir_fd: int) -> None:
        self._values = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        self.shard = Shard(array.shape, self._values.dtype)
        self._level = level
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[int, list[bytes]]] = {}
        self._next = 0
        self._sizes: list[int] = []
        self._offset = 0
        self._hasher = BlockHasher()
        self._claimed = False
        opened: list[int] = []
        self._closing = closing(opened)
        self._fd = syscalls.create(path, dir_fd)
        opened.append(self._fd)

    @property
    def is_written(self) -> bool:
        """Whether all chunks are written; true for the one thread that asks first."""
        with self._lock:
            is_first = self._next == self.shard.count and not self._claimed
            self._claimed = self._claimed or is_first
            return is_first

    def write(self, start: int, stop: int) -> int:
        """Compress these chunks and write what is in turn; return the number of bytes of values."""
        packed = pack(self._values, self.shard, range(start, stop), self._level)
        with self._lock:
            self._waiting[start] = (stop, packed)
            while (group := self._waiting.pop(self._next, None)) is not None:
                self._next, chunks = group
                self._sizes += map(len, chunks)
                self._append(b"".join(chunks))
        # Another thread may have ended the file by now, and have let go of the values.
        first, last = self.shard.chunks.numbered(start)[0], self.shard.chunks.numbered(stop - 1)[1]
        return (last - first) * self.shard.dtype.itemsize

    def _append(self, data: bytes) -> None:
        syscalls.write_all(self._fd, data, self._offset)
        self._hasher.update(memoryview(data))
        self._offset += len(data)

    def finish(self, *, fsync: bool) -> tuple[bytes, Outcome]:
        """Write the index, or the values where they take no more; return the digests, and what it became."""
        values = self._values
        try:
            if self._offset + self.shard.index_nbytes > _AT_MOST * values.nbytes:
                os.ftruncate(self._fd, 0)
                digests = b"".join(write_block(self._fd, values, start, stop) for start, stop in spans(values.nbytes))
                outcome = Outcome(RAW.name, values.nbytes, b"")
            else:
                self._append(index(self._sizes))
                digests = self._hasher.digests()
                content = b"".join(digest_block(values, start, stop) for start, stop in spans(values.nbytes))
                outcome = Outcome(ZARR.name, self._offset, content)
            if fsync:
                syscalls.sync(self._fd)
        finally:
            self.close()
            del self._values
        return digests, outcome

    def close(self) -> None:
        """Give up the descriptor."""
        self._closing.close()


def _write_companions(folder: str, shard: Shard, level: Level, root: int, *, sync: bool) -> None:
    """Write what lets zarr open the folder: ``zarr.json``, and the link with the name of the only chunk."""
    fd = syscalls.folder_in(folder, root)
    try:
        syscalls.write_file(DOCUMENT, shard.document(level), fd, durable=sync)
        os.symlink("out", shard.link, dir_fd=fd)
    finally:
        os.close(fd)


def copy_companions(directory: Directory, entry: Entry, folder: str, root: int, *, sync: bool) -> None:
    """Write what lies beside the ``out`` of an encoded variable of a checkpoint into another folder.

    Where its ``zarr.json`` does not say the level, any will do: compressed bytes themselves say how to decompress them.
    """
    shard = shard_of(entry, path=directory.path)
    if shard is None:
        return
    try:
        level = read_level(directory, entry)
    except FormatError:
        level = LEVELS[0]
    _write_companions(folder, shard, level, root, sync=sync)


def require_links(staging: Staging) -> None:
    """Check that the file system has symbolic links, before anything is written.

    Raises:
        StorageError: it does not.
    """
    name = ".link"
    try:
        os.symlink("out", name, dir_fd=staging.fd)
    except OSError as error:
        raise StorageError(
            "the encoding 'zarr' needs symbolic links, which this file system does not have",
            path=staging.target.path,
            found=str(error),
            hint="save raw values there, with encoding='raw', or unpack to it",
        ) from error
    os.unlink(name, dir_fd=staging.fd)
