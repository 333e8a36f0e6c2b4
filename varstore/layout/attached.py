"""Files that a checkpoint has beside its variables, such as a graph or a tokenizer (FORMAT F11)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from varstore.errors import InvalidName
from varstore.layout.names import folder_of

__all__ = ["DATA", "FileEntry", "refused_name"]

DATA = "data"
"""The kind of a file of which nothing else is known."""
_TEMPORARY = re.compile(r"\..*[.-][0-9a-f]{8}(\.tmp)?", re.DOTALL)
"""Matches all names that the format gives to what is temporary: `varstore.clean` removes such files."""


class FileEntry(NamedTuple):
    """What the manifest says of an attached file; code that reads bytes takes it in place of a variable's entry."""

    name: str
    nbytes: int
    digests: bytes = b""
    kind: str = DATA
    attributes: Mapping[str, Any] = MappingProxyType({})

    @property
    def folder(self) -> str:
        """The root, where all attached files lie."""
        return ""

    @property
    def file(self) -> str:
        """The path relative to the checkpoint."""
        return self.name

    @property
    def checksums(self) -> bytes:
        """What the file can be compared with, as a variable's entry has it."""
        return self.digests

    def __reduce__(self) -> tuple[Any, ...]:
        return _entry_of, (*self._replace(attributes=dict(self.attributes)),)


def _entry_of(*fields: Any) -> FileEntry:
    entry = FileEntry(*fields)
    return entry._replace(attributes=MappingProxyType(entry.attributes))


def refused_name(names: Iterable[Any], tops: Collection[str]) -> tuple[Any, str] | None:
    """Return the first name that an attached file cannot have, and the reason; None if they can all be given.

    `tops` are the first parts of the folders of all variables. Names that differ only in case are one name on some file
    systems, so they are refused everywhere.
    """
    folders = {top.casefold() for top in tops}
    seen: dict[str, str] = {}
    for name in names:
        reason = _reason(name)
        if reason is None and name.casefold() in folders:
            reason = "the folder of a variable has this name"
        elif reason is None and seen.setdefault(name.casefold(), name) != name:
            reason = f"it differs from {seen[name.casefold()]!r} only in case"
        if reason is not None:
            return name, reason
    return None


def _reason(name: Any) -> str | None:
    if not isinstance(name, str):
        return f"a name is text, not of the type {type(name).__name__}"
    if "/" in name:
        return "it has a '/', and attached files lie in the root of the checkpoint"
    try:
        is_kept = folder_of(name) == name
    except InvalidName as error:
        return error.problem.replace("a variable's name", "a name")
    if not is_kept:
        return "the format reserves it, or it has characters that some file systems do not allow"
    return "only temporary files have such names" if _TEMPORARY.fullmatch(name) else None
