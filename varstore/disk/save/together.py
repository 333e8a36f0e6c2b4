"""How several processes write one checkpoint: each its own variables, and its own regions of others.

One process coordinates, and all participate, it too:

1. The coordinator knows what every process has, and stages the save as any other: a locked, signed folder that only
   this user may enter. For each process it has a ticket: the name of that folder, its note, and what to write.
2. Each process opens the folder with its own path. The note, which names the coordinator's process and has a random
   name, proves that all see the same folder: a path that means something else on one machine is an error at once, and
   not a checkpoint with holes. Then it writes, hashed on the way, and makes durable what it wrote; its report says what
   that was.
3. When it has all reports, the coordinator writes the manifest and the marker, and renames the folder.

Nobody waits for anybody in between. Variables that one process has whole are its own, and are written as in any save.
Of the others, one of the writers makes ``meta``; whoever comes first creates the folder and ``out``. As long as there
are writers to come, such an ``out`` can only be opened by this user; the coordinator gives it its mode at the end.

How tickets and reports travel is the caller's part: both are text. If the coordinator is killed, the folder is what
any killed save leaves, and the others end with an error of their own. If another process fails, the caller has the
coordinator `abort`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from varstore.disk.blocks import SMALL
from varstore.disk.save.durability import SYNC_EACH, Durability, is_synced_whole, sync_each
from varstore.disk.save.foreign import Foreign
from varstore.disk.save.large_file import LargeFiles
from varstore.disk.save.leftovers import clean_staging
from varstore.disk.save.links import Links
from varstore.disk.save.shared_file import SharedFile
from varstore.disk.save.small_files import SmallFiles
from varstore.disk.save.space import check_space
from varstore.disk.save.staging import Staging, prepare_target
from varstore.disk.save.writer import Saved, failed
from varstore.disk.threads import Job, Lane, do_here_until_slow, in_lanes, run, thread_count
from varstore.errors import CheckpointExists, InvalidName, OutOfSpace, StorageError, UsageError, VarstoreError
from varstore.layout.dtypes import BY_NUMBER
from varstore.layout.manifest import Entry, Manifest, digest_in
from varstore.layout.meta import Meta, encode_meta
from varstore.layout.names import folder_of
from varstore.layout.regions import Region, ordinary, tiling_problem
from varstore.storage import syscalls
from varstore.storage.appearing import target_of
from varstore.storage.claims import host, is_ours, notes_in
from varstore.storage.directory import closing
from varstore.storage.failures import storage_error
from varstore.storage.forks import tell_children
from varstore.values.lazy import LazyArray
from varstore.values.plan import PlannedVariable, SavePlan

__all__ = ["GIVEN_UP", "Coordinator", "Participant", "host", "placeholder", "take_part"]

GIVEN_UP = "the folder that the save is staged in is gone: another process has given it up"
"""What the error of a process says that failed because another one did."""

_NFS = 0x6969
_BATCH = 64
"""Small regions that are written in one job."""
_WAITING = 2
"""Threads for each processor in a durable save, where half of them wait for the disk."""
_APPEARS = 5.0
"""Seconds that a process waits for the staging folder to be seen: some file systems show it a little later."""
_ENDING = (0.0, 0.05, 0.2, 0.5, 1.0)
"""Seconds between attempts to remove what others may still be writing to."""
_WHOLE, _MAKES, _JOINS = "whole", "makes", "joins"
"""What a process does for a variable: writes all of it; makes its folder and writes a part; or writes a part."""
_GONE = {errno.ENOENT, errno.ESTALE}


def placeholder(shape: Sequence[int], dtype: np.dtype[Any], identity: Hashable = None) -> LazyArray:
    """Return what stands for a variable in a plan of several processes; those of one identity are tied."""
    return LazyArray(tuple(shape), dtype, _nowhere, identity=identity)


def _nowhere() -> np.ndarray:
    raise AssertionError("the values are with the processes that write them")


class _Share(NamedTuple):
    """What one process does for one variable."""

    shape: tuple[int, ...]
    data_type: int
    role: str


class Coordinator:
    """Stages a save of several processes, and makes it visible when all have reported; see the module.

    `parts` has, for each process, the regions of each variable that it has the values of, without digests; those
    without elements count for nothing. `hosts` has what `host` returns in each. The plan's variables may be
    placeholders. `tickets` are for the processes, in the order of `parts`.

    Raises:
        CheckpointExists, InvalidName, OutOfSpace: as for `varstore.save`; nothing was written.
        UsageError: the regions do not tile a variable, or the file system is not one that several machines may write
            to; nothing was written.
        StorageError: the operating system refused.
    """

    def __init__(
        self,
        path: str,
        plan: SavePlan,
        parts: Sequence[Mapping[str, Sequence[Region]]],
        *,
        hosts: Sequence[str],
        writer: str,
        overwrite: bool,
        durable: bool,
        foreign: Foreign = "error",
        allow_nfs: bool = False,
    ) -> None:
        self._path = path
        self._plan = plan
        self._writer = writer
        self._parts = parts
        self.staging: Staging | None = None
        if not syscalls.CAN_SAVE:
            raise syscalls.cannot_save(path, "saving")
        shares, self._expected = _shares(plan, parts, path)
        self._shared = list(
            dict.fromkeys(name for one in shares for name, share in one.items() if share.role != _WHOLE)
        )
        self._late: dict[str, Region] = {}
        try:
            target = prepare_target(path, overwrite=overwrite, foreign=foreign, together=True)
            if target.in_place:
                raise CheckpointExists(
                    "a mount point or the working directory cannot be filled by several processes",
                    path=path,
                    hint="save to a folder in it",
                )
            check_space(plan, target.path)
            self.staging = Staging(target, Durability(durable=durable, each=False), plan.tops).__enter__()
            self.tickets = self._tickets(shares, hosts, allow_nfs=allow_nfs)
        except OSError as error:
            self._fail(error)
        except BaseException as error:
            self.abort(error)
            raise

    def _fail(self, error: OSError) -> NoReturn:
        """Undo the save, and raise an error of varstore's tree for one of the system."""
        self.abort(error)
        if isinstance(error, VarstoreError):
            raise error
        raise failed(error, self._path, self._plan, self.staging) from error

    def _tickets(self, shares: Sequence[Mapping[str, _Share]], hosts: Sequence[str], *, allow_nfs: bool) -> list[str]:
        assert self.staging is not None
        fd = self.staging.fd
        counts = Counter(hosts)
        if len(counts) > 1 and not allow_nfs and syscalls.file_system_type(fd) == _NFS:
            raise UsageError(
                "this is NFS, where two machines that write to one page may lose bytes of each other",
                path=self._path,
                found=f"processes of {len(counts)} machines",
                hint="save to Lustre, GPFS, BeeGFS or another coherent file system; with allow_nfs=True, verify it",
            )
        ((note, lines),) = notes_in(fd).items()
        durable = self.staging.durability.durable
        common = {
            "target": os.path.basename(self.staging.target.path),
            "folder": os.path.basename(self.staging.path),
            "note": note,
            "lines": lines,
            "private": self.staging.is_private,
            "durable": durable,
            "one_host": len(counts) == 1,
        }
        workers = thread_count(None) * (_WAITING if durable else 1)
        return [
            json.dumps({**common, "threads": max(1, workers // counts[where]), "variables": share})
            for share, where in zip(shares, hosts, strict=True)
        ]

    def add(self, plan: SavePlan) -> None:
        """Write further variables in this process: those that came to light when the others were being written."""
        parts = {v.name: (Region.whole(v.meta.shape),) for v in plan.variables}
        assert self.staging is not None
        (share,), expected = _shares(plan, (parts,), self._path)
        known = {variable.name for variable in self._plan.variables}
        assert not known & parts.keys(), "a variable is planned twice"
        durable = self.staging.durability.durable
        work = _Work(self.staging.fd, share, durable=durable, private=self.staging.is_private, maps=True)
        try:
            written = work.write(((v.name, (0,) * len(v.meta.shape), v.source) for v in plan.variables), 1)
            work.sync()
        except OSError as error:
            self._fail(error)
        self._late |= dict(written)
        self._expected |= expected
        both = (*self._plan.variables, *plan.variables)
        self._plan = self._plan._replace(variables=both, parents=tuple(sorted({*self._plan.parents, *plan.parents})))

    def commit(self, reports: Iterable[str], *, tree: str | None = None) -> Saved:
        """Make the checkpoint visible, when all processes have written and reported.

        Raises:
            UsageError: a report does not say what its ticket asked for.
            CheckpointExists: another writer has taken the target meanwhile.
            StorageError: the operating system refused.
        """
        staging = self.staging
        assert staging is not None, "the save was aborted"
        try:
            if tree is not None:
                self._plan = self._plan._replace(tree=tree)
            found = self._regions(reports)
            self._complete()
            entries = {v.name: _entry(v, found[v.alias_of or v.name]) for v in self._plan.variables}
            record = Manifest(
                writer=self._writer,
                time_ns=time.time_ns(),
                attributes=self._plan.attributes,
                tree=self._plan.tree,
                entries=entries,
            )
            encoded = record.encode()
            staging.commit(encoded)
        except OSError as error:
            self._fail(error)
        except BaseException as error:
            self.abort(error)
            raise
        staging.__exit__(None, None, None)
        return Saved(entries, record, digest_in(encoded))

    def _regions(self, reports: Iterable[str]) -> dict[str, tuple[Region, ...]]:
        found: dict[str, list[Region]] = defaultdict(list)
        for report in reports:
            for name, offsets, sizes, digests in json.loads(report):
                found[name].append(Region(tuple(offsets), tuple(sizes), bytes.fromhex(digests)))
        for name, region in self._late.items():
            found[name].append(region)
        for name, regions in self._expected.items():
            if sorted(region[:2] for region in found[name]) != regions:
                raise UsageError(
                    "the processes have not written what they were asked for", path=self._path, variable=name
                )
        return {name: tuple(sorted(regions)) for name, regions in found.items()}

    def _complete(self) -> None:
        """Give files that several processes wrote their mode, link tied variables, and make that durable."""
        staging = self.staging
        assert staging is not None
        fd, folders = staging.fd, {variable.name: variable.folder for variable in self._plan.variables}
        mode = 0
        for name in self._shared:
            mode = mode or stat.S_IMODE(os.stat(f"{folders[name]}/meta", dir_fd=fd, follow_symlinks=False).st_mode)
            _change_mode(f"{folders[name]}/out", mode, fd, private=staging.is_private)
        tied = [variable for variable in self._plan.variables if variable.alias_of]
        if tied:
            self._tie(tied)
        if staging.target.kept:
            staging.carry()
        changed = [f"{folders[name]}/out" for name in self._shared]
        changed += [f"{variable.folder}/{file}" for variable in tied for file in ("meta", "out")]
        if changed and staging.durability.durable:
            _sync(fd, changed, [variable.folder for variable in tied])

    def _tie(self, tied: Sequence[PlannedVariable]) -> None:
        staging = self.staging
        assert staging is not None
        digests = {variable.name: b"" for variable in self._plan.variables}
        folders = _Folders(staging.fd, private=staging.is_private)
        for variable in tied:
            folders.make(variable.folder)
        small = SmallFiles(staging, digests, None, _BATCH, None)
        Links(staging, small, digests, {}, {}, _BATCH, None, shares=self._plan.links).tie(self._plan.variables)

    def abort(self, error: BaseException | None = None) -> None:
        """Undo the save, unless it is visible; nothing is left, also of what others are still writing."""
        staging = self.staging
        if staging is None or staging.fd < 0:
            return
        path = staging.path
        failure = error or StorageError("the save was aborted", path=self._path)
        was_visible = staging.is_visible
        staging.__exit__(type(failure), failure, None)
        if was_visible or staging.is_visible:
            return
        for pause in _ENDING:
            time.sleep(pause)
            if not os.path.lexists(path):
                return
            with contextlib.suppress(OSError, VarstoreError):
                clean_staging(os.path.dirname(path), name=os.path.basename(staging.target.path))


def _shares(
    plan: SavePlan, parts: Sequence[Mapping[str, Sequence[Region]]], path: str
) -> tuple[list[dict[str, _Share]], dict[str, list[tuple[Any, ...]]]]:
    """Return what each process does for each variable that it has a part of; and the regions that will be written.

    Raises:
        UsageError: the parts of a variable are not all of it.
    """
    writers: dict[str, list[tuple[int, Region]]] = defaultdict(list)
    for process, regions in enumerate(parts):
        for name, its in regions.items():
            writers[name] += ((process, region) for region in its)
    shares: list[dict[str, _Share]] = [{} for _ in parts]
    makes = [0] * len(parts)
    expected: dict[str, list[tuple[Any, ...]]] = {}
    for variable in plan.variables:
        if variable.alias_of:
            continue
        (shape, data_type), every = variable.meta, writers.pop(variable.name, [])
        if problem := tiling_problem([region for _, region in every], shape) if every else "no process has it":
            raise UsageError(
                f"the parts that the processes have do not make it whole: {problem}", path=path, variable=variable.name
            )
        some = [(process, region) for process, region in every if region.elements] or every[:1]
        if len(some) == 1:
            shares[some[0][0]][variable.name] = _Share(shape, data_type.number, _WHOLE)
            expected[variable.name] = [((0,) * len(shape), shape)]
            continue
        those = list(dict.fromkeys(process for process, _ in some))
        least = min(those, key=makes.__getitem__)
        makes[least] += 1
        for process in those:
            shares[process][variable.name] = _Share(shape, data_type.number, _MAKES if process == least else _JOINS)
        expected[variable.name] = sorted(region[:2] for _, region in some)
    return shares, expected


def _entry(variable: PlannedVariable, regions: tuple[Region, ...]) -> Entry:
    shape, data_type = variable.meta
    assert data_type.dtype is not None
    digests = ordinary(regions, shape, data_type.dtype.itemsize)
    entry = variable.entry(digests or b"")
    return entry if digests is not None else entry._replace(regions=regions)


def take_part(path: str, ticket: str, values: Iterable[tuple[str, Sequence[int], np.ndarray | LazyArray]]) -> str:
    """Write what this process has of a save to a path, and return its report; raises what `Participant` does."""
    participant = Participant(path, ticket)
    try:
        participant.write(values)
        return participant.finish()
    finally:
        participant.close()


class Participant:
    """Writes what one process has into the folder that another one staged; see the module.

    Raises:
        StorageError: this process does not see that folder, or it is not one that only this user may change.
    """

    def __init__(self, path: str, ticket: str) -> None:
        said = json.loads(ticket)
        self._path = path
        self._threads = int(said["threads"])
        self._opened: list[int] = []
        self._closing = closing(self._opened)
        tell_children(self, Participant.close)
        fd = self._find(said)
        shares = {name: _Share(tuple(shape), number, role) for name, (shape, number, role) in said["variables"].items()}
        self._work = _Work(fd, shares, durable=said["durable"], private=said["private"], maps=said["one_host"])
        self._written: list[tuple[str, Region]] = []

    def _find(self, said: Mapping[str, Any]) -> int:
        deadline = time.monotonic() + _APPEARS
        directory, name = os.path.split(target_of(self._path))
        if name != said["target"]:  # where this process would look for the checkpoint, and may find an older one
            raise StorageError(
                "this process saves to another path than the process which coordinates the save",
                path=self._path,
                found=repr(name),
                expected=repr(said["target"]),
                hint="give all processes the same path",
            )
        while True:
            try:
                return self._open(directory, said)
            except (FileNotFoundError, NotADirectoryError) as error:
                if time.monotonic() > deadline:
                    raise StorageError(
                        "this process does not see the folder that the process which coordinates the save made",
                        number=error.errno,
                        path=self._path,
                        found=f"no {said['folder']} in {directory}",
                        hint="give all processes the same path, on a file system that they share",
                    ) from error
            except OSError as error:
                raise _refused(error, self._path) from error
            time.sleep(0.05)

    def _open(self, directory: str, said: Mapping[str, Any]) -> int:
        parent = syscalls.open_fd(directory, syscalls.READ_FOLDER)
        try:
            fd = syscalls.folder_in(said["folder"], parent)
            self._opened.append(fd)
            status = os.fstat(fd)
            if not is_ours(status, parent):
                raise PermissionError(
                    errno.EPERM, f"the staging folder belongs to user {status.st_uid}", said["folder"]
                )
            if said["private"] and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise PermissionError(errno.EPERM, "others may enter the staging folder", said["folder"])
            if notes_in(fd).get(said["note"]) != said["lines"]:
                self._opened.remove(fd)
                os.close(fd)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), said["note"])
            return fd
        finally:
            os.close(parent)

    def write(self, values: Iterable[tuple[str, Sequence[int], np.ndarray | LazyArray]]) -> None:
        """Write regions: of each the variable, where it begins, and its values.

        The iterable is asked for the next one when there is a thread for it. What is lazy is read then, one at a time.

        Raises:
            OutOfSpace, StorageError: the operating system refused.
            InvalidName: the file system holds the folder of another variable for that of one.
        """
        try:
            self._written += self._work.write(values, self._threads)
        except OSError as error:
            raise _refused(error, self._path) from error

    def finish(self) -> str:
        """Make durable what was written, close the folder, and return the report for the coordinator."""
        try:
            self._work.sync()
        except OSError as error:
            raise _refused(error, self._path) from error
        finally:
            self.close()
        return json.dumps([(name, *region[:2], region.digests.hex()) for name, region in self._written])

    def close(self) -> None:
        """Give up the folder."""
        self._closing.close()


def _refused(error: OSError, path: str) -> VarstoreError:
    if isinstance(error, VarstoreError):
        return error
    if isinstance(error, FileExistsError):
        return InvalidName(
            "another variable already uses this folder: the file system ignores differences in case or accents",
            path=path,
            found=error.filename,
            hint="rename one of the two",
        )
    if error.errno in _GONE:
        return StorageError(
            GIVEN_UP,
            number=error.errno,
            path=path,
            hint="see the error of the process that coordinates the save",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(
            "the disk became full while this process wrote its part",
            number=error.errno,
            path=path,
            hint="free some space, or save elsewhere",
        )
    return storage_error(error, path, "this process cannot write its part")


class _Work:
    """Writes regions of variables into an open staging folder; `durability`, `fd` and `is_private` are its place."""

    def __init__(self, fd: int, shares: Mapping[str, _Share], *, durable: bool, private: bool, maps: bool) -> None:
        self.fd = fd
        self.is_private = private
        self.durability = Durability(durable=durable, each=durable and len(shares) <= SYNC_EACH)
        self._shares = shares
        self._maps = maps
        self._digests: dict[Any, bytes] = {}
        self._small = SmallFiles(self, self._digests, None, _BATCH, None)
        self._large = LargeFiles(self, self._digests, None)
        self._files: list[str] = []
        self._folders = _Folders(fd, private=private)
        self._folder_of = {name: str(folder_of(name)) for name in shares}

    def write(
        self, values: Iterable[tuple[str, Sequence[int], np.ndarray | LazyArray | Any]], threads: int
    ) -> list[tuple[str, Region]]:
        """Write regions, and return them with their digests."""
        regions: dict[tuple[str, tuple[int, ...]], Region] = {}
        try:
            for name, share in self._shares.items():
                if share.role == _MAKES:
                    self._make(name, share)
            run(in_lanes(self._jobs(values, regions)), threads, on_failure=self._large.fail)
        finally:
            self._large.close()
        found = []
        for key, region in regions.items():
            digests = self._digests[key if self._shares[key[0]].role != _WHOLE else key[0]]
            found.append((key[0], region._replace(digests=digests)))
        return found

    def _make(self, name: str, share: _Share) -> None:
        folder = self._folder_of[name]
        self._folders.make(folder)
        meta = encode_meta(Meta(share.shape, BY_NUMBER[share.data_type]))
        syscalls.write_file(f"{folder}/meta", meta, self.fd, durable=self.durability.each)
        self._files.append(f"{folder}/meta")

    def _jobs(
        self,
        values: Iterable[tuple[str, Sequence[int], Any]],
        regions: dict[tuple[str, tuple[int, ...]], Region],
    ) -> Iterator[Lane | Job]:
        small, large = self._small, self._large
        parts: list[tuple[Region, str, np.ndarray]] = []
        for name, offsets, source in values:
            share = self._shares.get(name)
            key = (name, tuple(offsets))
            if share is None or key in regions or (0 in source.shape and 0 not in share.shape):
                continue
            if share.role == _WHOLE:
                key = (name, (0,) * len(share.shape))
                if key in regions:
                    continue
            is_late = isinstance(source, LazyArray)
            if is_late:
                large.wait_for_fetched()
                if large.failed:
                    return
            array = source.numpy() if is_late else source
            self._check(name, share, array)
            if share.role == _WHOLE:
                meta = Meta(share.shape, BY_NUMBER[share.data_type])
                variable = PlannedVariable(name, folder_of(name), meta, array.nbytes, array, {})
                regions[key] = Region(key[1], share.shape)
                self._folders.make(variable.folder)
                self._files += [f"{variable.folder}/meta", variable.file]
                if variable.nbytes >= SMALL:
                    small.write_meta(variable)
                    yield from large.jobs(variable, array, fetched=is_late)
                elif small.add(variable, array.reshape(share.shape)):
                    yield from small.jobs(threads_take=bool(large.open_files) or large.failed)
                continue
            region = regions[key] = Region(key[1], array.shape)
            self._files.append(f"{self._folder_of[name]}/out")
            if array.nbytes >= SMALL:
                yield from large.jobs_of(key, partial(self._open, name, region, array), fetched=is_late)
            else:
                parts.append((region, name, array))
        yield from small.jobs(threads_take=bool(large.open_files) or large.failed)
        groups = [parts[at : at + _BATCH] for at in range(0, len(parts), _BATCH)]
        yield from do_here_until_slow(groups, self._write_parts)

    def _check(self, name: str, share: _Share, array: np.ndarray) -> None:
        expected = BY_NUMBER[share.data_type].dtype
        if array.dtype.newbyteorder("<") != expected:
            raise UsageError(
                "the values are not of the type that was planned", variable=name, found=array.dtype, expected=expected
            )

    def _open(self, name: str, region: Region, array: np.ndarray) -> SharedFile:
        file, shape = f"{self._folder_of[name]}/out", self._shares[name].shape
        create = partial(
            SharedFile, file, region, array, shape, dir_fd=self.fd, private=self.is_private, maps=self._maps
        )
        try:
            return create()
        except FileNotFoundError:  # who makes the folder has not come to it yet
            self._folders.make(self._folder_of[name])
            return create()

    def _write_parts(self, parts: Sequence[tuple[Region, str, np.ndarray]]) -> None:
        for region, name, array in parts:
            out = self._open(name, region, array)
            try:
                for start, stop in out.pieces():
                    out.write(start, stop)
            except BaseException:
                out.close()
                raise
            self._digests[name, region.offsets] = out.finish(fsync=self.durability.each)

    def sync(self) -> None:
        """Make all durable that was written."""
        if self.durability.durable:
            _sync(self.fd, () if self.durability.each else self._files, self._folders.made)


def _sync(fd: int, files: Sequence[str], folders: Iterable[str]) -> None:
    if len(files) <= SYNC_EACH or not is_synced_whole(fd):
        sync_each(fd, files, folders)


class _Folders:
    """Makes folders in an open one in which others make the same ones; `private` is as for `make_folders`."""

    def __init__(self, root: int, *, private: bool) -> None:
        self._root = root
        self._private = private
        self.made: dict[str, None] = {}
        """Those that were made here, or found."""

    def make(self, folder: str) -> None:
        """Make a folder, and those above it, where nobody has."""
        if folder in self.made:
            return
        above, _, last = folder.rpartition("/")
        if above:
            self.make(above)
        fd = syscalls.folder_in(above, self._root) if above and not self._private else self._root
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder if self._private else last, dir_fd=fd)
        finally:
            if fd != self._root:
                os.close(fd)
        self.made[folder] = None


def _change_mode(file: str, mode: int, dir_fd: int, *, private: bool) -> None:
    with contextlib.suppress(PermissionError):  # vfat keeps no modes
        if private:
            os.chmod(file, mode, dir_fd=dir_fd)
            return
        fd = syscalls.open_fd(file, syscalls.READ_FILE, dir_fd=dir_fd)
        try:
            syscalls.change_mode(fd, mode)
        finally:
            os.close(fd)
