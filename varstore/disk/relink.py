"""Make equal files of a run one file again, after a copy that made each link a file of its own.

A file is replaced by a link to an equal one, in three steps. The link is made beside the checkpoint, under a temporary
name that `varstore.clean` knows. What it leads to must be the file whose bytes were compared, and what it replaces
must be the other one. Then it takes the name, in one step. So whatever happens meanwhile, and wherever it is killed, a
name stands for a whole file with the same bytes, and manifests stay true. What the link leads to is made durable
first: the copy that goes may be the only one that is.

A file is left as it is if it belongs to another user, who could write to it later, if it has another mode, or is on
another file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import CheckpointNotFound, DigestMismatch, FormatError, VarstoreError
from varstore.layout.attached import FileEntry
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.names import MARKER
from varstore.layout.regions import Checksums
from varstore.layout.staged import is_staging_name
from varstore.storage import syscalls
from varstore.storage.directory import Directory
from varstore.storage.failures import no_directory, translated
from varstore.text.escape import PROBLEM_LIMIT
from varstore.text.hints import plural
from varstore.text.table import Shown, Table
from varstore.values.arguments import checked

__all__ = ["LinksReport", "links"]

_AT_ONCE = 1 << 20
"""Bytes of each of two files that are compared at a time."""
_KINDS = 4
"""Files with the same values that others become links to: more would be compared with each that comes."""
_GONE = (errno.ENOENT, errno.ESTALE)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class LinksReport(Shown):
    """What `links` did, or would do if it was a `dry_run`.

    `linked` counts the files that became links to others, and `nbytes` the bytes that this freed. `left` says what was
    not looked at, or left as it is, and why.

    Example:
        >>> checkpoint = vs.save("run/step-1", {"fc/bias": np.zeros(1000)})
        >>> report = vs.links("run")
        >>> report.checkpoints, report.linked, report.nbytes, report.left
        (1, 0, 0, ())
    """

    path: str
    checkpoints: int
    linked: int
    nbytes: int
    left: tuple[str, ...]
    dry_run: bool

    def table(self, most: int | None = None) -> Table:
        """Return a row for each file that is left as it is."""
        would = "would become" if self.dry_run else "became"
        files = f"{plural(self.linked, 'file')} {would} {'a link' if self.linked == 1 else 'links'}"
        head = f"{self.path}: {plural(self.checkpoints, 'checkpoint')}: {files}, {plural(self.nbytes, 'byte')} freed"
        return Table(title=head, rows=[[why] for why in self.left[:most]], limit=PROBLEM_LIMIT)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "path": self.path,
            "checkpoints": self.checkpoints,
            "linked": self.linked,
            "nbytes": self.nbytes,
            "left": list(self.left),
            "dry_run": self.dry_run,
        }


@checked
def links(directory: str | os.PathLike[str], *, dry_run: bool = False, progress: Progress = None) -> LinksReport:
    """Make equal files of the checkpoints in a directory one file again, as `base=` had made them.

    Use it after `cp -r`, git, or a download, which turn each link into a file of its own. Files are equal if their
    digests are, and then their bytes, which are compared. Each is replaced in one step, so checkpoints can be read
    meanwhile, and a crash leaves each name with a whole file. Checkpoints without a manifest, and those that were
    saved with ``links=False``, are left as they are.

    Args:
        directory: the directory that holds the checkpoints, such as that of a run; or one checkpoint, whose tied
            variables become one file again.
        dry_run: change nothing, and say what would be done.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        CheckpointNotFound: there is no such directory, or no checkpoint in it.
        StorageError: the operating system refused, or the file system does not have links.

    Example:
        >>> import shutil
        >>> checkpoint = vs.save("run/step-1", {"fc/bias": np.zeros(1000)})
        >>> copy = shutil.copytree("run/step-1", "run/step-2")
        >>> print(vs.links("run"))
        run: 2 checkpoints: 2 files became links, 8,041 bytes freed
    """
    path = os.fspath(directory)
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(path, "making links")
    left: list[str] = []
    with translated(path, "the directory cannot be read"):
        opened = list(_checkpoints(path, left))
    if not opened and not left:
        raise CheckpointNotFound("there is no checkpoint in this directory", path=path)
    entries = [(checkpoint, list(_linkable(checkpoint))) for checkpoint in opened]
    total = sum(entry.nbytes for _, of_one in entries for entry in of_one)
    with translated(path, "making links failed"), reporting(progress, total, f"linking {path}") as advance:
        work = _Work(dry_run=dry_run, left=left)
        for checkpoint, of_one in entries:
            work.visit(checkpoint, of_one, advance)
    return LinksReport(
        path=path, checkpoints=len(opened), linked=work.linked, nbytes=work.nbytes, left=tuple(left), dry_run=dry_run
    )


def _checkpoints(path: str, left: list[str]) -> Iterator[Checkpoint]:
    """Yield the checkpoints at or in a directory, in the order of their names; links to others are not followed."""
    if os.path.lexists(os.path.join(path, MARKER)):
        yield open_checkpoint(path)
        return
    try:
        with os.scandir(path) as found:
            names = sorted((entry.name for entry in found if entry.is_dir(follow_symlinks=False)), key=_by_number)
    except (FileNotFoundError, NotADirectoryError):
        raise no_directory(path) from None
    for name in names:
        place = os.path.join(path, name)
        if is_staging_name(name) or not os.path.lexists(os.path.join(place, MARKER)):
            continue
        try:
            yield open_checkpoint(place)
        except VarstoreError as error:
            left.append(str(error))


def _by_number(name: str) -> tuple[str, int, str]:
    """Return what sorts step-9 before step-10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :][:18] or -1), name


def _linkable(checkpoint: Checkpoint) -> Iterator[Entry | FileEntry]:
    """Yield the variables and attached files whose content can be found again by their digests."""
    if checkpoint.manifest is not None and not checkpoint.manifest.unshared:
        for entry in checkpoint.content.entries.values():
            if entry.nbytes and entry.checksums:
                yield entry
        yield from (file for file in checkpoint.manifest.files.values() if file.nbytes and file.digests)


def _names(entry: Entry | FileEntry) -> tuple[str, ...]:
    """Return the names of its files in its folder, which is the root for an attached file."""
    return ("out", "meta") if entry.folder else (entry.name,)


class _Place(NamedTuple):
    """A variable or an attached file in its checkpoint."""

    location: Location
    entry: Entry | FileEntry


@dataclass(kw_only=True)
class _Work:
    """The links that are made, and what they free."""

    dry_run: bool
    left: list[str]
    linked: int = 0
    nbytes: int = 0
    _firsts: dict[tuple[int, Checksums, bool], list[_Place]] = field(default_factory=dict)
    """By size, digests and kind, the files that others become links to: of one user, mode and file system each."""

    def visit(
        self, checkpoint: Checkpoint, entries: list[Entry | FileEntry], advance: Callable[[int], None] | None
    ) -> None:
        """Make those files of a checkpoint links that are equal to files of earlier ones, or of itself."""
        if checkpoint.manifest is None:
            self.left.append(f"{checkpoint.path}: it has no manifest (`varstore seal` writes one)")
        with (
            self._noting(),
            Directory(checkpoint.location) as directory,
            _parent_of(checkpoint.location) as parent,
        ):
            for entry in entries:
                with self._noting():
                    self._visit_one(directory, parent, entry)
                if advance:
                    advance(entry.nbytes)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Note that something is left as it is: damaged, or removed or replaced by another process."""
        try:
            yield
        except (FormatError, CheckpointNotFound, OSError) as error:
            if not isinstance(error, FormatError | CheckpointNotFound) and error.errno not in _GONE:
                raise
            self.left.append(str(error))

    def _visit_one(self, directory: Directory, parent: int, entry: Entry | FileEntry) -> None:
        places = self._firsts.setdefault((entry.nbytes, entry.checksums, not entry.folder), [])
        with directory.out(entry):  # one that is not whole is not looked at again
            pass
        for place in [*places]:
            is_one = False
            places.remove(place)  # it may be gone, or full
            with self._noting(), contextlib.suppress(_Full), Directory(place.location) as origin:
                pair = _Pair(origin=origin, first=place.entry, directory=directory, entry=entry, parent=parent)
                try:
                    is_one = self._unite(pair)
                    places.append(place)
                except DigestMismatch:
                    places.append(place)
                    raise
            if is_one:
                return
        if len(places) < _KINDS:
            places.append(_Place(directory.location, entry))

    def _unite(self, pair: _Pair) -> bool:
        """Make the files of a pair one, ``out`` or the attached file first; tell whether that is."""
        is_one = False
        for first, name in zip(_names(pair.first), _names(pair.entry), strict=True):
            freed = pair.unite(first, name, dry_run=self.dry_run)
            if freed is None:
                break
            is_one = True
            if freed >= 0:
                self.linked += 1
                self.nbytes += freed
        return is_one


class _Full(Exception):
    """A file has as many names as the file system permits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Two variables or attached files of the same content; `parent` is the open folder above the second checkpoint."""

    origin: Directory
    first: Entry | FileEntry
    directory: Directory
    entry: Entry | FileEntry
    parent: int

    def unite(self, first: str, name: str, *, dry_run: bool) -> int | None:
        """Make the second one's file of a name a link to the first one's.

        Returns the bytes that this frees, -1 where they are one file already, and None where they cannot be one.

        Raises:
            FormatError: a file is missing, or of another size.
            DigestMismatch: one of the two is not what its digest says.
            _Full: the first one has as many names as there can be.
        """
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(_file(self.origin, self.first, first))
            target = opened.enter_context(_file(self.directory, self.entry, name))
            kept, goes = os.fstat(source), os.fstat(target)
            if os.path.samestat(kept, goes):
                return -1
            if not _may_be_one(kept, goes):
                return None
            if not _equal(source, target, goes.st_size):
                if name != _names(self.entry)[0]:
                    return None
                raise DigestMismatch(
                    "two files have the same digest and other bytes: one of them is damaged",
                    path=self.directory.place(self.entry.file),
                    variable=self.entry.name if self.entry.folder else None,
                    found=self.origin.place(self.first.file),
                    hint="`varstore verify` tells which",
                )
            if not dry_run:
                syscalls.sync(source)
                if not self._replace(first, name, source, kept, goes):
                    return None
            return goes.st_size if goes.st_nlink == 1 else 0

    def _replace(self, first: str, name: str, source: int, kept: os.stat_result, goes: os.stat_result) -> bool:
        """Put a link in the place of a file, if both are still what they were; tell whether it was done."""
        checkpoint = os.path.basename(self.directory.location.absolute.rstrip("/"))
        temporary = f".{checkpoint[:200]}.{os.urandom(4).hex()}.tmp"
        with contextlib.ExitStack() as opened:
            origin = _folder(self.origin, self.first, opened)
            folder = _folder(self.directory, self.entry, opened)
            with contextlib.suppress(OSError):  # so that nobody takes the temporary name for what a killed one left
                syscalls.flock(source, syscalls.LOCK)
            try:
                _link(first, origin, temporary, self.parent)
                is_same = _is(temporary, self.parent, kept) and _is(name, folder, goes)
                if is_same:
                    os.rename(temporary, name, src_dir_fd=self.parent, dst_dir_fd=folder)
                return is_same
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=self.parent)


@contextlib.contextmanager
def _parent_of(location: Location) -> Iterator[int]:
    fd = syscalls.open_fd(os.path.dirname(location.absolute.rstrip("/")) or "/", syscalls.READ_FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _file(directory: Directory, entry: Entry | FileEntry, name: str) -> Iterator[int]:
    """Hold one of a variable's two files open, or an attached file."""
    if name == _names(entry)[0]:
        with directory.out(entry) as fd:
            yield fd
        return
    relative = f"{entry.folder}/{name}"
    fd = directory.open(relative, variable=entry.name)
    try:
        directory.size(fd, relative, entry.name)
        yield fd
    finally:
        os.close(fd)


def _folder(directory: Directory, entry: Entry | FileEntry, opened: contextlib.ExitStack) -> int:
    fd = directory.open(entry.folder or os.curdir, variable=entry.name if entry.folder else None, folder=True)
    opened.callback(os.close, fd)
    return fd


def _may_be_one(kept: os.stat_result, goes: os.stat_result) -> bool:
    """Tell whether one file can have both names: two of this user, with the same mode, on one file system."""
    same = (kept.st_dev, kept.st_mode, kept.st_gid, kept.st_size) == (
        goes.st_dev,
        goes.st_mode,
        goes.st_gid,
        goes.st_size,
    )
    return same and kept.st_uid == goes.st_uid == syscalls.user()


def _equal(first: int, second: int, size: int) -> bool:
    for offset in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - offset)
        if _read(first, count, offset) != _read(second, count, offset):
            return False
    return True


def _read(fd: int, count: int, offset: int) -> bytes:
    parts = []
    while count and (part := syscalls.pread(fd, count, offset)):
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def _link(name: str, folder: int, target: str, dir_fd: int) -> None:
    try:
        os.link(name, target, src_dir_fd=folder, dst_dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EMLINK:
            raise _Full from error
        raise


def _is(name: str, dir_fd: int, status: os.stat_result) -> bool:
    """Tell whether a name stands for this regular file itself."""
    found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    return stat.S_ISREG(found.st_mode) and os.path.samestat(found, status)
