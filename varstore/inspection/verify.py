"""Verify a checkpoint: every byte, every ``meta``, every folder."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from varstore.disk.blocks import spans
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.checks import check_digest, check_meta, check_readable, check_size
from varstore.disk.read.digests import digest_of_block
from varstore.disk.read.scan import variable_folders
from varstore.disk.threads import Job, Lane, in_lanes, run, thread_count
from varstore.errors import CheckpointNotFound, VarstoreError
from varstore.layout.manifest import BLOCK, Entry
from varstore.layout.names import MARKER, Folder
from varstore.storage.beneath import open_root, opened_file
from varstore.storage.failures import translated
from varstore.text.hints import plural

__all__ = ["VerifyReport", "verify"]


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
        size = f"{plural(self.variables, 'variable')}, {plural(self.nbytes, 'byte')}"
        if self.problems:
            head = f"{self.path}: {plural(len(self.problems), 'problem')} in {size}"
            return "\n".join([head, *(f"  {problem}" for problem in self.problems)])
        if self.unchecked:
            return f"{self.path}: ok: {size}; {len(self.unchecked)} without a digest (`varstore seal` adds them)"
        return f"{self.path}: ok: {size}, every byte as it was saved"


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
        found = digest_of_block(self._root_fd, self._root, entry, start, stop)
        check_digest(self._root, entry, start // BLOCK, found)
        if self._advance:
            self._advance(stop - start)
