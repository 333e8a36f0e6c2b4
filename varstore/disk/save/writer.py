"""Save: a plan's bytes into a staging folder, in parallel and hashed on the way, then the commit."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import xxhash

from varstore.disk.blocks import SMALL, digest_file_block, lies_as_out, spans, write_all, write_block
from varstore.disk.progress import Progress, reporting
from varstore.disk.save.incremental import equals_stored, link_unchanged
from varstore.disk.save.large_file import CREATE, OutFile
from varstore.disk.save.links import Origin, copy, link
from varstore.disk.save.space import check_space, disk_became_full
from varstore.disk.save.staging import Staging, fsync_path
from varstore.disk.threads import Job, Lane, in_lanes, run, thread_count
from varstore.errors import FormatError, InvalidName, VariableMismatch, VarstoreError
from varstore.layout.collector import collector_paused
from varstore.layout.manifest import Entry, Manifest
from varstore.layout.meta import encode_meta
from varstore.storage import syscalls
from varstore.storage.beneath import open_root, opened_file
from varstore.storage.failures import storage_error
from varstore.values.arrays import Stored
from varstore.values.lazy import LazyArray
from varstore.values.plan import PlannedVariable, SavePlan

__all__ = ["write_checkpoint"]

_BATCH = 64
_BATCH_BYTES = 8 << 20
_QUICK = 100e-6
"""Seconds for the files of one variable; of calls that take longer, the kernel or a server does most."""
_FSYNC_EACH = 4
"""Variables; a durable save of more flushes the file system once instead of every file."""
_WAITING = 2
"""Threads for each processor in a durable save, where half of them wait for the disk."""


def write_checkpoint(
    target: str,
    plan: SavePlan,
    *,
    writer: str,
    base: Mapping[str, Stored],
    overwrite: bool,
    durable: bool,
    manifest: bool,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write the plan as a checkpoint: all of it, or nothing.

    A variable that equals `base`'s of the same name in shape, type and digest is linked to it.

    Raises:
        CheckpointExists: the target is taken.
        OutOfSpace: the disk is full, or too small to begin with.
        StorageError: the operating system refused.
    """
    workers = thread_count(threads)
    work: _Writer | None = None
    try:
        staging = Staging(target, overwrite=overwrite)
        plan = link_unchanged(plan, base, workers)
        check_space(plan, staging.target)
        with staging, reporting(progress, plan.nbytes, f"saving {target}") as advance:
            work = _Writer(plan, staging, base, durable=durable, advance=advance)
            work.write(workers if threads or not durable else _WAITING * workers)
            record = _record(plan, work.digests, writer) if manifest else None
            staging.commit(record, durable=durable)
    except VarstoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_became_full(plan, os.path.realpath(target), work.copied if work else 0) from error
        raise storage_error(error, target, "the save failed and was undone") from error


def _record(plan: SavePlan, digests: Mapping[str, bytes], writer: str) -> bytes:
    with collector_paused():
        return Manifest(
            writer=writer,
            time_ns=time.time_ns(),
            attributes=plan.attributes,
            tree=plan.tree,
            entries={v.name: v.entry(digests[v.name]) for v in plan.variables},
        ).encode()


class _Writer:
    """One save in progress: fills the staging folder and collects the digests."""

    def __init__(
        self,
        plan: SavePlan,
        staging: Staging,
        base: Mapping[str, Stored],
        *,
        durable: bool,
        advance: Callable[[int], None] | None,
    ) -> None:
        self._plan = plan
        self._fd = staging.fd
        self._path = staging.path
        self._base = base
        self._durable = durable
        self._fsync_each = durable and len(plan.variables) <= _FSYNC_EACH
        self._advance = advance
        self._open: set[OutFile] = set()
        self._changed = threading.Condition()
        self._fetched: set[str] = set()
        self._failed = False
        self._calls_are_slow = False
        self.digests: dict[str, bytes] = {}
        self.copied = 0
        """Bytes of variables that were to be linked and had to be copied."""

    def write(self, threads: int) -> None:
        """Write all variables; make them durable where that was asked for."""
        for folder in self._plan.parents:
            self._make_folder(folder, folder)
        try:
            run(in_lanes(self._jobs()), threads, on_failure=self._fail)
        finally:
            for out in self._open:
                out.close()
        self._write_aliases()
        if self._durable:
            self._make_durable()

    def _jobs(self) -> Iterator[Lane | Job]:
        """Make folders and links, and yield small variables a batch at a time and large ones one by one.

        Threads that make folders in one folder wait for each other in the kernel, as they do when they write to one
        file (see `in_lanes`), and threads that make links for the interpreter: so they are made here, one by one.
        """
        batch: list[tuple[PlannedVariable, np.ndarray]] = []
        links: defaultdict[Hashable, list[tuple[PlannedVariable, Stored]]] = defaultdict(list)
        nbytes = 0
        parents = frozenset(self._plan.parents)
        for variable in self._plan.variables:
            if variable.folder not in parents:
                self._make_folder(variable.folder, variable.name)
            if variable.alias_of:
                continue
            source = variable.source
            if isinstance(source, LazyArray):
                self._await_fetched()
                if self._failed:
                    return
                source = self._fetch(variable, source)
            if isinstance(source, Stored):
                links[source.location].append((variable, source))
                if len(links[source.location]) == _BATCH:
                    yield from self._link_batch(links.pop(source.location))
            elif variable.nbytes >= SMALL:
                if source is not variable.source:
                    self._fetched.add(variable.name)
                yield from self._large_jobs(variable, source)
            else:
                batch.append((variable, source))
                nbytes += variable.nbytes
            if len(batch) == _BATCH or nbytes >= _BATCH_BYTES:
                yield from self._batch_jobs(batch)
                batch, nbytes = [], 0
        if batch:
            yield from self._batch_jobs(batch)
        for of_one_checkpoint in links.values():
            yield from self._link_batch(of_one_checkpoint)

    def _await_fetched(self) -> None:
        """Wait until the values that were fetched before are written, so that one variable's are in memory."""
        with self._changed:
            self._changed.wait_for(lambda: not self._fetched or self._failed)

    def _fetch(self, variable: PlannedVariable, late: LazyArray) -> np.ndarray | Stored:
        array = late.numpy()
        if array.shape != variable.meta.shape or array.dtype.newbyteorder("<") != late.dtype.newbyteorder("<"):
            raise VariableMismatch(
                "the values are not of the shape and type that were announced",
                variable=variable.name,
                found=f"{array.shape} {array.dtype}",
                expected=f"{variable.meta.shape} {late.dtype}",
            )
        stored = self._base.get(variable.name)
        return stored if stored is not None and equals_stored(variable, array, stored) else array

    def _make_folder(self, folder: str, name: str) -> None:
        try:
            os.mkdir(folder, dir_fd=self._fd)
        except FileExistsError as error:
            raise InvalidName(
                "another name has this folder already, on a file system that folds case or accents",
                variable=name,
                found=folder,
                hint="rename one of the two",
            ) from error

    def _write_meta(self, variable: PlannedVariable) -> None:
        fd = os.open(variable.folder + "/meta", CREATE, 0o444, dir_fd=self._fd)
        try:
            write_all(fd, encode_meta(variable.meta))
            if self._fsync_each:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _batch_jobs(self, batch: list[tuple[PlannedVariable, np.ndarray]]) -> Iterator[Job]:
        """Write a batch here, where nothing waits for it, or yield it where threads would help.

        Quick calls are made one by one, since threads that make them wait for the interpreter more than they win.
        """
        if self._calls_are_slow or self._open or self._failed:
            yield partial(self._write_batch, batch)
            return
        start = time.perf_counter()
        self._write_batch(batch)
        self._calls_are_slow = time.perf_counter() - start > _QUICK * len(batch)

    def _write_batch(self, batch: list[tuple[PlannedVariable, np.ndarray]]) -> None:
        for variable, array in batch:
            self._write_meta(variable)
            fd = os.open(variable.folder + "/out", CREATE, 0o444, dir_fd=self._fd)
            try:
                self.digests[variable.name] = _write_small(fd, array)
                if self._fsync_each:
                    os.fsync(fd)
            finally:
                os.close(fd)
        if self._advance:
            self._advance(sum(array.nbytes for _, array in batch))

    def _large_jobs(self, variable: PlannedVariable, array: np.ndarray) -> Iterator[Lane | Job]:
        self._write_meta(variable)
        out = OutFile(variable.folder + "/out", array, dir_fd=self._fd, durable=self._durable)
        lane = Lane(spans(variable.nbytes), partial(self._write_block, variable.name, out))
        self._open.add(out)
        yield lane
        if variable.name in self._fetched:  # all help with it: nothing else is begun until it is written
            yield from itertools.repeat(lane.step, lane.left)

    def _write_block(self, name: str, out: OutFile, start: int, stop: int) -> None:
        if out.write(start, stop):
            self._open.remove(out)
            self.digests[name] = out.finish(fsync=self._fsync_each)
            with self._changed:
                self._fetched.discard(name)
                self._changed.notify_all()
        if self._advance:
            self._advance(stop - start)

    def _fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _write_aliases(self) -> None:
        folders = {v.name: v.folder for v in self._plan.variables}
        for variable in self._plan.variables:
            if variable.alias_of:
                self._write_meta(variable)
                path = folders[variable.alias_of] + "/out"
                origin = Origin(self._fd, self._path, path, variable.nbytes, variable.alias_of)
                if not self._link_out(variable, origin):
                    self._copy_out(variable, origin)
                self.digests[variable.name] = self.digests[variable.alias_of]

    def _link_batch(self, batch: list[tuple[PlannedVariable, Stored]]) -> list[Job]:
        """Link variables of one checkpoint; return what takes longer: copies across file systems, unknown digests."""
        later: list[Job] = []
        root = batch[0][1].location.path
        with open_root(batch[0][1].location) as root_fd:
            for variable, stored in batch:
                entry = stored.entry
                if not self._link_out(variable, _origin(variable, entry, root_fd, root)):
                    self._write_meta(variable)
                    later.append(partial(self._copy, variable, stored))
                    continue
                if not self._link_meta(variable, entry, root_fd, root):
                    self._write_meta(variable)
                if entry.digests or not entry.nbytes:
                    self.digests[variable.name] = entry.digests
                else:
                    later.append(partial(self._digest, variable))
        return later

    def _link_meta(self, variable: PlannedVariable, entry: Entry, root_fd: int, root: str) -> bool:
        """Link a ``meta`` that is, to the byte, what would be written here."""
        text = encode_meta(variable.meta)
        origin = Origin(root_fd, root, f"{entry.folder}/meta", len(text), entry.name)
        with contextlib.suppress(FormatError):  # damaged or spelt otherwise: it is written anew
            return link(origin, variable.folder + "/meta", dir_fd=self._fd, fsync=self._fsync_each, content=text)
        return False

    def _copy(self, variable: PlannedVariable, stored: Stored) -> None:
        entry = stored.entry
        with open_root(stored.location) as root_fd:
            self._copy_out(variable, _origin(variable, entry, root_fd, stored.location.path))
        self.digests[variable.name] = entry.digests
        if not entry.digests:
            self._digest(variable)

    def _link_out(self, variable: PlannedVariable, origin: Origin) -> bool:
        return link(origin, variable.folder + "/out", dir_fd=self._fd, fsync=self._fsync_each)

    def _copy_out(self, variable: PlannedVariable, origin: Origin) -> None:
        with self._changed:
            self.copied += variable.nbytes
        copy(origin, variable.folder + "/out", dir_fd=self._fd, fsync=self._fsync_each)

    def _digest(self, variable: PlannedVariable) -> None:
        with opened_file(self._fd, variable.folder + "/out", root=self._path, variable=variable.name) as (fd, size):
            self.digests[variable.name] = b"".join(digest_file_block(fd, start, stop) for start, stop in spans(size))

    def _make_durable(self) -> None:
        if not self._fsync_each:
            try:
                syscalls.sync_file_system(self._fd)
            except OSError as error:
                if not syscalls.is_missing(error):
                    raise
                self._fsync_files()
            else:
                return
        for folder in {*self._plan.parents, *(v.folder for v in self._plan.variables)}:
            fsync_path(os.path.join(self._path, folder))

    def _fsync_files(self) -> None:
        for variable in self._plan.variables:
            for name in ("meta", "out"):
                fd = os.open(f"{variable.folder}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)


def _origin(variable: PlannedVariable, entry: Entry, root_fd: int, root: str) -> Origin:
    return Origin(root_fd, root, f"{entry.folder}/out", variable.nbytes, entry.name)


def _write_small(fd: int, array: np.ndarray) -> bytes:
    """Write a variable of less than a block, most often in one call; return its digest."""
    if array.nbytes == 0:
        return b""
    buffer: Any = array  # numpy's types say so from Python 3.12 on
    if lies_as_out(array) and os.write(fd, buffer) == array.nbytes:
        return xxhash.xxh3_128_digest(buffer)
    return write_block(fd, array, 0, array.nbytes)
