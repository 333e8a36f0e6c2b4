"""The files of a save that exist already: each gets a second name or, where it cannot, is copied in the kernel.

A variable of another checkpoint, and one that is tied to another of this save, is a hard link. What gets the new name
must be a file of that checkpoint, and not what a symbolic link in it leads to. So its folder is opened once, following
no link that leads out, and both files are linked from there. Only then is the new name looked at, which nobody else
knows: whatever may be put in the old place meanwhile, what was looked at is what the save holds. A hard link to a
symbolic link, a file of another size than its checkpoint promises, a ``meta`` that says something else: each is found
at the new name, and taken away again.

Links are made by the thread that makes the jobs, one after the other: threads that make them wait for each other in
the kernel. What takes longer (copies between file systems, digests that are not known yet, and all links where calls
wait for a server) becomes a job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from varstore.disk.blocks import digest_file_block, spans, write_out
from varstore.disk.regions import digest_regions
from varstore.disk.save.encoded import copy_companions
from varstore.disk.save.leftovers import CHANGEABLE
from varstore.disk.save.small_files import SmallFiles
from varstore.disk.save.staging import Staging
from varstore.disk.threads import Job
from varstore.errors import DigestMismatch, FormatError, VarstoreError
from varstore.layout.attached import FileEntry
from varstore.layout.encodings import RAW, ZARR, is_plain
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.meta import encode_meta
from varstore.layout.shards import DOCUMENT, chunk_link
from varstore.storage import syscalls
from varstore.storage.directory import Directory
from varstore.values.arrays import Stored
from varstore.values.attached import PlannedFile, StoredFile
from varstore.values.lazy import LazyArray
from varstore.values.plan import Outcome, PlannedVariable

__all__ = ["Links"]

_GONE = (VarstoreError, OSError)
"""What reading from another checkpoint raises; an error of our own disk comes again when values are written."""
_NOT_COPIED = {errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.EMFILE, errno.ENFILE}
"""Where a link fails so, a copy would too; where a file system refuses links for any other reason, copying helps."""
_New = PlannedVariable | PlannedFile
_Original = PlannedVariable | Entry | FileEntry
_READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class Links:
    """Links variables into the staging folder; their digests go to `digests`, by name."""

    def __init__(
        self,
        staging: Staging,
        small: SmallFiles,
        digests: dict[str, bytes],
        outcomes: dict[str, Outcome],
        values: Mapping[str, np.ndarray | LazyArray],
        batch: int,
        make: Callable[[Iterable[PlannedVariable]], None] | None,
        *,
        shares: bool,
        are_compared: bool = False,
    ) -> None:
        """Prepare to link variables, so many in one batch, or to copy them; `make` is as for `SmallFiles`.

        If they `are_compared` with what graphs have of them, all need digests, also those that have regions.
        """
        self._are_compared = are_compared
        self._outcomes = outcomes
        self._fd = staging.fd
        self._place = Location(staging.path, staging.path)
        self._shares = shares
        self._owner = staging.owner
        self._values = values
        self._sync = staging.durability.each
        self._small = small
        self._digests = digests
        self.batches: defaultdict[Location, list[tuple[PlannedVariable, Stored]]] = defaultdict(list)
        self._limit = batch
        self._make = make
        self._lock = threading.Lock()
        self.encoded: list[str] = []
        """Folders that have a ``zarr.json``."""
        self.copied = 0
        """Bytes of variables that were to be linked and had to be copied."""

    def add(self, variable: PlannedVariable, stored: Stored) -> Iterable[Job]:
        """Note a variable of another checkpoint, and link those of that checkpoint where they make a batch.

        Returns what takes longer: copies and unknown digests.

        Raises:
            SizeMismatch: a file is not of the size that its checkpoint promised.
            UnsafeContent: it is a link that leads out, or not a regular file.
            FormatError: there is no such file.
        """
        batch = self.batches[stored.location]
        batch.append((variable, stored))
        return self._linking(self.batches.pop(stored.location)) if len(batch) == self._limit else ()

    def add_rest(self) -> Iterable[Job]:
        """Link the variables that were noted and are not linked yet; returns and raises what `add` does."""
        for batch in self.batches.values():
            yield from self._linking(batch)

    def tie(self, variables: Iterable[PlannedVariable]) -> None:
        """Link those that share memory with another of these, whose files must be written by now."""
        written = {variable.name: variable for variable in variables}
        for variable in variables:
            if variable.alias_of:
                first = written[variable.alias_of]
                if (outcome := self._outcomes.get(first.name)) is not None:
                    first = first._replace(nbytes=outcome.nbytes)
                self._small.write_meta(variable)
                self._tie_companions(variable, first)
                if not self._link_out(variable, first, self._here, self._fd, f"{first.folder}/out"):
                    self._copy_out(variable, self._here, first)
                self._digests[variable.name] = self._digests[first.name]

    def _tie_companions(self, variable: PlannedVariable, first: PlannedVariable) -> None:
        outcome = self._outcomes.get(first.name)
        encoding = outcome.encoding if outcome else first.entry(b"").encoding
        if encoding == ZARR.name:
            entry = first.entry(b"")._replace(encoding=encoding)
            copy_companions(self._here, entry, variable.folder, self._fd, sync=self._sync)
            self.encoded.append(variable.folder)

    @property
    def _here(self) -> Directory:
        """The staging folder."""
        return Directory(self._place, self._fd)

    def _linking(self, batch: list[tuple[PlannedVariable, Stored]]) -> Iterable[Job]:
        """Link a batch, or return the job that does."""
        return (partial(self._make_and_link, batch),) if self._make else self._link(batch)

    def _make_and_link(self, batch: list[tuple[PlannedVariable, Stored]]) -> None:
        assert self._make is not None
        self._make(variable for variable, _ in batch)
        for job in self._link(batch):
            job()

    def _link(self, batch: list[tuple[PlannedVariable, Stored]]) -> list[Job]:
        later: list[Job] = []
        try:
            with Directory(batch[0][1].location) as directory:
                for variable, stored in batch:
                    try:
                        later += self._link_one(variable, stored, directory)
                    except _GONE as error:
                        later.append(self._instead(variable, error))
        except _GONE as error:  # the checkpoint cannot be opened: none of them was linked
            later = [self._instead(variable, error) for variable, _ in batch]
        return later

    def _instead(self, variable: PlannedVariable, error: Exception) -> Job:
        """Return the job that writes what could not be had from the base; raise the error if the values are not here.

        A base saves time and space, and nothing depends on it: it may go, or be replaced, while it is used.
        """
        if variable.name not in self._values:
            raise error
        return partial(self._write, variable)

    def _write(self, variable: PlannedVariable) -> None:
        names = ["out", "meta"]
        if is_encoded := not is_plain(variable.entry(b"").encoding):
            names += [DOCUMENT, chunk_link(len(variable.meta.shape))]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{variable.folder}/{name}", dir_fd=self._fd)
        values = self._values[variable.name]
        array = values.numpy() if isinstance(values, LazyArray) else values
        self._small.write_meta(variable)
        self._digests[variable.name] = write_out(variable.folder + "/out", array, self._fd, sync=self._sync)
        if is_encoded:
            self._outcomes[variable.name] = Outcome(RAW.name, array.nbytes, b"")

    def _link_one(self, variable: PlannedVariable, stored: Stored, directory: Directory) -> Iterable[Job]:
        entry = stored.entry
        try:
            folder_fd = directory.open(entry.folder, variable=entry.name, folder=True)
        except FormatError:  # to be said of the file, by the copy
            self._small.write_meta(variable)
            return (partial(self._copy, variable, stored),)
        try:
            is_linked = self._link_out(variable, entry, directory, folder_fd, "out")
            if not (is_linked and self._link_meta(variable, folder_fd)):
                self._small.write_meta(variable)
            if entry.encoding == ZARR.name:
                copy_companions(directory, entry, variable.folder, self._fd, sync=self._sync)
                self.encoded.append(variable.folder)
        finally:
            os.close(folder_fd)
        if not is_linked:
            return (partial(self._copy, variable, stored),)
        if entry.digests or not entry.nbytes or (entry.regions and not self._are_compared):
            self._digests[variable.name] = entry.digests
            return ()
        return (partial(self._digest_checked, variable, directory.location, entry),)

    def add_file(self, file: PlannedFile, stored: StoredFile) -> None:
        """Link an attached file of another checkpoint, or copy it; raises what `add` does."""
        with Directory(stored.location) as directory:
            directory.check_regular(stored.entry.file)
            if self._link_out(file, stored.entry, directory, directory.fd, stored.entry.file):
                self._digests[file.name] = stored.entry.digests
            else:
                self._copy_checked(file, directory, stored.entry)

    def _link_out(self, variable: _New, original: _Original, directory: Directory, folder_fd: int, name: str) -> bool:
        """Give ``out``, or an attached file, its new name, if that can be; only a file of ours is safe from its owner.

        A file that was locked away is not handed on either, nor is an attached one that may be executed.
        """
        target = variable.file
        if not self._may_link(directory) or not _linked(name, folder_fd, target, self._fd):
            return False
        status = os.stat(target, dir_fd=self._fd, follow_symlinks=False)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_mode & _READABLE and status.st_uid == self._owner
        if not is_ours or (not variable.folder and status.st_mode & CHANGEABLE):
            os.unlink(target, dir_fd=self._fd)
            return False
        directory.check_size(original, status.st_size)
        if self._sync:
            syscalls.sync_path(target, dir_fd=self._fd)
        return True

    def _may_link(self, directory: Directory) -> bool:
        """Tell whether a file of a checkpoint may get a second name, in the one that is being saved."""
        return self._shares and not directory.location.unshared

    def _link_meta(self, variable: PlannedVariable, folder_fd: int) -> bool:
        """Give ``meta`` its new name, if it is, to the byte, what would be written there."""
        target = variable.folder + "/meta"
        if not _linked("meta", folder_fd, target, self._fd):
            return False
        if not self._holds(target, encode_meta(variable.meta)):
            os.unlink(target, dir_fd=self._fd)
            return False
        return True

    def _holds(self, path: str, content: bytes) -> bool:
        """Tell whether a file of ours holds exactly this, and make it durable; links, pipes and others do not."""
        try:
            fd = syscalls.open_fd(path, syscalls.READ_FILE, dir_fd=self._fd)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_uid != self._owner or syscalls.pread(fd, len(content) + 1, 0) != content:
                return False
        except OSError:
            return False
        else:
            if self._sync:
                syscalls.sync(fd)
            return True
        finally:
            os.close(fd)

    def _copy(self, variable: PlannedVariable, stored: Stored) -> None:
        try:
            with Directory(stored.location) as directory:
                self._copy_checked(variable, directory, stored.entry)
        except _GONE as error:
            self._instead(variable, error)()

    def _copy_checked(self, variable: _New, directory: Directory, entry: Entry | FileEntry) -> None:
        owner = self._copy_out(variable, directory, entry)
        known = entry.digests
        self._digests[variable.name] = known
        has_regions = isinstance(entry, Entry) and bool(entry.regions)
        if owner != self._owner or not (known or has_regions) or (has_regions and self._are_compared):
            self._digest_checked(variable, directory.location, entry)

    def _digest_checked(self, variable: _New, origin: Location, entry: Entry | FileEntry) -> None:
        """Find out the digests of a new file, which must be those that the entry of the old one has, if it has any."""
        self._digest(variable)
        is_damaged = bool(entry.digests) and self._digests[variable.name] != entry.digests
        if isinstance(entry, Entry) and entry.regions:
            with self._here.out(variable) as fd:
                is_damaged = any(digests != region.digests for region, digests in digest_regions(fd, entry))
        if is_damaged:
            raise DigestMismatch(
                "a file is not what its checkpoint says",
                path=os.path.join(origin.path, entry.file),
                variable=entry.name if entry.folder else None,
                hint="verify that checkpoint",
            )

    def _copy_out(self, variable: _New, directory: Directory, original: _Original) -> int:
        """Copy ``out``, or an attached file, and return whom it belongs to: another user may write to it meanwhile."""
        with self._lock:
            self.copied += variable.nbytes
        with directory.out(original) as source:
            owner = os.fstat(source).st_uid
            fd = syscalls.create(variable.file, self._fd)
            try:
                done = 0
                while done < original.nbytes:
                    copied = syscalls.copy_range(source, fd, original.nbytes - done, done)
                    if copied == 0:
                        raise OSError(errno.EIO, "the file became shorter while it was copied")
                    done += copied
                if self._sync:
                    syscalls.sync(fd)
            finally:
                os.close(fd)
        return owner

    def _digest(self, variable: _New) -> None:
        with self._here.out(variable) as fd:
            blocks = spans(variable.nbytes)
            self._digests[variable.name] = b"".join(digest_file_block(fd, start, stop) for start, stop in blocks)


def _linked(name: str, folder_fd: int, target: str, dir_fd: int) -> bool:
    try:
        os.link(name, target, src_dir_fd=folder_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NOT_COPIED:
            raise
        return False
    return True
