"""Compare two checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping

from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.digests import all_digests
from varstore.layout.attached import FileEntry
from varstore.layout.difference import DiffReport, compare
from varstore.layout.manifest import NO_FILES, Entry
from varstore.layout.readable import readable
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.values.arguments import checked

__all__ = ["DiffReport", "diff"]


@checked
def diff(a: str | os.PathLike[str] | Checkpoint, b: str | os.PathLike[str] | Checkpoint) -> DiffReport:
    """Compare two checkpoints by name, shape, type and digest; values are read only where a digest is missing.

    Attached files are compared by name, digest, kind and attributes.

    Args:
        a: the earlier checkpoint: its directory, or an open `Checkpoint`.
        b: the later one.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: one of them cannot be opened.
        SizeMismatch: a file that has to be read is not as long as its shape and type say.

    Example:
        >>> first = vs.save("a", {"w": np.zeros(3), "bias": np.zeros(1)})
        >>> second = vs.save("b", {"w": np.ones(3), "bias": np.zeros(1), "step": np.array(7)})
        >>> print(vs.diff("a", "b"))
        a -> b: 1 unchanged
          added    step
          changed  w: values
    """
    return retry_if_replaced(_compared, a, b)


def _compared(first: Checkpoint, second: Checkpoint) -> DiffReport:
    files = _files_of(first), _files_of(second)
    return compare(first.path, second.path, _with_digests(first, second), _with_digests(second, first), files)


def _files_of(checkpoint: Checkpoint) -> Mapping[str, FileEntry]:
    return checkpoint.manifest.files if checkpoint.manifest else NO_FILES


def _with_digests(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, Entry]:
    """Return the entries of a checkpoint; what only digests can tell from the other's variable has them."""
    with translated(checkpoint.path, "reading failed"), Directory(checkpoint.location) as directory:
        return {name: _with_digest(directory, checkpoint.entry(name), other) for name in checkpoint}


def _with_digest(directory: Directory, entry: Entry, other: Checkpoint) -> Entry:
    if entry.digests or entry.name not in other:
        return entry
    counterpart = other.entry(entry.name)
    if entry.meta is None or (entry.meta, entry.nbytes) != (counterpart.meta, counterpart.nbytes):
        return entry
    if entry.meta.data_type.dtype is not None:
        readable(entry, path=directory.path)  # a size that the shape does not say may be a whole disk's
    return entry._replace(digests=all_digests(directory, entry))
