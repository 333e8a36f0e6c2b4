"""Every error that varstore raises, in one tree.

Each class is also the built-in that people already catch, and the branches say whose fault it is::

    VarstoreError
    ├── FormatError(ValueError)                    the disk is wrong
    │   ├── MetaError                              a meta file that does not describe a variable
    │   ├── ManifestError                          a torn, edited or contradicted manifest
    │   ├── DigestMismatch                         bytes that are not the bytes that were saved
    │   ├── SizeMismatch                           a file longer or shorter than its shape and type
    │   └── UnsafeContent                          a pickle that asks for code, a link that leads out
    ├── IncompleteCheckpoint(FileNotFoundError)    a directory without its marker
    ├── CheckpointNotFound(FileNotFoundError)      nothing there
    ├── UsageError(ValueError)                     the caller is wrong
    │   ├── InvalidName                            a name that cannot be a folder
    │   ├── UnsupportedDtype                       a type that has no place on disk
    │   ├── VariableMismatch                       two things that should agree and do not
    │   └── CheckpointExists(FileExistsError)      the target is taken
    ├── VariableNotFound(KeyError)                 no such name; says the nearest ones
    ├── StorageError(OSError)                      the machine refused: permission, disk, network
    │   └── OutOfSpace                             the disk is full; says what was needed
    └── MissingDependency(ImportError)             says what to install
"""

from __future__ import annotations

import errno
import os
from typing import Any

__all__ = [
    "CheckpointExists",
    "CheckpointNotFound",
    "DigestMismatch",
    "FormatError",
    "IncompleteCheckpoint",
    "InvalidName",
    "ManifestError",
    "MetaError",
    "MissingDependency",
    "OutOfSpace",
    "SizeMismatch",
    "StorageError",
    "UnsafeContent",
    "UnsupportedDtype",
    "UsageError",
    "VariableMismatch",
    "VariableNotFound",
    "VarstoreError",
]


class VarstoreError(Exception):
    """Say where, what was found, what was expected and what to do next.

    The message reads ``path: variable 'name': field: problem: found X, expected Y. Hint.``;
    the parts that are given are also attributes, for programs.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        path: str | os.PathLike[str] | None = None,
        variable: str | None = None,
        field: str | None = None,
        found: Any = None,
        expected: Any = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = None if path is None else os.fspath(path)
        self.variable = variable
        self.field = field
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        where = [self.path, None if self.variable is None else f"variable {self.variable!r}", self.field]
        text = ": ".join([part for part in where if part] + [self.problem])
        facts = [
            f"{label} {value}"
            for label, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        if facts:
            text += ": " + ", ".join(facts)
        if self.hint:
            text += ("\n" if "\n" in text else ". ") + self.hint[0].upper() + self.hint[1:]
        return text

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @property
    def where(self) -> str | None:
        """The variable or field that is meant, where one is known."""
        return self.variable if self.field is None else self.field


class FormatError(VarstoreError, ValueError):
    """The disk is wrong: what lies there is not what the format says."""


class MetaError(FormatError):
    """A ``meta`` file does not describe a variable."""


class ManifestError(FormatError):
    """The manifest is torn, was edited, or contradicts the folders."""


class DigestMismatch(FormatError):
    """The bytes read are not the bytes that were saved."""


class SizeMismatch(FormatError):
    """A file is longer or shorter than its shape and type say."""


class UnsafeContent(FormatError):
    """A file asks for what no checkpoint needs: code to run, a path that leads out."""


class IncompleteCheckpoint(VarstoreError, FileNotFoundError):
    """The directory has no ``snapshot_done``: its save never finished."""


class CheckpointNotFound(VarstoreError, FileNotFoundError):
    """There is no directory or file at this path."""


class UsageError(VarstoreError, ValueError):
    """The caller asked for something that cannot be."""


class InvalidName(UsageError):
    """A name that cannot become a folder, or collides with another."""


class UnsupportedDtype(UsageError):
    """A type that has no place on disk, or that this version cannot read."""


class VariableMismatch(UsageError):
    """Two things that should agree in name, shape or type do not."""


class CheckpointExists(UsageError, FileExistsError):
    """The target of a save is taken; nothing was touched."""


class VariableNotFound(VarstoreError, KeyError):
    """There is no variable of this name."""


class StorageError(VarstoreError, OSError):
    """The operating system refused; ``errno`` says why and ``__cause__`` holds its own error."""

    def __init__(self, problem: str = "", *, number: int | None = None, **where: Any) -> None:
        super().__init__(problem, **where)
        self.errno = number


class OutOfSpace(StorageError):
    """The disk is full, or would be before the save ends."""

    def __init__(self, problem: str = "", **where: Any) -> None:
        super().__init__(problem, number=where.pop("number", errno.ENOSPC), **where)


class MissingDependency(VarstoreError, ImportError):
    """A package that this operation needs is not installed."""
