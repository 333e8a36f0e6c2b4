"""Verify a checkpoint: every byte, every ``meta``, every folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from varstore.disk.blocks import SMALL, digest_file_block, spans
from varstore.disk.encodings.companions import check_companions
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.checks import check_digest, check_meta
from varstore.disk.read.digests import all_digests, check_bytes
from varstore.disk.read.regions import check_regions
from varstore.disk.read.scan import variable_folders
from varstore.disk.regions import bands_of
from varstore.disk.threads import SLOW, Lane, do_here_until_slow, in_lanes, piece, run, thread_count
from varstore.errors import FormatError, IncompleteCheckpoint, ManifestError, VarstoreError
from varstore.layout.attached import FileEntry
from varstore.layout.encodings import ZARR
from varstore.layout.manifest import BLOCK, Entry
from varstore.layout.names import MARKER, Folder
from varstore.layout.readable import readable
from varstore.layout.regions import Region
from varstore.storage.directory import Directory, locate, says_replaced
from varstore.storage.failures import translated
from varstore.text.escape import PROBLEM_LIMIT
from varstore.text.hints import plural
from varstore.text.table import Shown, Table
from varstore.values.arguments import checked

__all__ = ["VerifyReport", "verify"]

_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class VerifyReport(Shown):
    """What `verify` found: `problems` has a sentence per problem, with file and variable.

    `unchecked` names the variables without a digest to compare with; only their sizes were checked. `variables`,
    `files` (attached ones) and `nbytes` count what was looked at. The report is true if nothing is wrong.

    Example:
        >>> checkpoint = vs.save("lenet", {"fc/bias": np.zeros(10, np.float32)})
        >>> report = vs.verify("lenet")
        >>> report.ok, report.variables, report.nbytes, report.problems
        (True, 1, 40, ())
    """

    path: str
    variables: int
    nbytes: int
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]
    files: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "path": self.path,
            "ok": self.ok,
            "variables": self.variables,
            "files": self.files,
            "nbytes": self.nbytes,
            "problems": list(self.problems),
            "unchecked": list(self.unchecked),
        }

    def table(self, most: int | None = None) -> Table:
        """Return a row per problem."""
        attached = f"{plural(self.files, 'file')}, " if self.files else ""
        size = f"{plural(self.variables, 'variable')}, {attached}{plural(self.nbytes, 'byte')}"
        if self.problems:
            head = f"{self.path}: {plural(len(self.problems), 'problem')} in {size}"
        elif self.unchecked:
            head = f"{self.path}: ok: {size}; {len(self.unchecked)} without a digest (`varstore seal` adds them)"
        else:
            head = f"{self.path}: ok: {size}, every byte as it was saved"
        return Table(title=head, rows=[[problem] for problem in self.problems[:most]], limit=PROBLEM_LIMIT)


@checked
def verify(path: str | os.PathLike[str], *, threads: int | None = None, progress: Progress = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare it with the manifest, and the manifest with the folders.

    Nothing is changed, and damage is not raised as an error: the report lists all of it. A checkpoint without a marker
    or with a torn manifest is one problem, and its variables are not looked at.

    Args:
        path: a checkpoint's directory.
        threads: default one per processor, at most eight.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        CheckpointNotFound: there is no such directory.
        StorageError: the operating system refused to read it.

    Example:
        >>> checkpoint = vs.save("lenet", {"fc/bias": np.zeros(10, np.float32)})
        >>> print(vs.verify("lenet"))
        lenet: ok: 1 variable, 40 bytes, every byte as it was saved
    """
    root = os.fspath(path)
    try:
        return retry_if_replaced(partial(_verified, threads=threads, progress=progress), root)
    except (FormatError, IncompleteCheckpoint) as error:  # it cannot be opened
        with translated(root, "verifying failed"), Directory(locate(root)) as directory:
            problems = (str(error), *_marker_problems(directory))
        return VerifyReport(path=root, variables=0, nbytes=0, problems=problems, unchecked=())


def _verified(checkpoint: Checkpoint, *, threads: int | None, progress: Progress) -> VerifyReport:
    problems = _tree_problems(checkpoint)
    entries = _decodable_entries(checkpoint, problems)
    files = list(checkpoint.manifest.files.values()) if checkpoint.manifest else []
    everything: list[Entry | FileEntry] = [*entries, *files]
    total = sum(entry.nbytes for entry in everything)
    start = time.perf_counter()
    with (
        translated(checkpoint.path, "verifying failed"),
        Directory(checkpoint.location) as directory,
        reporting(progress, total, f"verifying {checkpoint.path}") as advance,
    ):
        seconds = time.perf_counter() - start
        problems += _marker_problems(directory)
        if checkpoint.manifest is not None:
            listed = {entry.folder for entry in entries}
            problems += _unlisted_problems(directory, listed)
        work = _Verification(directory, advance)
        work.run(everything, thread_count(threads, seconds), calls_wait=seconds > SLOW)
        problems += [work.problems[entry.file] for entry in everything if entry.file in work.problems]
        if problems:
            directory.check_still_there()
    return VerifyReport(
        path=checkpoint.path,
        variables=len(entries),
        files=len(files),
        nbytes=total,
        problems=tuple(problems),
        unchecked=tuple(entry.name for entry in entries if entry.nbytes and not entry.checksums),
    )


def _tree_problems(checkpoint: Checkpoint) -> list[str]:
    try:
        _ = checkpoint.tree
    except ManifestError as error:
        return [str(error)]
    return []


def _decodable_entries(checkpoint: Checkpoint, problems: list[str]) -> list[Entry]:
    entries = []
    for name in checkpoint:
        try:
            entries.append(checkpoint[name].entry)
        except VarstoreError as error:
            if says_replaced(error):
                raise
            problems.append(str(error))
    return entries


def _unlisted_problems(directory: Directory, listed: set[Folder]) -> list[str]:
    try:
        return [
            f"{directory.place(folder)}: a variable that the manifest does not list"
            for folder in variable_folders(directory)
            if folder not in listed
        ]
    except (VarstoreError, OSError) as error:
        return [f"{directory.path}: its folders cannot be listed: {error}"]


def _marker_problems(directory: Directory) -> list[str]:
    marker = directory.marker()
    if marker is None or not stat.S_ISREG(marker.st_mode) or marker.st_size == 0:
        return []
    return [f"{directory.place(MARKER)}: found {plural(marker.st_size, 'byte')}, expected an empty file"]


class _Verification:
    """Checks small variables one after the other and large ones in pieces; keeps the first problem of each.

    Each file is opened once. That of a large variable stays open until its last piece was read.
    """

    def __init__(self, directory: Directory, advance: Callable[[int], None] | None) -> None:
        self._directory = directory
        self._advance = advance
        self._lock = threading.Lock()
        self._pieces_left: dict[int, int] = {}
        self.problems: dict[str, str] = {}

    def run(self, entries: Sequence[Entry | FileEntry], threads: int, *, calls_wait: bool) -> None:
        """Check all of these."""
        small = [entry for entry in entries if entry.nbytes < SMALL]
        size = min(_BATCH, piece(len(small))) if calls_wait else _BATCH
        groups = (small[start : start + size] for start in range(0, len(small), size))
        checks = do_here_until_slow(groups, self._check_small, calls_wait=calls_wait)
        lanes = self._lanes([entry for entry in entries if entry.nbytes >= SMALL])
        try:
            run(in_lanes(itertools.chain(lanes, checks)), threads)
        finally:
            for fd in self._pieces_left:
                os.close(fd)

    @contextlib.contextmanager
    def _noting(self, entry: Entry | FileEntry) -> Iterator[None]:
        try:
            yield
        except (VarstoreError, OSError) as error:
            with self._lock:
                self.problems.setdefault(entry.file, str(error))

    def _check_form(self, entry: Entry | FileEntry) -> None:
        if isinstance(entry, FileEntry):
            self._directory.check_regular(entry.file)
            return
        if entry.meta is not None:
            readable(entry, path=self._directory.path)
        check_meta(self._directory, entry)
        if entry.encoding == ZARR.name:
            check_companions(self._directory, entry)

    def _check_small(self, entries: Sequence[Entry | FileEntry]) -> None:
        for entry in entries:
            with self._noting(entry):
                self._check_form(entry)
                if isinstance(entry, Entry) and entry.regions:
                    check_bytes(self._directory, entry)
                else:
                    check_digest(self._directory, entry, entry.digests, 0, all_digests(self._directory, entry))
        if self._advance:
            self._advance(sum(entry.nbytes for entry in entries))

    def _lanes(self, entries: Sequence[Entry | FileEntry]) -> Iterator[Lane]:
        for entry in entries:
            pieces: list[tuple[Any, ...]] = [*spans(entry.nbytes)]
            check: Callable[..., None] = self._check_block
            if isinstance(entry, Entry) and entry.regions:
                pieces, check = [*bands_of(entry)], self._check_band
            fd = self._opened(entry, len(pieces))
            if fd is not None:
                yield Lane(pieces, partial(check, entry, fd))
            elif self._advance:
                self._advance(entry.nbytes)

    def _opened(self, entry: Entry | FileEntry, pieces: int) -> int | None:
        """Return the descriptor of a large ``out`` that is read in pieces; None where it has a problem already."""
        with self._noting(entry):
            self._check_form(entry)
            fd = self._directory.open_out(entry)
            self._pieces_left[fd] = pieces
            return fd
        return None

    def _check_block(self, entry: Entry | FileEntry, fd: int, start: int, stop: int) -> None:
        def check() -> None:
            found = digest_file_block(fd, start, stop)
            check_digest(self._directory, entry, entry.digests, start // BLOCK, found)

        self._check_piece(entry, fd, stop - start, check)

    def _check_band(self, entry: Entry, fd: int, rows: range, regions: list[Region]) -> None:
        assert entry.meta is not None
        nbytes = len(rows) * (entry.nbytes // entry.meta.shape[0])
        self._check_piece(entry, fd, nbytes, partial(check_regions, self._directory, entry, fd, (rows, regions)))

    def _check_piece(self, entry: Entry | FileEntry, fd: int, nbytes: int, check: Callable[[], None]) -> None:
        if entry.file not in self.problems:
            with self._noting(entry):
                check()
        with self._lock:
            self._pieces_left[fd] -= 1
            if not self._pieces_left[fd]:
                del self._pieces_left[fd]
                os.close(fd)
        if self._advance:
            self._advance(nbytes)
