"""Open a checkpoint: a lazy Mapping of its variables, whose names, shapes and types cost no data I/O."""

from __future__ import annotations

import json
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from varstore.disk.read.scan import WalkedEntries
from varstore.disk.read.variable import Variable
from varstore.errors import (
    CheckpointNotFound,
    FormatError,
    IncompleteCheckpoint,
    ManifestError,
    StorageError,
    UsageError,
    VariableNotFound,
    VarstoreError,
)
from varstore.layout.manifest import Entry, Manifest
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage.beneath import Root, identity_of, open_root, read_small
from varstore.storage.failures import translated
from varstore.text.hints import nearest, plural
from varstore.text.html import html_table
from varstore.values.select import Patterns, Rename, select

__all__ = ["Checkpoint", "is_being_read", "open_checkpoint", "open_variable"]

_MANIFEST_LIMIT = 4 << 30
_HTML_ROWS = 50
_ATTEMPTS = 100


class Checkpoint(Mapping[str, Variable]):
    """The variables of a checkpoint by name, in the order in which they were saved.

    Nothing is kept open: the directory is opened anew for each reading. `close`, or the end of a ``with``
    block, only says that this handle will not be read from again.
    """

    def __init__(
        self,
        path: Root,
        entries: Mapping[str, Entry],
        manifest: Manifest | None,
        damaged: Mapping[str, str],
    ) -> None:
        self._path = path
        self._entries = entries
        self._manifest = manifest
        self._damaged = damaged
        self._closed = False
        with _handles_lock:
            _handles.add(self)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, name: str) -> Variable:
        return Variable(self._path, self.entry(name))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a variable or the default, without the search for near names that an error would cost."""
        return self[key] if key in self._entries else default

    def _not_found(self, name: str) -> VariableNotFound:
        if name in self._damaged:
            return VariableNotFound(
                "this variable is not whole", path=self._path, variable=name, found=self._damaged[name]
            )
        near = nearest(name, self._entries)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`varstore ls` lists the names"
        return VariableNotFound("no such variable", path=self._path, variable=name, hint=hint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further reading through this handle."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_replaced(self) -> bool:
        """Whether the path has come to hold another checkpoint, or none, since this one was opened."""
        try:
            with open_root(self._path):
                return False
        except VarstoreError:
            return True

    @property
    def path(self) -> str:
        """The directory."""
        return str(self._path)

    @property
    def root(self) -> Root:
        """The directory, as what reading checks to be still the same checkpoint's."""
        return self._path

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all variables, in order."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all ``out`` files; tied variables count once."""
        return sum(entry.nbytes for entry in self._entries.values() if not entry.alias_of)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What was saved as the checkpoint's attributes; empty without a manifest."""
        return self._manifest.attributes if self._manifest else MappingProxyType({})

    @property
    def tree(self) -> Any:
        """The JSON tree that nested state was flattened from, None where there was none."""
        if self._manifest is None or not self._manifest.tree:
            return None
        try:
            return json.loads(self._manifest.tree)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                "the tree of nested state is not JSON", path=os.path.join(self._path, MANIFEST), found=str(error)
            ) from error

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, None for a checkpoint without one."""
        return self._manifest

    @property
    def damaged(self) -> Mapping[str, str]:
        """After ``allow_incomplete=True``: the variables that are not whole, and what is wrong with each."""
        return self._damaged

    def entry(self, name: str) -> Entry:
        """Return what is known of a variable, as the manifest or its folder tells it.

        Raises:
            VariableNotFound: there is no such variable.
        """
        if self._closed:
            raise UsageError("this handle of the checkpoint is closed", path=self._path, hint="open it again")
        try:
            return self._entries[name]
        except KeyError:
            raise self._not_found(name) from None

    def select(
        self, include: Patterns | None = None, exclude: Patterns | None = None, rename: Rename | None = None
    ) -> dict[str, Variable]:
        """Return some of the variables, under new names if asked; nothing is read.

        Given to `save`, the result becomes a checkpoint that shares its files with this one.

        Raises:
            VariableNotFound, VariableMismatch, UsageError: see `varstore.load`.
        """
        chosen = select(self.names, include=include, exclude=exclude, rename=rename)
        return {target: self[source] for target, source in chosen.items()}

    def __repr__(self) -> str:
        kind = "" if self._manifest else ", no manifest"
        return f"<Checkpoint {self._path!r}: {plural(len(self), 'variable')}{kind}>"

    def _repr_html_(self) -> str:
        shown = [variable for variable, _ in zip(self.values(), range(_HTML_ROWS), strict=False)]
        rows = [(variable.name, variable.entry.form, f"{variable.entry.nbytes:,}") for variable in shown]
        notes = [f"… and {len(self) - len(rows)} more"] if len(rows) < len(self) else []
        return html_table(repr(self)[1:-1], [("variable", "shape and type", "bytes"), *rows], notes)


def open_checkpoint(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Checkpoint:
    """Open a checkpoint without reading any values.

    With `allow_incomplete`, a directory without marker, or with a torn manifest, is salvaged: the mapping
    holds the variables whose files are whole, and `Checkpoint.damaged` says what is wrong with the others.

    Raises:
        CheckpointNotFound: there is no such directory.
        IncompleteCheckpoint: it has no ``snapshot_done``.
        ManifestError: its manifest is torn, edited, or of a later version.
    """
    root = os.fspath(path)
    for _ in range(_ATTEMPTS):
        with translated(root, "the checkpoint cannot be opened"), open_root(root) as root_fd:
            try:
                checkpoint = _open(root_fd, root, allow_incomplete=allow_incomplete)
                if not allow_incomplete:
                    _require_marker(root_fd, root)  # the first to go when a checkpoint is replaced
                return checkpoint
            except (FormatError, FileNotFoundError):
                if _is_still_there(root, root_fd):
                    raise
    raise StorageError("the checkpoint is replaced faster than it can be opened", path=root)


def _open(root_fd: int, root: str, *, allow_incomplete: bool) -> Checkpoint:
    if not allow_incomplete:
        _require_marker(root_fd, root)
    manifest = None
    try:
        manifest = _read_manifest(root_fd, root)
    except FormatError:
        if not allow_incomplete:
            raise
    entries = manifest.entries if manifest else WalkedEntries(root_fd, root)
    whole, damaged = _salvage(root, entries) if allow_incomplete else (entries, {})
    return Checkpoint(Root(root, identity_of(root_fd)), whole, manifest, MappingProxyType(damaged))


def _is_still_there(root: str, root_fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(root), os.fstat(root_fd))
    except FileNotFoundError:
        return False


_handles: weakref.WeakSet[Checkpoint] = weakref.WeakSet()
_handles_lock = threading.Lock()


def is_being_read(path: str | os.PathLike[str]) -> bool:
    """Tell whether this process holds a handle of the checkpoint that is not closed."""
    real = os.path.realpath(path)
    with _handles_lock:
        return any(not handle.closed and os.path.realpath(handle.path) == real for handle in _handles)


def open_variable(path: str | os.PathLike[str]) -> Variable:
    """Open one variable by its folder, as OneFlow's ``checkpoint.get`` does.

    Raises:
        CheckpointNotFound: the folder holds no ``out``.
        IncompleteCheckpoint: no directory above it is a complete checkpoint.
    """
    folder = os.path.realpath(os.fspath(path))
    if not os.path.lexists(os.path.join(folder, "out")):
        raise CheckpointNotFound("not a variable's folder: it holds no 'out'", path=os.fspath(path))
    root = os.path.dirname(folder)
    while not os.path.lexists(os.path.join(root, MARKER)):
        if root == os.path.dirname(root):
            raise _incomplete(os.path.dirname(folder))
        root = os.path.dirname(root)
    relative = os.path.relpath(folder, root)
    checkpoint = open_checkpoint(root)
    for variable in checkpoint.values():
        if variable.entry.folder == relative:
            return variable
    raise ManifestError("the manifest does not list this folder", path=root, found=relative, hint=_SEAL)


_SEAL = "run `varstore seal` if it was put there on purpose"


def _require_marker(root_fd: int, root: str) -> None:
    try:
        status = os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        raise _incomplete(root) from None
    if not stat.S_ISREG(status.st_mode):
        raise IncompleteCheckpoint("its marker is not a file", path=os.path.join(root, MARKER))


def _incomplete(root: str) -> IncompleteCheckpoint:
    return IncompleteCheckpoint(
        f"no {MARKER!r}: not a checkpoint, or its save never finished",
        path=root,
        hint="open it with allow_incomplete=True to salvage what is whole",
    )


def _read_manifest(root_fd: int, root: str) -> Manifest | None:
    try:
        os.stat(MANIFEST, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    data = read_small(root_fd, MANIFEST, root=root, limit=_MANIFEST_LIMIT)
    return Manifest.decode(data, path=os.path.join(root, MANIFEST))


def _salvage(root: str, entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, str]]:
    whole: dict[str, Entry] = {}
    damaged: dict[str, str] = {}
    for name in entries:
        try:
            entry = entries[name]
            Variable(root, entry).check_files()
            whole[name] = entry
        except (VarstoreError, OSError) as error:
            damaged[name] = str(error)
    return whole, damaged
