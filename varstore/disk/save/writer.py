"""Write a save plan into a staging folder, in parallel and hashing along the way, then commit it.

This file decides which thread does what, and in which order. One thread at a time runs `_Writer._jobs`: it walks the
plan, makes folders and fetches values. Work at which threads would only slow each other down, it does itself; other
work it yields, for any free thread to take (see `varstore.disk.threads.run`). The modules `small_files`, `large_file`
and `links` create the files. Tied variables come last, after the files that they link to are written. Then everything
is made durable, the manifest is built from the digests, and `Staging.commit` makes the checkpoint visible.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from varstore.disk.blocks import SMALL
from varstore.disk.progress import Progress, reporting
from varstore.disk.save.attached import AttachedFiles, link_equal
from varstore.disk.save.durability import SYNC_EACH, Durability
from varstore.disk.save.encoded import EncodedFiles, require_links
from varstore.disk.save.folders import make_folders, make_folders_by_level
from varstore.disk.save.foreign import Foreign
from varstore.disk.save.incremental import equals_stored, link_unchanged
from varstore.disk.save.large_file import LargeFiles
from varstore.disk.save.links import Links
from varstore.disk.save.small_files import SmallFiles
from varstore.disk.save.space import check_space, disk_became_full
from varstore.disk.save.staging import Staging, prepare_target
from varstore.disk.threads import SLOW, Job, Lane, in_lanes, piece, run, thread_count
from varstore.errors import StorageError, UsageError, VariableMismatch, VarstoreError
from varstore.layout.collector import collector_paused
from varstore.layout.encodings import ZARR
from varstore.layout.graphs import GRAPH, check_copies
from varstore.layout.location import Identity
from varstore.layout.manifest import Entry, Manifest, digest_in
from varstore.layout.shards import DOCUMENT
from varstore.storage import syscalls
from varstore.storage.failures import storage_error
from varstore.values.arrays import Stored
from varstore.values.attached import StoredFile
from varstore.values.lazy import LazyArray
from varstore.values.plan import Outcome, PlannedVariable, SavePlan

__all__ = ["Saved", "failed", "write_checkpoint"]

_GROUP = 64
"""Variables whose folders are made one after the other, then their files, and those that are written in one job."""
_WAITING = 2
"""Threads for each processor in a durable save, where half of them wait for the disk."""


class Saved(NamedTuple):
    """What opening the checkpoint would find, known without reading it again; `identity` tells it from others."""

    entries: Mapping[str, Entry]
    manifest: Manifest | None
    identity: Identity | None


def write_checkpoint(
    path: str,
    plan: SavePlan,
    *,
    writer: str,
    base: Mapping[str, Stored],
    base_files: Mapping[str, StoredFile],
    overwrite: bool,
    foreign: Foreign,
    durable: bool,
    manifest: bool,
    threads: int | None,
    progress: Progress,
) -> Saved:
    """Write the plan as a checkpoint: all of it, or nothing.

    A variable is linked to the variable of the same name in `base` if shape, type and digest are equal, and an attached
    file to that in `base_files` if size and digest are.

    Raises:
        CheckpointExists: the target is taken.
        OutOfSpace: the disk is full, or too small to begin with.
        StorageError: the operating system refused.
        UsageError: the interpreter is ending.
    """
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(path, "saving")
    if sys.is_finalizing():  # modules can no longer be imported, nor threads started
        raise UsageError(
            "the interpreter is ending, and nothing can be saved any more",
            path=path,
            hint="save before the program ends, or in a function that is registered with atexit",
        )
    workers = thread_count(threads)
    staging: Staging | None = None
    work: _Writer | None = None
    try:
        start = time.perf_counter()
        target = prepare_target(path, overwrite=overwrite, foreign=foreign)
        looking = time.perf_counter() - start
        values: Mapping[str, np.ndarray | LazyArray] = {}
        if base:
            values = {v.name: v.source for v in plan.variables if not isinstance(v.source, Stored)}
            plan = link_unchanged(plan, base, workers)
        if base_files and plan.files:
            plan = link_equal(plan, base_files)
        check_space(plan, target.path)
        nbytes = plan.nbytes
        durability = Durability(durable=durable, each=durable and len(plan.variables) + len(plan.files) <= SYNC_EACH)
        with Staging(target, durability, plan.tops) as staging:
            seconds = min(looking, staging.seconds)
            calls_wait = seconds > SLOW
            if durable and not threads:
                workers *= _WAITING
            if calls_wait:
                workers = staging.threads = max(workers, thread_count(threads, seconds))
                if durable and not syscalls.syncs_whole(staging.fd):
                    staging.durability = durability._replace(each=True)
            with reporting(progress, nbytes, f"saving {path}") as advance:
                work = _Writer(plan, staging, base, values, advance, workers, calls_wait)
                work.write()
            with collector_paused():
                entries = plan.entries(work.digests, work.outcomes) if manifest else _walked(plan)
                record = encoded = identity = None
                if manifest:
                    now, attributes, tree = time.time_ns(), plan.attributes, plan.tree
                    files = {file.name: file.entry(work.digests[file.name]) for file in plan.files}
                    if files:
                        check_copies(files.values(), {name: entry.value_digests for name, entry in entries.items()})
                    record = Manifest(
                        writer=writer,
                        time_ns=now,
                        attributes=attributes,
                        tree=tree,
                        entries=entries,
                        files=files,
                        unshared=not plan.links,
                    )
                    encoded = record.encode()
                    identity = digest_in(encoded)
            marker = staging.commit(encoded)
        return Saved(entries, record, identity or marker)
    except VarstoreError:
        raise
    except OSError as error:
        raise failed(error, path, plan, staging, work.copied if work else 0) from error


def failed(error: OSError, path: str, plan: SavePlan, staging: Staging | None, copied: int = 0) -> StorageError:
    """Return the error for a save that the system refused; `copied` is as for `disk_became_full`."""
    if staging is not None and staging.is_visible:
        problem = "the new checkpoint is saved and stands, but it may not survive a power cut"
        return storage_error(error, path, problem)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_became_full(plan, os.path.realpath(path), copied)
    return storage_error(error, path, "the save failed and was undone")


def _walked(plan: SavePlan) -> dict[str, Entry]:
    """Return the entries as a reader without a manifest finds them: sorted, with the folder path as the name."""
    variables = sorted(plan.variables, key=attrgetter("folder"))
    return {v.folder: Entry(v.folder, v.folder, v.meta, v.nbytes) for v in variables}


class _Writer:
    """One save in progress: fills the staging folder and collects the digests."""

    def __init__(
        self,
        plan: SavePlan,
        staging: Staging,
        base: Mapping[str, Stored],
        values: Mapping[str, np.ndarray | LazyArray],
        advance: Callable[[int], None] | None,
        threads: int,
        calls_wait: bool,
    ) -> None:
        self.digests: dict[str, bytes] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._plan = plan
        self._staging = staging
        self._base = base
        self._threads = threads
        self._calls_wait = calls_wait
        self._made: dict[str, str] = dict(zip(plan.parents, plan.parents, strict=True))
        make = self._make if calls_wait else None
        batch = min(_GROUP, piece(len(plan.variables))) if calls_wait else _GROUP
        self._small = SmallFiles(staging, self.digests, advance, batch, make)
        self._large = LargeFiles(staging, self.digests, advance)
        self._links = Links(
            staging,
            self._small,
            self.digests,
            self.outcomes,
            values,
            batch,
            make,
            shares=plan.links,
            are_compared=GRAPH in map(attrgetter("kind"), plan.files),
        )
        self._advance = advance
        self._encoded: EncodedFiles | None = None
        if plan.encoding == ZARR.name:
            require_links(staging)
            self._encoded = EncodedFiles(staging, self.digests, self.outcomes, advance, plan)

    @property
    def copied(self) -> int:
        """Bytes of variables that were to be linked and had to be copied."""
        return self._links.copied

    def write(self) -> None:
        """Write all variables; make them durable where that was asked for."""
        if self._calls_wait:
            make_folders_by_level(self._made, self._staging.fd, private=self._staging.is_private, threads=self._threads)
        try:
            run(in_lanes(self._jobs()), self._threads, on_failure=self._large.fail)
        finally:
            self._large.close()
            if self._encoded:
                self._encoded.close()
        if any(map(attrgetter("alias_of"), self._plan.variables)):
            self._links.tie(self._plan.variables)
        if self._staging.target.kept:
            self._staging.carry()
        folders = list(map(attrgetter("folder"), self._plan.variables))
        sync_all = self._staging.durability.sync_all
        names = [file.name for file in self._plan.files]
        encoded = [*self._links.encoded, *(self._encoded.folders if self._encoded else ())]
        names += [f"{folder}/{DOCUMENT}" for folder in encoded]
        sync_all(self._staging.fd, folders, self._plan.parents, names, threads=self._threads if self._calls_wait else 1)

    def _make(self, variables: Iterable[PlannedVariable]) -> None:
        folders: dict[str, str] = {v.folder: v.name for v in variables if v.folder not in self._made}
        make_folders(folders, self._staging.fd, private=self._staging.is_private)
        self._made |= folders

    def _jobs(self) -> Iterator[Lane | Job]:
        """Make folders and links, and yield small variables a batch at a time and large ones one by one.

        Threads that create folders inside the same parent block each other in the kernel, as do threads that write to
        one file (see `in_lanes`). Threads that create links block each other on the interpreter lock. So both are
        made here, by one thread. Where calls wait for a server, all that counts is how many wait at the same time: the
        parents are made already, and the jobs make folders and links too.
        """
        small, large, links = self._small, self._large, self._links
        variables, folder_fd = self._plan.variables, self._staging.fd
        made = self._made
        if self._plan.files:
            attached = AttachedFiles(self._staging, links, self.digests, self._advance)
            for file in self._plan.files:
                if self._calls_wait or file.nbytes >= SMALL:
                    yield partial(attached.write, file)
                else:
                    attached.write(file)
        for at, variable in enumerate(variables):
            if self._calls_wait:
                is_large = variable.nbytes >= SMALL or (self._encoded is not None and self._encoded.takes(variable))
                if variable.alias_of or (is_large and not isinstance(variable.source, Stored)):
                    self._make((variable,))
            elif at % _GROUP == 0:
                group: dict[str, str] = {v.folder: v.name for v in variables[at : at + _GROUP] if v.folder not in made}
                make_folders(group if at else made | group, folder_fd, private=self._staging.is_private)
            if variable.alias_of:
                continue
            source = variable.source
            if isinstance(source, LazyArray):
                large.wait_for_fetched()
                if large.failed:
                    return
                source = self._fetch(variable, source)
            if isinstance(source, Stored):
                yield from links.add(variable, source)
            elif self._encoded and self._encoded.takes(variable):
                small.write_meta(variable)
                fetched = source is not variable.source
                if fetched:
                    large.begin_fetched()
                lane = self._encoded.lane(variable, source, large.end_fetched if fetched else None)
                yield lane
                if fetched:
                    yield from itertools.repeat(lane.step, lane.left)
            elif variable.nbytes >= SMALL:
                if self._calls_wait:
                    yield partial(small.write_meta, variable)
                else:
                    small.write_meta(variable)
                yield from large.jobs(variable, source, fetched=source is not variable.source)
            elif small.add(variable, source):
                yield from small.jobs(threads_take=bool(large.open_files) or large.failed)
        yield from small.jobs(threads_take=bool(large.open_files) or large.failed)
        if links.batches:
            yield from links.add_rest()

    def _fetch(self, variable: PlannedVariable, late: LazyArray) -> np.ndarray | Stored:
        array = late.numpy()
        if array.shape != variable.meta.shape or array.dtype.newbyteorder("<") != late.dtype.newbyteorder("<"):
            raise VariableMismatch(
                "the values read do not have the shape and type declared for this variable",
                variable=variable.name,
                found=f"{array.shape} {array.dtype}",
                expected=f"{variable.meta.shape} {late.dtype}",
            )
        stored = self._base.get(variable.name)
        return (
            stored
            if stored is not None and equals_stored(variable, array, stored, self._plan.encoding_of(variable.name))
            else array
        )
