"""The files of a save that exist already: each gets a second name or, where it cannot, is copied in the kernel.

A variable of another checkpoint, and one that is tied to another of this save, is a hard link. What the link names
must be what was looked at. Someone may put a symbolic link, or another file, at the path between the look and the
link, and a hard link to a symbolic link is a second name of the link, not of the file. So the file is opened first,
following no link that leads out of its checkpoint, and its size is compared with what the checkpoint promises; then
the new name, which nobody else knows yet, must turn out to be that very file, or it is taken away again.

Links are made by the thread that makes the jobs, one after the other: threads that make them wait for each other in
the kernel. What takes longer (copies between file systems, digests that are not known yet) becomes a job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable
from functools import partial
from typing import NamedTuple

from varstore.disk.blocks import digest_file_block, new_file, spans
from varstore.disk.save.small_files import SmallFiles
from varstore.disk.save.staging import Staging
from varstore.disk.threads import Job
from varstore.errors import FormatError, SizeMismatch
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.meta import encode_meta
from varstore.storage.directory import Directory
from varstore.text.hints import plural
from varstore.values.arrays import Stored
from varstore.values.plan import PlannedVariable

__all__ = ["Links"]

_BATCH = 64
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES, errno.ENOSYS}
_COPY_STEP = 1 << 20


class Links:
    """Links variables into the staging folder; their digests go to `digests`, by name."""

    def __init__(self, staging: Staging, small: SmallFiles, digests: dict[str, bytes]) -> None:
        self._fd = staging.fd
        self._own = Directory(Location(staging.path, staging.path), staging.fd)
        self._sync = staging.durability.each
        self._small = small
        self._digests = digests
        self._batches: defaultdict[Hashable, list[tuple[PlannedVariable, Stored]]] = defaultdict(list)
        self._lock = threading.Lock()
        self.copied = 0
        """Bytes of variables that were to be linked and had to be copied."""

    def add(self, variable: PlannedVariable, stored: Stored) -> Iterable[Job]:
        """Note a variable of another checkpoint, and link those of that checkpoint where they make a batch.

        Returns what takes longer: copies and unknown digests.
        """
        batch = self._batches[stored.location]
        batch.append((variable, stored))
        return self._link(self._batches.pop(stored.location)) if len(batch) == _BATCH else ()

    def add_rest(self) -> Iterable[Job]:
        """Link the variables that were noted and are not linked yet; returns what `add` does."""
        for batch in self._batches.values():
            yield from self._link(batch)

    def tie(self, variables: Iterable[PlannedVariable]) -> None:
        """Link those that share memory with another of these, which must be written."""
        first = {v.name: v for v in variables}
        for variable in variables:
            if variable.alias_of:
                self._small.write_meta(variable)
                path = first[variable.alias_of].folder + "/out"
                origin = Origin(self._own, path, variable.nbytes, variable.alias_of)
                if not self._link_out(variable, origin):
                    self._copy_out(variable, origin)
                self._digests[variable.name] = self._digests[variable.alias_of]

    def _link(self, batch: list[tuple[PlannedVariable, Stored]]) -> list[Job]:
        later: list[Job] = []
        with Directory(batch[0][1].location) as directory:
            for variable, stored in batch:
                entry = stored.entry
                if not self._link_out(variable, _origin(variable, entry, directory)):
                    self._small.write_meta(variable)
                    later.append(partial(self._copy, variable, stored))
                    continue
                if not self._link_meta(variable, entry, directory):
                    self._small.write_meta(variable)
                if entry.digests or not entry.nbytes:
                    self._digests[variable.name] = entry.digests
                else:
                    later.append(partial(self._digest, variable))
        return later

    def _link_out(self, variable: PlannedVariable, origin: Origin) -> bool:
        return _link(origin, variable.folder + "/out", dir_fd=self._fd, fsync=self._sync)

    def _link_meta(self, variable: PlannedVariable, entry: Entry, directory: Directory) -> bool:
        """Link a ``meta`` that is, to the byte, what would be written here."""
        text = encode_meta(variable.meta)
        origin = Origin(directory, f"{entry.folder}/meta", len(text), entry.name)
        with contextlib.suppress(FormatError):  # damaged or spelt otherwise: it is written anew
            return _link(origin, variable.folder + "/meta", dir_fd=self._fd, fsync=self._sync, content=text)
        return False

    def _copy(self, variable: PlannedVariable, stored: Stored) -> None:
        entry = stored.entry
        with Directory(stored.location) as directory:
            self._copy_out(variable, _origin(variable, entry, directory))
        self._digests[variable.name] = entry.digests
        if not entry.digests:
            self._digest(variable)

    def _copy_out(self, variable: PlannedVariable, origin: Origin) -> None:
        with self._lock:
            self.copied += variable.nbytes
        _copy(origin, variable.folder + "/out", dir_fd=self._fd, fsync=self._sync)

    def _digest(self, variable: PlannedVariable) -> None:
        with self._own.file(variable, "out") as (fd, size):
            self._digests[variable.name] = b"".join(digest_file_block(fd, start, stop) for start, stop in spans(size))


class Origin(NamedTuple):
    """A variable's file of `nbytes`, at `path` below a checkpoint's directory."""

    directory: Directory
    path: str
    nbytes: int
    variable: str


def _link(origin: Origin, target: str, *, dir_fd: int, fsync: bool, content: bytes | None = None) -> bool:
    """Make `target`, relative to `dir_fd`, the same file, if that can be, and if it holds the `content` given.

    Raises:
        SizeMismatch: the file is not of the size that its checkpoint promised.
        UnsafeContent: it is a link that leads out, or no regular file.
        FormatError: there is no such file.
    """
    fd = origin.directory.open(origin.path, variable=origin.variable)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise origin.directory.not_regular(origin.path, origin.variable)
        _check_size(status.st_size, origin)
        if content is not None and os.pread(fd, origin.nbytes, 0) != content:
            return False
        try:
            os.link(origin.path, target, src_dir_fd=origin.directory.fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            return False
        if not os.path.samestat(os.stat(target, dir_fd=dir_fd, follow_symlinks=False), status):
            os.unlink(target, dir_fd=dir_fd)  # a second name of a symbolic link, not of the file
            return False
        if fsync:
            os.fsync(fd)
        return True
    finally:
        os.close(fd)


def _copy(origin: Origin, target: str, *, dir_fd: int, fsync: bool) -> None:
    """Make `target`, relative to `dir_fd`, a file of the same bytes; raises what `_link` does."""
    source = origin.directory.open(origin.path, variable=origin.variable)
    try:
        size = origin.directory.size(source, origin.path, origin.variable)
        _check_size(size, origin)
        fd = new_file(target, dir_fd=dir_fd)
        try:
            done = 0
            while done < size:
                done += _copy_range(source, fd, size - done, done)
            if fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        os.close(source)


def _origin(variable: PlannedVariable, entry: Entry, directory: Directory) -> Origin:
    return Origin(directory, f"{entry.folder}/out", variable.nbytes, entry.name)


def _check_size(size: int, origin: Origin) -> None:
    if size != origin.nbytes:
        raise SizeMismatch(
            "the file is not as long as its checkpoint says",
            path=origin.directory.place(origin.path),
            variable=origin.variable,
            found=plural(size, "byte"),
            expected=plural(origin.nbytes, "byte"),
            hint="verify that checkpoint",
        )


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    try:
        copied = os.copy_file_range(source, target, count, offset, offset)
    except OSError as error:
        if error.errno not in _CANNOT_LINK | {errno.EINVAL}:
            raise
        copied = os.pwrite(target, os.pread(source, min(count, _COPY_STEP), offset), offset)
    if copied == 0:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return copied
