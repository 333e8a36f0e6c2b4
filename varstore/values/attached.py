"""What a caller gives to `save` as attached files: bytes, paths, and files of other checkpoints."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import InvalidName, StorageError, UsageError
from varstore.layout.attached import DATA, FileEntry, refused_name
from varstore.layout.graphs import GRAPH, bindings_of
from varstore.layout.location import Location
from varstore.layout.manifest import NO_ATTRIBUTES

__all__ = [
    "FileContent",
    "GivenFile",
    "PlannedFile",
    "SourceFile",
    "StoredFile",
    "identity_of",
    "is_usable",
    "plan_files",
]

Identity = tuple[int, int, int, int]


class StoredFile:
    """An attached file of a checkpoint; saving it in another one links it."""

    entry: FileEntry
    location: Location


class GivenFile(NamedTuple):
    """Bytes or a path, with what the entry of the file is to say."""

    content: bytes | memoryview | str
    kind: str
    attributes: Mapping[str, Any]


FileContent = bytes | bytearray | memoryview | str | os.PathLike[str] | StoredFile | GivenFile
"""What `save` takes for an attached file."""


class SourceFile(NamedTuple):
    """A regular file outside, which is copied; `identity` tells whether it changed since it was looked at."""

    path: str
    identity: Identity


class PlannedFile(NamedTuple):
    """One attached file to save; `stored`, if there is one, is a file of these bytes that can be linked."""

    name: str
    nbytes: int
    source: np.ndarray | SourceFile | StoredFile
    kind: str = DATA
    attributes: Mapping[str, Any] = NO_ATTRIBUTES
    stored: StoredFile | None = None

    @property
    def folder(self) -> str:
        """The root, where all attached files lie."""
        return ""

    @property
    def file(self) -> str:
        """The path relative to the checkpoint."""
        return self.name

    def entry(self, digests: bytes) -> FileEntry:
        """Return the entry for the manifest, once the digests are known."""
        return FileEntry(self.name, self.nbytes, digests, self.kind, self.attributes)


def plan_files(files: Mapping[str, Any], tops: Collection[str]) -> tuple[PlannedFile, ...]:
    """Return the plan for attached files beside variables whose folders begin with `tops`.

    Raises:
        InvalidName: a name is reserved, is that of a variable's folder, or differs from another one only in case.
        UsageError: `files` is not a mapping, or a value is neither bytes nor the path of a regular file.
        StorageError: the system refuses to look at a file.
    """
    if not isinstance(files, Mapping):
        raise UsageError("files must be a mapping of names to bytes or paths", found=type(files).__name__)
    if (refused := refused_name(files, tops)) is not None:
        raise InvalidName("an attached file cannot have this name", field=f"files[{refused[0]!r}]", found=refused[1])
    return tuple(_planned(str.__str__(name), content) for name, content in files.items())


def is_usable(file: FileEntry, variables: Mapping[str, Any]) -> bool:
    """Tell whether a file can be saved with these variables: a graph can, if what it uses is there and fits.

    Of a variable that a graph has a copy of, or values that were computed from it, the digests must be known and equal.
    """
    bindings = bindings_of(file)
    digests = {one.variable: one.digest for one in bindings.values() if one.digest}
    if file.kind == GRAPH:
        digests |= {str(name): str(digest) for name, digest in file.attributes.get("folded", {}).items()}
    for one in bindings.values():
        value = variables.get(one.variable)
        if value is None and not one.digest:
            return False
        if value is not None and (tuple(value.shape), value.dtype.name) != (one.shape, one.type):
            return False
    found = {name: variables[name] for name in digests if name in variables}
    return all("".join(getattr(value, "digests", ())) == digests[name] for name, value in found.items())


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells a file from another one, and from what it was before it changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _planned(name: str, content: Any) -> PlannedFile:
    field = f"files[{name!r}]"
    if isinstance(content, StoredFile):
        entry = content.entry
        return PlannedFile(name, entry.nbytes, content, entry.kind, entry.attributes, content)
    if isinstance(content, GivenFile):
        return _planned(name, content.content)._replace(kind=content.kind, attributes=content.attributes)
    if isinstance(content, bytes | bytearray | memoryview):
        is_ours = isinstance(content, memoryview) and isinstance(getattr(content.obj, "base", None), bytes)
        values = np.frombuffer(content if is_ours else bytes(content), np.uint8)  # others may be changed later
        return PlannedFile(name, values.nbytes, values)
    if not isinstance(content, str | os.PathLike) or not isinstance(path := os.fspath(content), str):
        raise UsageError("must be bytes or a path", field=field, found=type(content).__name__)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UsageError(
            "there is no such file", field=field, path=path, hint="for the content itself, pass bytes"
        ) from error
    except OSError as error:
        raise StorageError(
            "the file cannot be read", number=error.errno, field=field, path=path, found=error.strerror
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("not a regular file", field=field, path=path, hint="pass the path of a file, or bytes")
    return PlannedFile(name, status.st_size, SourceFile(os.path.abspath(path), identity_of(status)))
