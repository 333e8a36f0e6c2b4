"""Open a checkpoint: a lazy Mapping of its variables, whose names, shapes and types cost no data I/O."""

from __future__ import annotations

import errno
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

from varstore.disk.read.advice import advice_on_absent, advice_on_incomplete, is_being_replaced
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.content import Content, incomplete_error, read_content
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
from varstore.layout.location import Location
from varstore.layout.manifest import Entry, Manifest
from varstore.layout.names import MANIFEST, MARKER
from varstore.storage.directory import PAUSES, Directory, is_shared, locate, says_replaced
from varstore.storage.failures import translated
from varstore.text.hints import nearest, plural
from varstore.values.arguments import checked, checked_path, described
from varstore.values.select import Patterns, Rename, select

__all__ = [
    "Checkpoint",
    "attempts",
    "entries_of",
    "has_open_handle",
    "open_checkpoint",
    "open_variable",
    "retry_if_replaced",
]

Result = TypeVar("Result")

_HTML_ROWS = 50
_ATTEMPTS = 100
_WAIT, _WAITS = 0.01, 50
"""Seconds between looks for a checkpoint that is being replaced by two renames, and how often it is looked for."""
_LOOKS = 4
"""Of these, looks for any that is not found on a shared file system, where a path is not followed in one step."""


class Checkpoint(Mapping[str, Variable]):
    """The variables of a checkpoint by name, in the order they were saved, or sorted if there is no manifest.

    Nothing is kept open: the directory is opened again for each read. After `close`, or the end of a ``with`` block,
    later lookups of variables through this handle fail. A handle can be pickled: another process on this machine
    opens the same checkpoint when it first uses the handle, and gets an error if the checkpoint has been replaced.

    Example:
        >>> values = {"conv/weight": np.ones((2, 3)), "conv/bias": np.zeros(2), "fc/weight": np.ones((4, 2))}
        >>> checkpoint = vs.save("lenet", values, attributes={"epoch": 10})
        >>> len(checkpoint), checkpoint.nbytes, checkpoint.attributes["epoch"]
        (3, 128, 10)
        >>> checkpoint["conv/bias"].numpy()
        array([0., 0.])
        >>> sorted(checkpoint.select(include="conv/*", rename={"conv": "stem"}))
        ['stem/bias', 'stem/weight']
    """

    left_out: tuple[str, ...] = ()
    """What `varstore.save_state` or `varstore.merge` did not save, by name; for the handle that it returned."""

    def __init__(self, location: Location, content: Content | None, *, allow_incomplete: bool = False) -> None:
        """Make a handle of the checkpoint; without `content` it is read at the first use."""
        self._location = location
        self._content = content
        self._files: Mapping[str, AttachedFile] | None = None
        self._allow_incomplete = allow_incomplete
        self._closed = False
        _handles[id(self)] = weakref.ref(self, partial(_handles.pop, id(self)))

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], tuple[Any, ...]]:
        return _unpickled, (type(self), self._location, self._allow_incomplete, self._closed)

    def __copy__(self) -> Checkpoint:
        copy = type(self)(self._location, self._content, allow_incomplete=self._allow_incomplete)
        copy._closed = self._closed
        return copy

    def __deepcopy__(self, memo: object) -> Checkpoint:
        return self.__copy__()  # nothing in the content changes

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, name: str) -> Variable:
        return Variable(self._location, self.entry(name))

    @property
    def content(self) -> Content:
        """What the manifest or, without one, the folders say: entries, manifest, damaged variables."""
        if self._content is None:
            with (
                translated(self.path, "the checkpoint cannot be opened"),
                Directory(self._location) as directory,
            ):
                self._content = read_content(directory, allow_incomplete=self._allow_incomplete)[1]
        return self._content

    @property
    def _entries(self) -> Mapping[str, Entry]:
        return self.content.entries

    def get(self, key: str, default: Any = None) -> Any:
        """Return a variable or the default, without the search for near names that an error would cost."""
        return self[key] if isinstance(key, str) and key in self._entries else default

    def _not_found(self, name: str) -> VariableNotFound:
        if name in self.damaged:
            return VariableNotFound(
                "this variable is incomplete", path=self.path, variable=name, found=self.damaged[name]
            )
        near = nearest(name, self._entries)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`varstore ls` lists the names"
        return VariableNotFound("no such variable", path=self.path, variable=name, hint=hint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make later lookups of variables fail; variables already obtained can still be read."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_replaced(self) -> bool:
        """Whether the path no longer leads to the checkpoint that was opened: replaced, removed or not accessible."""
        try:
            with Directory(self._location) as directory:
                return not directory.is_current()
        except VarstoreError:
            return True

    @property
    def path(self) -> str:
        """The directory."""
        return self._location.path

    @property
    def location(self) -> Location:
        """The directory, with the identity that each read checks to make sure the checkpoint was not replaced."""
        return self._location

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
        return self.manifest.attributes if self.manifest else MappingProxyType({})

    @property
    def tree(self) -> Any:
        """The JSON tree that nested state was flattened from, None where there was none."""
        if self.manifest is None or not self.manifest.tree:
            return None
        try:
            return json.loads(self.manifest.tree, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                "the tree of nested state is not JSON", path=os.path.join(self.path, MANIFEST), found=str(error)
            ) from error

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, None for a checkpoint without one."""
        return self.content.manifest

    @property
    def files(self) -> Mapping[str, AttachedFile]:
        """The files that were saved beside the variables, by name; none without a manifest."""
        if self._files is None:
            known = self.manifest.files if self.manifest else {}
            self._files = MappingProxyType({name: AttachedFile(self._location, item) for name, item in known.items()})
        return self._files

    @property
    def damaged(self) -> Mapping[str, str]:
        """After ``allow_incomplete=True``: the variables that are not whole, and what is wrong with each."""
        return self.content.damaged

    def entry(self, name: str) -> Entry:
        """Return what is known of a variable, as the manifest or its folder tells it.

        Raises:
            VariableNotFound: there is no such variable.
        """
        return entries_of(self, (name,))[0]

    def select(
        self, include: Patterns | None = None, exclude: Patterns | None = None, rename: Rename | None = None
    ) -> dict[str, Variable]:
        """Return some of the variables, under new names if asked; nothing is read.

        Given to `save`, the result becomes a checkpoint that shares its files with this one.

        Raises:
            VariableNotFound, VariableMismatch, UsageError: see `varstore.load`.
        """
        chosen = select(self.names, include=include, exclude=exclude, rename=rename)
        return dict(zip(chosen, map(partial(Variable, self._location), entries_of(self, chosen.values())), strict=True))

    def __repr__(self) -> str:
        kind = "" if self.manifest else ", no manifest"
        return f"<Checkpoint {self.path!r}: {plural(len(self), 'variable')}{kind}>"

    def _repr_html_(self) -> str:
        shown = [variable for variable, _ in zip(self.values(), range(_HTML_ROWS), strict=False)]
        rows = [(variable.name, variable.entry.form, f"{variable.entry.nbytes:,}") for variable in shown]
        notes = [f"… and {len(self) - len(rows)} more"] if len(rows) < len(self) else []
        headings = ("variable", "shape and type", "bytes")
        from varstore.text.table import Table

        return Table(title=repr(self)[1:-1], headings=headings, rows=rows, notes=notes).html()


@checked
def open_checkpoint(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Checkpoint:
    """Open a checkpoint without reading any values.

    Args:
        path: a checkpoint's directory.
        allow_incomplete: also open a directory without a marker, or with a torn manifest. The mapping then has the
            variables whose files are complete, and `Checkpoint.damaged` says what is wrong with the others.

    Raises:
        CheckpointNotFound: there is no such directory.
        IncompleteCheckpoint: it has no ``snapshot_done``.
        ManifestError: its manifest is torn, edited, or of a later version.

    Example:
        >>> saved = vs.save("lenet", {"fc/weight": np.ones((4, 2)), "fc/bias": np.zeros(4)})
        >>> with vs.open("lenet") as checkpoint:
        ...     print(checkpoint, checkpoint["fc/weight"].shape)
        <Checkpoint 'lenet': 2 variables> (4, 2)
    """
    return _opened(path, allow_incomplete)


def retry_if_replaced(
    use: Callable[..., Result], *sources: str | os.PathLike[str] | Checkpoint, allow_incomplete: bool = False
) -> Result:
    """Call `use` with checkpoints, and again with the new ones if a save replaced one at its path meanwhile.

    All that reads a checkpoint by its path goes through here, so that it gives the old checkpoint or the new one. A
    handle in place of a path stands for one checkpoint, so it is not opened again. `use` raises the error of a
    replacement, which `varstore.storage.directory` tells from the others, whenever what it read is not of one
    checkpoint.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError, StorageError: one of them cannot be opened; or it was
            replaced each time before `use` came to its end.
    """
    for attempt in attempts(*sources, allow_incomplete=allow_incomplete):
        with attempt as opened:
            return use(*opened)
    raise AssertionError  # attempts end with an error


def attempts(*sources: str | os.PathLike[str] | Checkpoint, allow_incomplete: bool = False) -> Iterator[Attempt]:
    """Yield attempts to use checkpoints, each of which opens them again; raises what `retry_if_replaced` does."""
    given = [s if isinstance(s, Checkpoint) else checked_path(s, "path") for s in sources]
    replaced: BaseException | None = None
    for _ in range(_ATTEMPTS):
        opened = [s if isinstance(s, Checkpoint) else _opened(s, allow_incomplete) for s in given]
        attempt = Attempt(opened, [made for made, source in zip(opened, given, strict=True) if made is not source])
        yield attempt
        replaced = attempt.replaced
    raise _replaced_each_time(replaced) from replaced


def _replaced_each_time(error: BaseException | None) -> StorageError:
    return StorageError(
        "the checkpoint was replaced each time before it could be read",
        number=errno.ESTALE,
        path=getattr(error, "path", None),
        hint="try again when fewer saves replace it",
    )


class Attempt:
    """Checkpoints for the use within a ``with`` block, which ends well if an error in it says that one was replaced."""

    def __init__(self, opened: list[Checkpoint], again: list[Checkpoint]) -> None:
        """Take the checkpoints, and those of them that can be opened again."""
        self.replaced: BaseException | None = None
        self._opened = opened
        self._again = again

    def __enter__(self) -> list[Checkpoint]:
        return self._opened

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        is_ours = isinstance(error, CheckpointNotFound) or (isinstance(error, StorageError) and says_replaced(error))
        self.replaced = error if is_ours else None  # others would hold the frames that hold descriptors
        return is_ours and any(checkpoint.is_replaced for checkpoint in self._again)


def _opened(path: str | os.PathLike[str], allow_incomplete: bool) -> Checkpoint:
    """Open a checkpoint at a path that was checked, and again if a save replaces it meanwhile.

    What may be a mixture on a shared file system is looked at again, until it stays the same. Where a file system
    cannot exchange two directories, there is nothing at the path between two renames, so that moment is waited for.
    """
    location = locate(path)
    pauses, left, again = iter(PAUSES), _WAITS, _ATTEMPTS
    while True:
        try:
            with translated(location.path, "the checkpoint cannot be opened"), Directory(location) as directory:
                found, content = read_content(directory, allow_incomplete=allow_incomplete)
                return Checkpoint(found, content, allow_incomplete=allow_incomplete)
        except (CheckpointNotFound, IncompleteCheckpoint) as error:
            left -= 1
            may_be_there = left > _WAITS - _LOOKS and is_shared(location.absolute)
            if not left or not (may_be_there or is_being_replaced(location.absolute)):
                raise _advised(error, location) from None
            time.sleep(_WAIT)
        except (FormatError, StorageError) as error:
            if says_replaced(error):
                again -= 1
                if not again:
                    raise _replaced_each_time(error) from error
                continue
            pause = next(pauses, None)
            if pause is None or not is_shared(location.absolute):
                raise
            time.sleep(pause)


def _advised(
    error: CheckpointNotFound | IncompleteCheckpoint, location: Location
) -> CheckpointNotFound | IncompleteCheckpoint:
    """Return the error with what is to be done, which depends on what lies beside the path and in it."""
    if isinstance(error, CheckpointNotFound):
        hint = error.hint or advice_on_absent(location.absolute)
    else:
        hint = advice_on_incomplete(location.absolute)
    return type(error)(error.problem, path=error.path, found=error.found, hint=hint)


def entries_of(checkpoint: Checkpoint, names: Iterable[str]) -> list[Entry]:
    """Return what is known of several variables; raises what `Checkpoint.entry` does."""
    if checkpoint.closed:
        raise UsageError("this handle of the checkpoint is closed", path=checkpoint.path, hint="open it again")
    known = checkpoint.content.entries
    found = []
    for name in names:
        if not isinstance(name, str):
            raise VariableNotFound("a variable's name is a string", path=checkpoint.path, found=described(name))
        try:
            found.append(known[name])
        except KeyError:
            raise checkpoint._not_found(name) from None
    return found


def _unpickled(kind: type[Checkpoint], location: Location, allow_incomplete: bool, closed: bool) -> Checkpoint:
    """Return a handle that has read nothing yet: an error while unpickling would kill a multiprocessing worker."""
    checkpoint = kind(location, None, allow_incomplete=allow_incomplete)
    if closed:
        checkpoint.close()
    return checkpoint


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_handles: dict[int, weakref.ref[Checkpoint]] = {}
"""Every handle that is in use. Each access is a single step and takes no lock: a signal handler or a forked process may
open checkpoints too, and would wait for a lock that the interrupted code holds. A handle that goes is removed by a
function in C: Python ignores what a callback raises, and in one of ours Ctrl-C might come."""


def has_open_handle(path: str | os.PathLike[str]) -> bool:
    """Tell whether this process holds a handle of this checkpoint that has not been closed."""
    real = os.path.realpath(path)
    handles = [handle for made in _handles.copy().values() if (handle := made()) is not None]
    return any(not handle.closed and os.path.realpath(handle.location.absolute) == real for handle in handles)


@checked
def open_variable(path: str | os.PathLike[str]) -> Variable:
    """Open one variable by its folder, as OneFlow's ``checkpoint.get`` does.

    Raises:
        CheckpointNotFound: the folder holds no ``out``.
        IncompleteCheckpoint: no directory above it is a complete checkpoint of the same owner.
    """
    folder = os.path.realpath(os.fspath(path))
    if not os.path.lexists(os.path.join(folder, "out")):
        raise CheckpointNotFound("not a variable's folder: it holds no 'out'", path=os.fspath(path))
    owner, root = os.stat(folder).st_uid, os.path.dirname(folder)
    while True:  # in a directory of another owner, a stranger's manifest could say what this folder holds
        if os.stat(root).st_uid != owner or root == os.path.dirname(root):
            raise incomplete_error(os.path.dirname(folder))
        if os.path.lexists(os.path.join(root, MARKER)):
            break
        root = os.path.dirname(root)
    relative = os.path.relpath(folder, root).replace(os.sep, "/")
    checkpoint = open_checkpoint(root)
    for variable in checkpoint.values():
        if variable.entry.folder == relative:
            return variable
    raise ManifestError("the manifest does not list this folder", path=root, found=relative, hint=_SEAL)


_SEAL = "if you added it on purpose, run `varstore seal` to record it in the manifest"
