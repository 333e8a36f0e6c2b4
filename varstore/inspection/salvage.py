"""Save what is whole of a checkpoint that is damaged or was never finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.checks import check_digest
from varstore.disk.read.digests import check_bytes, content_digests
from varstore.disk.read.variable import Variable
from varstore.disk.threads import Job, run, thread_count
from varstore.errors import FormatError, MissingDependency, UsageError, VarstoreError
from varstore.formats.native import parts_of
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.inspection.pieces import Pieces
from varstore.layout.dtypes import data_type_of
from varstore.layout.manifest import DIGEST_SIZE, MANIFEST_LIMIT, Entry, Manifest
from varstore.layout.names import MANIFEST, folder_of
from varstore.layout.readable import Readable, readable
from varstore.model.options import Path
from varstore.model.store import save
from varstore.storage.directory import Directory, says_replaced
from varstore.storage.failures import translated
from varstore.text.escape import PROBLEM_LIMIT
from varstore.text.hints import plural
from varstore.text.table import Shown, Table
from varstore.training.tree import prune
from varstore.values.arguments import checked, described
from varstore.values.arrays import as_source
from varstore.values.attached import is_usable
from varstore.values.lazy import LazyArray

__all__ = ["SalvageReport", "salvage"]

_THE_MANIFEST = "the manifest"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class SalvageReport(Shown):
    """What `salvage` saved and what is lost: true if nothing is.

    `saved` and `files` name the variables and attached files of the new checkpoint. `lost` has the reason for each
    variable, file (``"file labels.txt"``) or ``"the manifest"`` that it does not have. `unchecked` names saved
    variables without a digest, of which only the size could be compared; `restored` maps those whose own file is
    damaged to another variable with the same values, from which they were taken.

    Example:
        >>> import os
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.ones(3), "fc/bias": np.zeros(3)})
        >>> os.remove("lenet/fc/bias/out")
        >>> report = vs.salvage("lenet", "rescued")
        >>> report.ok, report.saved, list(report.lost)
        (False, ('fc/weight',), ['fc/bias'])
    """

    path: str
    target: str
    saved: tuple[str, ...]
    lost: Mapping[str, str]
    files: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    restored: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is lost."""
        return not self.lost

    def __bool__(self) -> bool:
        return self.ok

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "path": self.path,
            "target": self.target,
            "ok": self.ok,
            "saved": list(self.saved),
            "lost": dict(self.lost),
            "files": list(self.files),
            "unchecked": list(self.unchecked),
            "restored": dict(self.restored),
        }

    def table(self, most: int | None = None) -> Table:
        """Return a row per loss."""
        files = f" and {plural(len(self.files), 'file')}" if self.files else ""
        rows = [("restored", f"{name}: the same as {other}") for name, other in self.restored.items()]
        rows += [("lost", f"{name}: {why}") for name, why in self.lost.items()]
        unchecked = f", {len(self.unchecked):,} of them without a digest" if self.unchecked else ""
        return Table(
            title=f"{self.path} -> {self.target}: {plural(len(self.saved), 'variable')}{files} saved{unchecked}, "
            f"{len(self.lost) or 'nothing'} lost",
            rows=rows[:most],
            form="  {:<8}  {}",
            limit=PROBLEM_LIMIT,
        )


@checked
def salvage(
    source: Path | Checkpoint, target: Path, *, threads: int | None = None, progress: Progress = None
) -> SalvageReport:
    """Save what is whole of a checkpoint as a new one; nothing of the old one is changed.

    Works for one that is damaged, whose manifest is torn, or whose save never finished. Each variable and attached file
    is compared with its digests; those that are whole are linked. A variable whose file is damaged is taken from
    another one with the same digests, if there is one. Attributes and nested state come from the manifest.

    Args:
        source: a checkpoint's directory, or any path that `varstore.read` opens, whose arrays are copied if they can be
            read.
        target: a path that does not exist, or an empty directory.
        threads: default one per processor, at most eight.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        CheckpointNotFound: there is no such directory.
        FormatError: no variable is whole, or the file of another system cannot be opened; nothing is written.
        UsageError: the directory is that of a run.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import os
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.ones(3), "fc/bias": np.zeros(3)})
        >>> os.remove("lenet/snapshot_done")
        >>> print(vs.salvage("lenet", "rescued"))
        lenet -> rescued: 2 variables saved, nothing lost
    """
    opened = open_source(source.path if isinstance(source, Checkpoint) else source)
    work = partial(_salvaged, target=os.fspath(target), threads=threads, progress=progress)
    if isinstance(opened, ForeignCheckpoint):
        return work(opened)
    if isinstance(opened, Mapping):
        raise UsageError("a wrong value", field="source", found=described(opened), expected="a path or a checkpoint")
    if not isinstance(source, Checkpoint) and os.fspath(opened) != os.fspath(source):
        raise UsageError("a directory of a run is salvaged step by step", path=os.fspath(source), hint="name a step")
    return retry_if_replaced(work, opened, allow_incomplete=True)


@dataclass(kw_only=True)
class _Found:
    """What a source has, and what is wrong with it."""

    variables: dict[str, Any]
    files: dict[str, AttachedFile]
    tree: Any
    variable_attributes: dict[str, Mapping[str, Any]]
    lost: dict[str, str]
    restored: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Checkpoint | ForeignCheckpoint) -> _Found:
        """Return what can be told without reading values."""
        if isinstance(source, Checkpoint):
            lost = dict(source.damaged)
            tree = None
            if (why := _problem_of_manifest(source)) is not None:
                lost[_THE_MANIFEST] = why
            else:
                tree = source.tree
            return cls(variables=dict(source), files=dict(source.files), tree=tree, variable_attributes={}, lost=lost)
        parts = parts_of(source.tree)
        return cls(
            variables=dict(parts.variables),
            files={},
            tree=json.loads(parts.tree) if parts.tree else None,
            variable_attributes=dict(parts.variable_attributes),
            lost=dict.fromkeys(parts.left_out, "an object of a class that varstore does not know"),
        )

    def jobs(self, done: Callable[[int], None]) -> Iterator[Job]:
        """Yield what checks everything that is left."""
        for name in [*self.variables]:
            yield partial(self._check, name, done)
        for name in [*self.files]:
            yield partial(self._check_file, name, done)

    def _check(self, name: str, done: Callable[[int], None]) -> None:
        array = as_source(self.variables[name], name)
        try:
            folder_of(name)
            if isinstance(array, Variable):
                _check_stored(array)
            else:
                data_type_of(array.dtype, variable=name)
                pieces = Pieces(name, array)
                for at in range(len(pieces.indices)):
                    pieces.read(at)
        except (VarstoreError, OSError) as error:
            if says_replaced(error):
                raise
            self.lost[name] = str(error)
        done(array.nbytes if not isinstance(array, Variable) else array.entry.nbytes)

    def _check_file(self, name: str, done: Callable[[int], None]) -> None:
        file = self.files[name]
        try:
            with Directory(file.location) as directory:
                directory.check_regular(file.entry.file)
                check_bytes(directory, file.entry)
        except (VarstoreError, OSError) as error:
            if says_replaced(error):
                raise
            self.lost[f"file {name}"] = str(error)
        done(file.nbytes)

    def settle(self, entries: Mapping[str, Entry]) -> None:
        """Take what is lost from variables with the same digests, and forget what is not there."""
        for name in [name for name in self.variables if name in self.lost]:
            del self.variables[name]
        whole = {_content(v.entry): name for name, v in self.variables.items() if isinstance(v, Variable)}
        for name in [name for name in self.lost if name in entries]:
            entry = entries[name]
            if entry.checksums and (other := whole.get(_content(entry))) is not None:
                self.variables[name] = _like(self.variables[other], entry)
                self.variable_attributes[name] = entry.attributes
                self.restored[name] = other
                del self.lost[name]
        for name in [name for name in self.files if f"file {name}" in self.lost]:
            del self.files[name]
        for name in [name for name, file in self.files.items() if not is_usable(file.entry, self.variables)]:
            self.lost[f"file {name}"] = "a variable that it uses is lost"
            del self.files[name]
        if self.tree is not None:
            self.tree = prune(self.tree, lambda name: name not in self.variables)


def _like(variable: Variable, entry: Entry) -> Variable | LazyArray:
    """Return a variable in place of one with the same values: itself if both were tied, or else to be copied."""
    if variable.name == entry.alias_of or variable.entry.alias_of in (entry.name, entry.alias_of or entry.name):
        return variable
    return LazyArray(variable.shape, variable.dtype, variable.numpy)


def _content(entry: Entry) -> tuple[Any, ...]:
    return entry.meta, entry.nbytes, entry.encoding, entry.checksums


def _check_stored(variable: Variable) -> None:
    entry = variable.entry
    if entry.meta is None:
        raise FormatError("it does not have a meta file, so its shape and type are not known", path=variable.path)
    found = readable(entry, path=variable.root)
    with translated(variable.root, "reading failed"), Directory(variable.location) as directory:
        check_bytes(directory, entry)
        if not found.encoding.is_plain:
            with contextlib.suppress(MissingDependency):  # then the digests of what is stored must do
                _check_decoded(directory, found)


def _check_decoded(directory: Directory, variable: Readable) -> None:
    """Check that an encoded variable can be decoded, and to the values that were saved."""
    digests = content_digests(directory, variable)
    for block in range(len(digests) // DIGEST_SIZE):
        digest = digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]
        check_digest(directory, variable.entry, variable.digests, block, digest)


def _problem_of_manifest(checkpoint: Checkpoint) -> str | None:
    """Return why the manifest cannot be used; None if it can, or there is none."""
    try:
        with Directory(checkpoint.location) as directory:
            data = directory.read_if_there(MANIFEST, limit=MANIFEST_LIMIT)
            if data is not None:
                Manifest.decode(data, path=directory.place(MANIFEST))
        _ = checkpoint.tree
    except FormatError as error:
        return str(error)
    return None


def _salvaged(
    source: Checkpoint | ForeignCheckpoint, *, target: str, threads: int | None, progress: Progress
) -> SalvageReport:
    found = _Found.of(source)
    total = sum(array.nbytes for array in (*found.variables.values(), *found.files.values()))
    with reporting(progress, total, f"reading {source.path}") as advance:
        count = min(thread_count(threads), max(1, len(found.variables) + len(found.files)))
        run(found.jobs(advance or (lambda _: None)), count)
    found.settle(_entries(source))
    if not found.variables and found.lost:
        raise FormatError(
            "nothing can be salvaged: no variable is whole",
            path=source.path,
            found=f"{plural(len(found.lost), 'problem')}, the first of which is: {next(iter(found.lost.values()))}",
        )
    save(
        target,
        found.variables,
        attributes=source.attributes if isinstance(source, Checkpoint) else None,
        variable_attributes=found.variable_attributes,
        tree="" if found.tree is None else json.dumps(found.tree, ensure_ascii=False, separators=(",", ":")),
        files=found.files,
        threads=threads,
    )
    order = {name: at for at, name in enumerate([*_entries(source), *source])}
    return SalvageReport(
        path=source.path,
        target=target,
        saved=tuple(found.variables),
        lost=dict(sorted(found.lost.items(), key=lambda item: order.get(item[0], -1))),
        files=tuple(found.files),
        unchecked=tuple(
            name
            for name, value in found.variables.items()
            if isinstance(value, Variable) and value.entry.nbytes and not value.entry.checksums
        ),
        restored=found.restored,
    )


def _entries(source: Checkpoint | ForeignCheckpoint) -> Mapping[str, Entry]:
    """Return what the manifest says of all variables, also of those that are damaged."""
    if not isinstance(source, Checkpoint) or source.manifest is None:
        return {}
    known = source.manifest.entries
    found = {}
    for name in known:
        try:
            found[name] = known[name]
        except FormatError:
            continue
    return found
