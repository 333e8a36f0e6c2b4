"""The verbs on whole models: save, and load into new memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.checks import check_files, check_readable, known_meta
from varstore.disk.read.whole import read_new
from varstore.disk.save.writer import write_checkpoint
from varstore.errors import CheckpointNotFound, FormatError, StorageError, UsageError
from varstore.layout.manifest import Entry
from varstore.model.options import Path
from varstore.values.plan import plan_save
from varstore.values.select import Patterns, Rename, select
from varstore.version import __version__

__all__ = ["load", "save", "while_it_stands"]

Result = TypeVar("Result")

_ATTEMPTS = 100


def save(
    path: Path,
    variables: Mapping[str, Any],
    *,
    attributes: Mapping[str, Any] | None = None,
    variable_attributes: Mapping[str, Mapping[str, Any]] | None = None,
    tree: str = "",
    base: Path | Checkpoint | None = None,
    overwrite: bool = False,
    durable: bool = True,
    manifest: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Checkpoint:
    """Write variables as a checkpoint: all of it, or nothing.

    The value decides what is done with it. An array (numpy's, of any layout and byte order; a tensor of
    torch, jax, paddle, mindspore, oneflow, megengine; a scalar; anything with shape, dtype and
    ``__array__``) is written. A `Variable` of another checkpoint is hard-linked, and copied in the kernel
    across file systems. Arrays that are one in memory are written once.

    Args:
        path: does not exist, or is an empty directory; not a symbolic link, though its parents may be.
        attributes: JSON for the whole checkpoint.
        variable_attributes: JSON for single variables, by name.
        tree: the JSON text that nested state was flattened from; see `varstore.save_state`.
        base: an earlier checkpoint; variables equal to its own in shape, type and digest are linked to it.
        overwrite: replace a whole checkpoint; at every moment the path holds the old one or the new one.
        durable: return only when all is on the disk; otherwise the system writes it when it likes, and only
            a crash of the machine can tell the difference.
        manifest: False writes nothing but OneFlow's own layout: no digests, no attributes.
        threads: one for each processor up to eight unless given, and twice as many where `durable` waits for
            the disk.
        progress: called with (bytes done, bytes in all), or True for a bar.

    Raises:
        InvalidName, UnsupportedDtype, CheckpointExists, OutOfSpace: before the first byte.
        OutOfSpace, StorageError: later; what was begun is removed.
    """
    if manifest and isinstance(variables, Checkpoint) and attributes is None and variables.manifest:
        attributes, tree = variables.attributes, tree or variables.manifest.tree
    plan = plan_save(variables, attributes=attributes, variable_attributes=variable_attributes, tree=tree)
    if not manifest and (plan.attributes or variable_attributes or tree):
        raise UsageError(
            "attributes and nested state are kept in the manifest, and manifest=False writes none",
            path=path,
            hint="leave out one of the two",
        )
    target = os.fspath(path)
    if not target:
        raise UsageError("the path to save to is empty")
    write_checkpoint(
        target,
        plan,
        writer=f"varstore {__version__}",
        base={} if base is None else _as_checkpoint(base),
        overwrite=overwrite,
        durable=durable,
        manifest=manifest,
        threads=threads,
        progress=progress,
    )
    return open_checkpoint(target)


def load(
    path: Path | Checkpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    mmap: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> dict[str, np.ndarray]:
    """Read the variables of a checkpoint into new arrays, in parallel.

    Variables that were one in memory when they were saved are one array again.

    Args:
        include, exclude: glob patterns on whole names, one or several.
        rename: prefixes, regular expressions or a function; see `varstore.values.select.select`.
        mmap: map the files read-only instead of reading them; nothing is checked but their sizes.
        verify: compare every byte read with the digests. `varstore.verify` also compares every ``meta``.
        threads, progress: as for `save`.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: it cannot be opened.
        VariableNotFound: a pattern matches nothing.
        DigestMismatch, SizeMismatch, ManifestError: what lies there is not what was saved.
    """
    return while_it_stands(
        path,
        lambda checkpoint: _load(
            checkpoint,
            select(checkpoint, include=include, exclude=exclude, rename=rename, path=checkpoint.path),
            mmap=mmap,
            verify=verify,
            threads=threads,
            progress=progress,
        ),
    )


def _load(
    checkpoint: Checkpoint,
    chosen: Mapping[str, str],
    *,
    mmap: bool,
    verify: bool,
    threads: int | None,
    progress: Progress,
) -> dict[str, np.ndarray]:
    if mmap:
        return {name: checkpoint[source].numpy(mmap=True) for name, source in chosen.items()}
    entries = {name: checkpoint.entry(source) for name, source in chosen.items()}
    first_of: dict[str, str] = {}
    tied: list[Entry] = []
    for name, entry in entries.items():
        if first_of.setdefault(entry.alias_of or entry.name, name) == name:
            known_meta(checkpoint.root, entry)
            check_readable(checkpoint.root, entry)
        else:
            tied.append(entry)
    check_files([(checkpoint.root, entry) for entry in tied])
    read = [entries[name] for name in first_of.values()] if tied else list(entries.values())
    with reporting(progress, sum(entry.nbytes for entry in read), f"loading {checkpoint.root}") as advance:
        new = read_new(checkpoint.root, read, verify=verify, threads=threads, advance=advance)
    for index, entry in enumerate(read):
        if entry.meta and entry.stored_dtype is not entry.meta.data_type.dtype:
            new[index] = new[index].astype(entry.meta.data_type.dtype)
    arrays = dict(zip(first_of, new, strict=True))
    return {name: arrays[entry.alias_of or entry.name] for name, entry in entries.items()}


def while_it_stands(path: Path | Checkpoint, use: Callable[[Checkpoint], Result]) -> Result:
    """Use a checkpoint; where another save replaces it meanwhile, begin again with the new one."""
    for _ in range(_ATTEMPTS):
        checkpoint = _as_checkpoint(path)
        try:
            return use(checkpoint)
        except (FormatError, CheckpointNotFound, StorageError):
            if isinstance(path, Checkpoint) or not checkpoint.is_replaced:
                raise
    raise StorageError("the checkpoint is replaced faster than it can be read", path=checkpoint.path)


def _as_checkpoint(path: Path | Checkpoint) -> Checkpoint:
    return path if isinstance(path, Checkpoint) else open_checkpoint(path)
