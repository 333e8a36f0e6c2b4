"""Pack a checkpoint into less space, and unpack it: the same variables in another encoding (FORMAT F9)."""

from __future__ import annotations

from typing import Literal

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.digests import check_linked
from varstore.layout.attached import FileEntry
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.shards import Level
from varstore.model.options import Path
from varstore.model.store import write_plan
from varstore.values.arguments import checked
from varstore.values.arrays import Stored
from varstore.values.plan import SavePlan, plan_save

__all__ = ["pack", "unpack"]


@checked
def pack(
    source: Path | Checkpoint,
    target: Path,
    *,
    level: Literal["fast", "small"] = "fast",
    verify: bool = False,
    overwrite: bool = False,
    durable: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Checkpoint:
    """Save a checkpoint again with its variables compressed, for archives and slow connections.

    Nothing is lost: names, values, attributes, nested state and attached files are those of the source. All of varstore
    reads it, except ``mmap=True``; zarr and TensorStore open the folder of a variable. Variables with less than 64 KiB,
    those that compression makes hardly smaller, and those that a graph reads, stay raw. They are linked, and so are
    variables that are packed already.

    Where a variable is read whole, what is stored is compared with its digests before it is decompressed, as it is for
    a slice if the variable has at most 2 MiB when packed.

    Args:
        source: a checkpoint's directory, or an open one.
        target: a path that does not exist, or an empty directory.
        level: "fast" decompresses quickly, "small" takes less space.
        verify: compare what is linked with its digests, before anything is written. What is read, is compared in any
            case.
        overwrite, durable, threads, progress: see `varstore.save`.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError, DigestMismatch: the source cannot be read.
        CheckpointExists, OutOfSpace, StorageError: the target cannot be written, or can have no symbolic links.
        MissingDependency: numcodecs is not installed; ``pip install 'varstore[zarr]'``.

    Example:
        >>> checkpoint = vs.save("trained", {"weight": np.arange(100_000, dtype=np.float32)})
        >>> packed = vs.pack("trained", "archive")
        >>> packed["weight"].stored_nbytes < packed["weight"].nbytes
        True
        >>> bool((packed["weight"].numpy() == checkpoint["weight"].numpy()).all())
        True
    """
    return _encoded(source, target, "zarr", level, verify, overwrite, durable, threads, progress)


@checked
def unpack(
    source: Path | Checkpoint,
    target: Path,
    *,
    verify: bool = False,
    overwrite: bool = False,
    durable: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Checkpoint:
    """Save a checkpoint again with raw values, which OneFlow, ``cat`` and ``mmap=True`` read; see `pack`.

    Raises:
        The errors of `pack`.

    Example:
        >>> checkpoint = vs.save("trained", {"weight": np.arange(100_000, dtype=np.float32)})
        >>> vs.pack("trained", "archive")
        <Checkpoint 'archive': 1 variable>
        >>> vs.diff("trained", vs.unpack("archive", "again")).equal
        True
    """
    return _encoded(source, target, "raw", "fast", verify, overwrite, durable, threads, progress)


def _encoded(
    source: Path | Checkpoint,
    target: Path,
    encoding: Literal["raw", "zarr"],
    level: Level,
    verify: bool,
    overwrite: bool,
    durable: bool,
    threads: int | None,
    progress: Progress,
) -> Checkpoint:
    def save(checkpoint: Checkpoint) -> Checkpoint:
        plan = plan_save(
            checkpoint,
            attributes=checkpoint.attributes,
            tree=checkpoint.manifest.tree if checkpoint.manifest else "",
            files=checkpoint.files or None,
            encoding=encoding,
            level=level,
        )
        if verify:
            check_linked(_linked(plan), threads, progress)
        return write_plan(
            target,
            plan,
            base=None,
            overwrite=overwrite,
            foreign="error",
            durable=durable,
            manifest=True,
            threads=threads,
            progress=progress,
        )

    return retry_if_replaced(save, source)


def _linked(plan: SavePlan) -> list[tuple[Location, Entry | FileEntry]]:
    """Return the files of other checkpoints that a save links, tied variables once."""
    variables = [v.source for v in plan.variables if isinstance(v.source, Stored) and not v.alias_of]
    files = [file.stored for file in plan.files if file.stored is not None]
    return [*((v.location, v.entry) for v in variables), *((file.location, file.entry) for file in files)]
