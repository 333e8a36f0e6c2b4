"""Compare two checkpoints."""

from __future__ import annotations

import os

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.digests import all_digests
from varstore.layout.difference import DiffReport, compare
from varstore.layout.manifest import Entry
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.values.arguments import checked

__all__ = ["DiffReport", "diff"]


@checked
def diff(a: str | os.PathLike[str] | Checkpoint, b: str | os.PathLike[str] | Checkpoint) -> DiffReport:
    """Compare two checkpoints by name, shape, type and digest; values are read only where a digest is missing.

    Args:
        a: the earlier checkpoint: its directory, or an open `Checkpoint`.
        b: the later one.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: one of them cannot be opened.

    Example:
        >>> first = vs.save("a", {"w": np.zeros(3), "bias": np.zeros(1)})
        >>> second = vs.save("b", {"w": np.ones(3), "bias": np.zeros(1), "step": np.array(7)})
        >>> print(vs.diff("a", "b"))
        a -> b: 1 unchanged
          added    step
          changed  w: values
    """
    first, second = (c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (a, b))
    return compare(first.path, second.path, _with_digests(first), _with_digests(second))


def _with_digests(checkpoint: Checkpoint) -> dict[str, Entry]:
    with translated(checkpoint.path, "reading failed"), Directory(checkpoint.location) as directory:
        return {
            name: variable.entry
            if variable.entry.digests
            else variable.entry._replace(digests=all_digests(directory, variable.entry))
            for name, variable in checkpoint.items()
        }
