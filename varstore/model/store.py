"""Save a whole model, and load it into new arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, attempts, entries_of, open_checkpoint
from varstore.disk.read.checks import check_files
from varstore.disk.read.content import Content
from varstore.disk.read.variable import Variable
from varstore.disk.read.whole import map_values, read_new
from varstore.disk.save.foreign import Foreign
from varstore.disk.save.writer import write_checkpoint
from varstore.errors import UsageError
from varstore.layout.location import Location
from varstore.layout.manifest import Entry
from varstore.layout.readable import Readable, readable
from varstore.model.options import Path
from varstore.storage.directory import locate
from varstore.text.hints import plural
from varstore.values.arguments import checked
from varstore.values.attached import FileContent
from varstore.values.plan import Encode, SavePlan, plan_save
from varstore.values.select import Patterns, Rename, select
from varstore.version import __version__

__all__ = ["CheckpointVariables", "load", "save", "write_plan"]


class CheckpointVariables(dict[str, Any]):
    """A dict of a checkpoint's variables by name, whose items can be removed, replaced and added.

    Changes in it do not change the checkpoint. If it is saved, the new checkpoint gets the `attributes` of the old one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.select())
        self.checkpoint = checkpoint

    @property
    def path(self) -> str:
        """The directory of the checkpoint."""
        return self.checkpoint.path

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The JSON data that was saved with the checkpoint."""
        return self.checkpoint.attributes

    def __repr__(self) -> str:
        return f"<{plural(len(self), 'variable')} of {self.path!r}>"


@checked
def save(
    path: Path,
    variables: Mapping[str, Any],
    *,
    attributes: Mapping[str, Any] | None = None,
    variable_attributes: Mapping[str, Mapping[str, Any]] | None = None,
    tree: str = "",
    files: Mapping[str, FileContent] | None = None,
    base: Path | Checkpoint | None = None,
    overwrite: bool = False,
    foreign: Foreign = "error",
    durable: bool = True,
    manifest: bool = True,
    links: bool = True,
    encoding: Encode = None,
    threads: int | None = None,
    progress: Progress = None,
) -> Checkpoint:
    """Save variables as a checkpoint: a folder per variable, either complete or absent.

    A value may be an array (numpy's, in any layout and byte order; a tensor of torch, jax, paddle, mindspore,
    oneflow or megengine; a scalar; anything with shape, dtype and ``__array__``), which is written, or a `Variable`
    of another checkpoint, which is hard-linked. If the other checkpoint is on another file system, its files are
    copied. Arrays that share memory are tied: they are written once.

    Args:
        path: a path that does not exist, or an empty directory. It cannot be a symbolic link; its parents can.
        attributes: JSON data to keep with the checkpoint.
        variable_attributes: JSON data to keep with single variables, by name.
        tree: the JSON text that describes nested state; `varstore.save_state` makes it.
        files: files to keep beside the variables, such as a graph or a tokenizer, by name: bytes, the path of a regular
            file, which is copied, or a file of another checkpoint, which is linked. See `Checkpoint.files`. They lie in
            the root, so a name has no ``/``, and is not the first part of a variable's name.
        base: an earlier checkpoint. Variables that equal its variables of the same name in shape, type and digest, and
            files that equal its files, are linked to it instead of being written.
        overwrite: replace the checkpoint at `path`. At every moment the path holds the old one or the new one.
        foreign: what becomes of other people's files in a checkpoint that is replaced, such as a ``config.json`` that
            somebody put there: "error" refuses to replace it, "keep" hands them to the new one, "delete" removes them.
            What appears during the save is handed to the new one, unless it is "delete".
        durable: return only when everything is on the disk, safe from a power cut. Without it, the system writes
            when it chooses to, and the save returns earlier.
        manifest: False writes OneFlow's own layout only: no digests and no attributes. For a folder that OneFlow
            itself loads whole, use `varstore.write` with the format ``oneflow-legacy``.
        links: False gives each file one name, for programs that refuse files with several, such as `onnx.load`. Tied
            variables are then written twice, and `base` saves nothing. Later checkpoints copy from this one instead of
            linking.
        encoding: None writes raw values, and links what `base` and other checkpoints have in any encoding. "zarr"
            compresses variables from 64 KiB on, and reads and writes again those of another encoding; "raw" writes all
            raw. See `varstore.pack`.
        threads: default one per processor, at most eight, and twice as many if `durable` waits for the disk.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        InvalidName, UnsupportedDtype, CheckpointExists, OutOfSpace, UsageError: the plan cannot be carried out; nothing
            was written.
        OutOfSpace, StorageError: writing failed; what was written is removed.

    Example:
        >>> lenet = {"conv1/weight": np.zeros((6, 1, 5, 5), np.float32), "conv1/bias": np.zeros(6, np.float32)}
        >>> vs.save("lenet", lenet, attributes={"epoch": 10})
        <Checkpoint 'lenet': 2 variables>
        >>> lenet["conv1/bias"] += 1
        >>> changed = vs.save("lenet_2", lenet, attributes={"epoch": 11}, base="lenet")  # conv1/weight is linked
        >>> print(vs.diff("lenet", "lenet_2"))
        lenet -> lenet_2: 1 unchanged
          changed  conv1/bias: values
          changed  attribute epoch: 10 -> 11
    """
    origin = variables.checkpoint if isinstance(variables, CheckpointVariables) else variables
    if manifest and isinstance(origin, Checkpoint) and attributes is None and origin.manifest:
        attributes = origin.attributes
        if variables.keys() == origin.keys():
            tree = tree or origin.manifest.tree
    plan = plan_save(
        variables,
        attributes=attributes,
        variable_attributes=variable_attributes,
        tree=tree,
        files=files,
        links=links,
        encoding=encoding if manifest else encoding or "raw",
    )
    recorded = plan.attributes or variable_attributes or tree or plan.files or not links or encoding == "zarr"
    if not manifest and recorded:
        raise UsageError(
            "attributes, nested state, files, links=False and encodings are recorded in the manifest, and "
            "manifest=False does not write one",
            path=path,
            hint="leave out manifest=False, or save arrays without the others",
        )
    return write_plan(
        path,
        plan,
        base=base,
        overwrite=overwrite,
        foreign=foreign,
        durable=durable,
        manifest=manifest,
        threads=threads,
        progress=progress,
    )


def write_plan(
    path: Path,
    plan: SavePlan,
    *,
    base: Path | Checkpoint | None,
    overwrite: bool,
    foreign: Foreign,
    durable: bool,
    manifest: bool,
    threads: int | None,
    progress: Progress,
) -> Checkpoint:
    """Save what was planned; the options, errors and result are those of `save`."""
    target = os.fspath(path)
    location = locate(target)
    opened: AbstractContextManager[Mapping[str, Variable]]
    if base is None or isinstance(base, Checkpoint):
        opened = nullcontext(base or {})
    else:
        opened = open_checkpoint(base)  # and closed: an error that is kept does not keep it open
    with opened as earlier:
        if not plan.links or (isinstance(earlier, Checkpoint) and earlier.location.unshared):
            earlier = {}
        saved = write_checkpoint(
            target,
            plan,
            writer=f"varstore {__version__}",
            base=earlier,
            base_files=earlier.files if plan.files and isinstance(earlier, Checkpoint) else {},
            overwrite=overwrite,
            foreign=foreign,
            durable=durable,
            manifest=manifest,
            threads=threads,
            progress=progress,
        )
    content = Content(saved.entries, saved.manifest, MappingProxyType({}))
    place = Location(location.path, location.absolute, saved.identity, unshared=not plan.links)
    return Checkpoint(place, content)


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
    """Read the variables of a checkpoint into new arrays, in parallel; see `varstore.load`.

    If a save replaces the checkpoint while it is read, reading starts again with the new one.
    """
    for attempt in attempts(path):
        with attempt as (checkpoint,):
            chosen = select(checkpoint.names, include=include, exclude=exclude, rename=rename, path=checkpoint.path)
            return _load(checkpoint, chosen, mmap=mmap, verify=verify, threads=threads, progress=progress)
    raise AssertionError  # attempts end with an error


def _load(
    checkpoint: Checkpoint,
    chosen: Mapping[str, str],
    *,
    mmap: bool,
    verify: bool,
    threads: int | None,
    progress: Progress,
) -> dict[str, np.ndarray]:
    location = checkpoint.location
    entries = dict(zip(chosen, entries_of(checkpoint, chosen.values()), strict=True))
    if mmap:
        mapped = map_values(location, [readable(entry, path=location.path) for entry in entries.values()])
        return dict(zip(entries, mapped, strict=True))
    first_of: dict[str, str] = {}
    wanted: list[Readable] = []
    tied: list[tuple[Location, Entry]] = []
    for name, entry in entries.items():
        if first_of.setdefault(entry.alias_of or entry.name, name) == name:
            wanted.append(readable(entry, path=location.path))
        else:
            tied.append((location, entry))
    check_files(tied)
    total = sum(variable.nbytes for variable in wanted) if progress else 0
    with reporting(progress, total, f"loading {location.path}") as advance:
        new = read_new(location, wanted, verify=verify, threads=threads, advance=advance)
    arrays = dict(zip(first_of, new, strict=True))
    return {name: arrays[entry.alias_of or entry.name] for name, entry in entries.items()}
