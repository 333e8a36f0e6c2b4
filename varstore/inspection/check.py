"""Look at whole checkpoints: verify one, seal one, compare two."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from varstore.disk.blocks import digest_file_block, spans
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.checks import check_digest, check_meta, check_readable, check_size
from varstore.disk.read.scan import WalkedEntries, variable_folders
from varstore.disk.save.staging import fsync_path
from varstore.disk.threads import Job, Lane, in_lanes, run, thread_count
from varstore.errors import CheckpointNotFound, FormatError, InvalidName, ManifestError, MetaError, VarstoreError
from varstore.layout.manifest import BLOCK, VERSION_FIELD, Entry, Manifest
from varstore.layout.names import MANIFEST, MARKER, Folder
from varstore.storage.beneath import open_root, opened_file
from varstore.storage.failures import translated

__all__ = ["DiffReport", "VerifyReport", "diff", "seal", "verify"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify` found: `problems` holds one sentence each, with file and variable.

    `unchecked` names the variables that have no digest to compare with; their sizes were checked.
    """

    path: str
    variables: int
    nbytes: int
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        size = f"{self.variables} variables, {self.nbytes:,} bytes"
        if self.problems:
            head = f"{self.path}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in {size}"
            return "\n".join([head, *(f"  {problem}" for problem in self.problems)])
        if self.unchecked:
            return f"{self.path}: ok: {size}; {len(self.unchecked)} without a digest (`varstore seal` adds them)"
        return f"{self.path}: ok: {size}, every byte as it was saved"


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffReport:
    """How checkpoint `b` differs from `a`: names of variables; `changed` says in what."""

    a: str
    b: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, str]
    unchanged: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same variables with the same values."""
        return not (self.added or self.removed or self.changed)

    def __str__(self) -> str:
        lines = [f"{self.a} -> {self.b}: {len(self.unchanged)} unchanged"]
        lines += [f"  added    {name}" for name in self.added]
        lines += [f"  removed  {name}" for name in self.removed]
        lines += [f"  changed  {name}: {what}" for name, what in self.changed.items()]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str], *, threads: int | None = None, progress: Progress = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare it with the manifest, and the manifest with the folders.

    Nothing is changed and no fault is raised: the report lists them all. What cannot be opened, for want of a
    marker or a whole manifest, is one problem, and its variables are not looked at.

    Raises:
        CheckpointNotFound: there is no such directory.
        StorageError: the operating system does not let it be read.
    """
    root = os.fspath(path)
    problems: list[str] = []
    checkpoint = _open_or_note(root, problems)
    entries = _decodable_entries(checkpoint, problems) if checkpoint else []
    total = sum(entry.nbytes for entry in entries)
    with (
        translated(root, "verifying failed"),
        open_root(root) as root_fd,
        reporting(progress, total, f"verifying {root}") as advance,
    ):
        problems += _marker_problems(root_fd, root)
        if checkpoint is not None and checkpoint.manifest is not None:
            listed = {entry.folder for entry in entries}
            problems += _unlisted_problems(root_fd, root, listed)
        work = _Verification(root_fd, root, advance)
        run(work.jobs(entries), thread_count(threads))
    problems += [work.problems[entry.name] for entry in entries if entry.name in work.problems]
    return VerifyReport(
        path=root,
        variables=len(entries),
        nbytes=total,
        problems=tuple(problems),
        unchecked=tuple(entry.name for entry in entries if entry.nbytes and not entry.digests),
    )


def _open_or_note(root: str, problems: list[str]) -> Checkpoint | None:
    checkpoint = None
    try:
        checkpoint = open_checkpoint(root)
        _ = checkpoint.tree
    except CheckpointNotFound:
        raise
    except VarstoreError as error:
        problems.append(str(error))
    return checkpoint


def _decodable_entries(checkpoint: Checkpoint, problems: list[str]) -> list[Entry]:
    entries = []
    for name in checkpoint:
        try:
            entries.append(checkpoint[name].entry)
        except VarstoreError as error:
            problems.append(str(error))
    return entries


def _unlisted_problems(root_fd: int, root: str, listed: set[Folder]) -> list[str]:
    try:
        return [
            f"{os.path.join(root, folder)}: a variable that the manifest does not list"
            for folder in variable_folders(root_fd)
            if folder not in listed
        ]
    except (VarstoreError, OSError) as error:
        return [f"{root}: its folders cannot be listed: {error}"]


def _marker_problems(root_fd: int, root: str) -> list[str]:
    try:
        status = os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return []
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return []
    return [f"{os.path.join(root, MARKER)}: found {status.st_size} bytes, expected an empty file"]


class _Verification:
    """Checks block after block; keeps the first problem of each variable."""

    def __init__(self, root_fd: int, root: str, advance: Callable[[int], None] | None) -> None:
        self._root_fd = root_fd
        self._root = root
        self._advance = advance
        self._lock = threading.Lock()
        self.problems: dict[str, str] = {}

    def jobs(self, entries: list[Entry]) -> Iterator[Job]:
        return in_lanes(Lane(list(spans(entry.nbytes)) or [(0, 0)], partial(self._check, entry)) for entry in entries)

    def _check(self, entry: Entry, start: int, stop: int) -> None:
        if entry.name in self.problems:
            return
        try:
            if start == 0:
                self._check_files(entry)
            self._check_block(entry, start, stop)
        except (VarstoreError, OSError) as error:
            with self._lock:
                self.problems.setdefault(entry.name, str(error))

    def _check_files(self, entry: Entry) -> None:
        check_readable(self._root, entry)
        check_meta(self._root_fd, self._root, entry)
        with opened_file(self._root_fd, f"{entry.folder}/out", root=self._root, variable=entry.name) as (_, size):
            check_size(self._root, entry, size)

    def _check_block(self, entry: Entry, start: int, stop: int) -> None:
        found = _digest(self._root_fd, self._root, entry, start, stop)
        check_digest(self._root, entry, start // BLOCK, found)
        if self._advance:
            self._advance(stop - start)


def _digest(root_fd: int, root: str, entry: Entry, start: int, stop: int) -> bytes:
    with opened_file(root_fd, f"{entry.folder}/out", root=root, variable=entry.name) as (fd, size):
        check_size(root, entry, size)
        return digest_file_block(fd, start, stop)


def _all_digests(root_fd: int, root: str, entry: Entry) -> bytes:
    return b"".join(_digest(root_fd, root, entry, start, stop) for start, stop in spans(entry.nbytes))


def seal(path: str | os.PathLike[str], *, writer: str = "varstore", progress: Progress = None) -> DiffReport:
    """Write a manifest that records what lies in the folders now; return what that changes.

    For a checkpoint without a manifest, and after a change by hand. Attributes and true names are kept for
    the folders that the present manifest lists.

    Raises:
        IncompleteCheckpoint: there is no marker; nothing vouches that the folders are whole.
        MetaError, SizeMismatch: a folder that is no variable as it stands; nothing is written.
        StorageError: the operating system refused; nothing is written.
    """
    root = os.fspath(path)
    before = _present_manifest(root)
    listed = _decodable(before.entries) if before else {}
    known = {entry.folder: entry for entry in listed.values()}
    order = {folder: place for place, folder in enumerate(known)}
    with translated(root, "sealing failed"), open_root(root) as root_fd:
        walked = WalkedEntries(root_fd, root)
        entries: dict[str, Entry] = {}
        with reporting(progress, sum(e.nbytes for e in walked.values()), f"sealing {root}") as advance:
            for found in sorted(walked.values(), key=lambda entry: order.get(entry.folder, len(order))):
                entry = _sealed(root_fd, root, found, known.get(found.folder))
                if entry.name in entries:
                    raise InvalidName(
                        "two folders would have this name", path=root, variable=entry.name, found=entry.folder
                    )
                entries[entry.name] = entry
                if advance:
                    advance(entry.nbytes)
        entries = {name: _tied(entry, known.get(entry.folder), entries) for name, entry in entries.items()}
        after = Manifest(
            writer=writer,
            time_ns=time.time_ns(),
            attributes=before.attributes if before else {},
            tree=before.tree if before else "",
            entries=entries,
        )
        _replace_manifest(root_fd, root, after.encode())
    return _compare(root, root, listed, entries)


def _present_manifest(root: str) -> Manifest | None:
    """Return the manifest if it is whole; a torn one is what sealing replaces, one of a later version is not."""
    try:
        return open_checkpoint(root).manifest
    except FormatError as error:
        if error.field == VERSION_FIELD:
            raise
        return None


def _decodable(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries that do not contradict themselves; sealing replaces the others."""
    decoded = {}
    for name in entries:
        with contextlib.suppress(ManifestError):
            decoded[name] = entries[name]
    return decoded


def _sealed(root_fd: int, root: str, found: Entry, known: Entry | None) -> Entry:
    if found.meta is None:
        raise MetaError(
            "a variable without meta cannot be sealed",
            path=os.path.join(root, found.folder),
            variable=found.name,
            hint="load it with load_variables, which knows shape and type, and save that",
        )
    check_readable(root, found)
    entry = found._replace(digests=_all_digests(root_fd, root, found))
    if known is None:
        return entry
    return entry._replace(name=known.name, attributes=known.attributes)


def _tied(entry: Entry, known: Entry | None, entries: Mapping[str, Entry]) -> Entry:
    """Return the entry as an alias of the one that it was an alias of, where both still hold the same values."""
    first = entries.get(known.alias_of) if known else None
    if first is None or (first.meta, first.digests) != (entry.meta, entry.digests):
        return entry
    return entry._replace(alias_of=first.name)


def _replace_manifest(root_fd: int, root: str, data: bytes) -> None:
    temporary = f".{MANIFEST}.{os.urandom(4).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=root_fd)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, MANIFEST, src_dir_fd=root_fd, dst_dir_fd=root_fd)
    except BaseException:
        os.unlink(temporary, dir_fd=root_fd)
        raise
    fsync_path(root)


def diff(a: str | os.PathLike[str] | Checkpoint, b: str | os.PathLike[str] | Checkpoint) -> DiffReport:
    """Compare two checkpoints by name, shape, type and digest; values are read only where a digest is missing.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: one of them cannot be opened.
    """
    first, second = (c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (a, b))
    return _compare(first.path, second.path, _with_digests(first), _with_digests(second))


def _with_digests(checkpoint: Checkpoint) -> dict[str, Entry]:
    with translated(checkpoint.root, "reading failed"), open_root(checkpoint.root) as root_fd:
        return {
            name: variable.entry
            if variable.entry.digests
            else variable.entry._replace(digests=_all_digests(root_fd, checkpoint.root, variable.entry))
            for name, variable in checkpoint.items()
        }


def _compare(a: str, b: str, first: Mapping[str, Entry], second: Mapping[str, Entry]) -> DiffReport:
    changed = {name: _difference(first[name], second[name]) for name in first if name in second}
    return DiffReport(
        a=a,
        b=b,
        added=tuple(name for name in second if name not in first),
        removed=tuple(name for name in first if name not in second),
        changed={name: what for name, what in changed.items() if what},
        unchanged=tuple(name for name, what in changed.items() if not what),
    )


def _difference(a: Entry, b: Entry) -> str:
    if a.meta is None or a.meta != b.meta:
        return f"{a.form} -> {b.form}"
    return "" if a.digests == b.digests else "values"
