"""Seal a checkpoint: write a manifest that records what is in its folders now."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import open_checkpoint
from varstore.disk.read.digests import all_digests
from varstore.disk.read.scan import WalkedEntries
from varstore.disk.save.durability import sync_folder
from varstore.errors import FormatError, InvalidName, ManifestError, MetaError
from varstore.layout.collector import collector_paused
from varstore.layout.difference import DiffReport, compare
from varstore.layout.manifest import VERSION_FIELD, Entry, Manifest
from varstore.layout.names import MANIFEST
from varstore.layout.readable import readable
from varstore.storage import syscalls
from varstore.storage.directory import Directory, locate
from varstore.storage.failures import translated
from varstore.values.arguments import checked

__all__ = ["seal"]


@checked
def seal(path: str | os.PathLike[str], *, writer: str = "varstore", progress: Progress = None) -> DiffReport:
    """Write a manifest that records what is in the folders now, and return what that changes.

    Use it for a checkpoint without a manifest, and after a change by hand. For folders that the present manifest lists,
    names and attributes are kept.

    Args:
        path: a checkpoint's directory.
        writer: what the manifest says of who wrote it.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        IncompleteCheckpoint: there is no marker, so nothing says that the folders are complete.
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
    location = locate(path)
    root = location.path
    if not syscalls.CAN_SAVE:
        raise syscalls.cannot_save(root, "sealing")
    before = _present_manifest(root)
    listed = _decodable(before.entries) if before else {}
    known = {entry.folder: entry for entry in listed.values()}
    order = {folder: place for place, folder in enumerate(known)}
    with translated(root, "sealing failed"), Directory(location) as directory:
        walked = WalkedEntries(directory, location)
        entries: dict[str, Entry] = {}
        with reporting(progress, sum(e.nbytes for e in walked.values()), f"sealing {root}") as advance:
            for found in sorted(walked.values(), key=lambda entry: order.get(entry.folder, len(order))):
                entry = _sealed(directory, found, known.get(found.folder))
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
        with collector_paused():
            encoded = after.encode()
        _replace_manifest(directory, encoded)
    return compare(root, root, listed, entries)


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


def _sealed(directory: Directory, found: Entry, known: Entry | None) -> Entry:
    if found.meta is None:
        raise MetaError(
            "a variable without meta cannot be sealed",
            path=directory.place(found.folder),
            variable=found.name,
            hint="load it with load_variables, which knows shape and type, and save that",
        )
    readable(found, path=directory.path)
    entry = found._replace(digests=all_digests(directory, found))
    if known is None:
        return entry
    return entry._replace(name=known.name, attributes=known.attributes)


def _tied(entry: Entry, known: Entry | None, entries: Mapping[str, Entry]) -> Entry:
    """Return the entry as an alias of the one that it was an alias of, where both still hold the same values."""
    first = entries.get(known.alias_of) if known else None
    if first is None or (first.meta, first.digests) != (entry.meta, entry.digests):
        return entry
    return entry._replace(alias_of=first.name)


def _replace_manifest(directory: Directory, data: bytes) -> None:
    temporary = f".{MANIFEST}.{os.urandom(4).hex()}"
    fd = os.open(temporary, syscalls.NEW, 0o444, dir_fd=directory.fd)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            syscalls.sync(fd)
        os.rename(temporary, MANIFEST, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    except BaseException:
        os.unlink(temporary, dir_fd=directory.fd)
        raise
    sync_folder(directory.location.absolute)
