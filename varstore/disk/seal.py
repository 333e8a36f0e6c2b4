"""Seal a checkpoint: write a manifest that records what is in its folders now."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import PurePosixPath

from varstore.disk.encodings.companions import check_companions, link_chunk
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.digests import all_digests, content_digests
from varstore.disk.read.scan import WalkedEntries
from varstore.disk.regions import digest_regions
from varstore.disk.save.durability import Durability
from varstore.disk.save.leftovers import remove_old_manifests
from varstore.errors import IncompleteCheckpoint, InvalidName, ManifestError
from varstore.layout.attached import FileEntry
from varstore.layout.collector import collector_paused
from varstore.layout.difference import DiffReport, compare
from varstore.layout.encodings import ZARR
from varstore.layout.graphs import GRAPH, Binding
from varstore.layout.manifest import NO_FILES, UPGRADE, WITHOUT_MANIFEST, Entry, Manifest, digest_in
from varstore.layout.mlir import MOST, PROGRAM, ports_of, variables_of
from varstore.layout.names import MANIFEST, MARKER, Folder
from varstore.layout.readable import readable
from varstore.layout.shards import DOCUMENT
from varstore.storage import syscalls
from varstore.storage.directory import Directory, replaced_error
from varstore.storage.failures import translated
from varstore.storage.forks import Held, no_fork
from varstore.values.arguments import checked

__all__ = ["seal"]


@checked
def seal(
    path: str | os.PathLike[str], *, complete: bool = False, writer: str = "varstore", progress: Progress = None
) -> DiffReport:
    """Write a manifest that records what is in the folders now, and return what that changes.

    Use it for a checkpoint without a manifest, and after a change by hand. For folders that the present manifest lists,
    names and attributes are kept, as are attached files that are still there. Other files are not made attached ones.
    The regions of what several processes wrote become digests of whole blocks.

    Args:
        path: a checkpoint's directory.
        complete: also seal the folder that OneFlow wrote for an nn.Graph, which does not have a marker: only if each
            variable that its ``model.mlir`` names is there. That becomes an attached file, and the folder gets the
            marker.
        writer: what the manifest says of who wrote it.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        IncompleteCheckpoint: there is no marker, so nothing says that the folders are complete; or with `complete`, a
            variable that the program names is not there, or not as it says.
        ManifestError: the present manifest is torn, damaged or of a later version. Sealing would lose what it says:
            attributes, nested state, names. If there is no copy of it, remove the file ``manifest`` first.
        MetaError, SizeMismatch: a folder is not a variable as it is; nothing is written.
        StorageError: the operating system refused; nothing is written.

    Example:
        >>> import shutil
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.ones((2, 3)), "step": np.array(7)})
        >>> shutil.rmtree("lenet/step")
        >>> vs.verify("lenet").ok
        False
        >>> print(vs.seal("lenet"))
        lenet -> lenet: 1 unchanged
          removed  step
        >>> vs.verify("lenet").ok
        True
    """
    use = partial(_seal, complete=complete, writer=writer, progress=progress)
    return retry_if_replaced(use, path, allow_incomplete=complete and not os.path.lexists(os.path.join(path, MARKER)))


def _seal(checkpoint: Checkpoint, *, complete: bool, writer: str, progress: Progress) -> DiffReport:
    root, location, before = checkpoint.path, checkpoint.location, checkpoint.manifest
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(root, "sealing")
    listed = _listed(checkpoint)
    known = {entry.folder: entry for entry in listed.values()}
    order = {folder: place for place, folder in enumerate(known)}
    with translated(root, "sealing failed"), Directory(location) as directory:
        walked = WalkedEntries(directory, location)
        entries: dict[str, Entry] = {}
        with reporting(progress, sum(e.nbytes for e in walked.values()), f"sealing {root}") as advance:
            for found in sorted(walked.values(), key=lambda entry: order.get(entry.folder, len(order))):
                before_it = known.get(found.folder)
                entry = _sealed(directory, found, before_it)
                if before_it is not None and before_it.regions and _has_regions(directory, entry, before_it):
                    listed[entry.name] = before_it._replace(digests=entry.digests, regions=())
                if entry.name in entries:
                    raise InvalidName(
                        "two folders would have this name", path=root, variable=entry.name, found=entry.folder
                    )
                entries[entry.name] = entry
                if advance:
                    advance(entry.nbytes)
        entries = {name: _tied(entry, known.get(entry.folder), entries) for name, entry in entries.items()}
        files = _files_now(directory, before.files if before else NO_FILES)
        is_completed = complete and not location.has_marker
        if is_completed:
            files |= _program(directory, entries)
        after = Manifest(
            writer=writer,
            time_ns=time.time_ns(),
            attributes=before.attributes if before else {},
            tree=before.tree if before else "",
            entries=entries,
            files=files,
            unshared=before is not None and before.unshared,
        )
        with collector_paused():
            encoded = after.encode()
        documents = [f"{entry.folder}/{DOCUMENT}" for entry in entries.values() if entry.encoding == ZARR.name]
        _make_durable(directory, entries.values(), [*files, *documents])
        _replace_manifest(directory, encoded)
        if is_completed:
            syscalls.write_file(MARKER, b"", directory.fd, durable=True)
            syscalls.sync_names(directory.fd)
    return compare(root, root, listed, entries, (before.files if before else NO_FILES, files))


def _program(directory: Directory, entries: Mapping[str, Entry]) -> dict[str, FileEntry]:
    """Return the entry of the program in a folder of OneFlow, whose variables must all be there.

    Raises:
        IncompleteCheckpoint: there is no program, or a variable that it names is not there, or not as it says.
    """
    content = directory.read_if_there(PROGRAM, limit=MOST)
    if content is None:
        raise IncompleteCheckpoint(
            f"neither a marker nor a {PROGRAM!r} says that the folders are complete", path=directory.path
        )
    directory.check_regular(PROGRAM)
    metas = variables_of(content, path=directory.place(PROGRAM))
    for name, meta in metas.items():
        entry = entries.get(name)
        if entry is None or entry.meta != meta:
            raise IncompleteCheckpoint(
                "the program names a variable that is not there"
                if entry is None
                else "the variable is not what the program expects",
                path=directory.path,
                variable=name,
                found=None if entry is None else entry.form,
                expected=Entry(name, Folder(name), meta, 0).form,
            )
    bindings = {
        name: Binding(name, meta.data_type.dtype.name, meta.shape).as_json()
        for name, meta in metas.items()
        if meta.data_type.dtype is not None
    }
    about = {"entry": "forward", "format": "oneflow", **ports_of(content), "bindings": bindings}
    entry_of = FileEntry(PROGRAM, len(content), b"", GRAPH, about)
    return {PROGRAM: entry_of._replace(digests=all_digests(directory, entry_of))}


def _listed(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Return the entries of the present manifest, whose names and attributes are kept.

    Raises:
        ManifestError: one of them cannot be read, so sealing would lose what it says.
    """
    if checkpoint.manifest is None:
        return {}
    problem = "sealing would lose what the manifest says, because a part of it cannot be read"
    path = os.path.join(checkpoint.path, MANIFEST)
    if skipped := checkpoint.manifest.skipped():
        raise ManifestError(problem, path=path, found=f"field {min(skipped)}", hint=UPGRADE)
    try:
        return dict(checkpoint.manifest.entries)
    except ManifestError as error:
        raise ManifestError(
            problem, path=path, variable=error.variable, found=error.problem, hint=error.hint or WITHOUT_MANIFEST
        ) from error


def _sealed(directory: Directory, found: Entry, known: Entry | None) -> Entry:
    variable = readable(found, path=directory.path)
    entry = found._replace(digests=all_digests(directory, found))
    if entry.encoding == ZARR.name:
        link_chunk(directory, entry)
        check_companions(directory, entry)
        said = known.content_digests if known is not None and _form(known) == _form(entry) else b""
        entry = entry._replace(content_digests=said or content_digests(directory, variable))
    if known is None:
        return entry
    return entry._replace(name=known.name, attributes=known.attributes)


def _has_regions(directory: Directory, entry: Entry, known: Entry) -> bool:
    """Tell whether a variable still holds the values of the regions that the manifest lists."""
    if (entry.meta, entry.nbytes) != (known.meta, known.nbytes):
        return False
    with directory.out(entry) as fd:
        return all(digests == region.digests for region, digests in digest_regions(fd, known))


def _form(entry: Entry) -> tuple[object, ...]:
    """Return all that an encoded variable's values follow from."""
    return entry.meta, entry.encoding, entry.digests


def _tied(entry: Entry, known: Entry | None, entries: Mapping[str, Entry]) -> Entry:
    """Return the entry as an alias of the one that it was an alias of, where both still hold the same values."""
    first = entries.get(known.alias_of) if known else None
    if first is None or (first.meta, first.digests) != (entry.meta, entry.digests):
        return entry
    return entry._replace(alias_of=first.name)


def _files_now(directory: Directory, listed: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Return the attached files that are still there, as they are now.

    Raises:
        UnsafeContent: one is not a regular file.
    """
    files = {}
    for name, entry in listed.items():
        try:
            nbytes = directory.status(entry.file).st_size
        except FileNotFoundError:
            continue
        directory.check_regular(entry.file)
        found = entry._replace(nbytes=nbytes)
        files[name] = found._replace(digests=all_digests(directory, found))
    return files


def _make_durable(directory: Directory, entries: Collection[Entry], files: Iterable[str]) -> None:
    """Make durable what the manifest is about to vouch for: people change folders with tools that do not."""
    folders = [entry.folder for entry in entries]
    above = {str(parent) for folder in folders for parent in PurePosixPath(folder).parents}
    Durability(durable=True, each=False).sync_all(directory.fd, folders, sorted(above, reverse=True), files)


def _replace_manifest(directory: Directory, data: bytes) -> None:
    """Give the checkpoint another manifest, unless another checkpoint has taken its place.

    The new manifest is made in the directory before the identity is checked for the last time. If the checkpoint is
    replaced after that, the file is in the old one, and is never given its name in the new one, even if the file
    system finds it by its path. It is locked, which tells `clean_staging` that its writer lives.
    """
    remove_old_manifests(directory.fd)
    temporary = f".{MANIFEST}.{os.urandom(4).hex()}"
    held = None
    try:
        with no_fork:
            new = open(temporary, "xb", opener=lambda name, _: syscalls.create(name, directory.fd))  # noqa: SIM115
            held = Held(new.raw.close)
        with new as file:
            fd = file.fileno()
            with contextlib.suppress(OSError):  # a file system without locks
                syscalls.flock(fd, syscalls.LOCK)
            file.write(data)
            file.flush()
            syscalls.sync(fd)
            directory.check_identity()
            os.rename(temporary, MANIFEST, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    except BaseException:
        with contextlib.suppress(OSError):
            if held is None or held.is_ours:
                os.unlink(temporary, dir_fd=directory.fd)
        raise
    was = directory.location
    directory.location = was.known_as(digest_in(data), has_marker=was.has_marker, unshared=was.unshared)
    syscalls.sync_names(directory.fd)
    if not directory.is_current():
        raise replaced_error(directory.path)
