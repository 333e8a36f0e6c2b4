"""Every error that varstore raises, in one tree.

Each class is also the built-in class that callers already catch, and each branch says where the fault lies:

    VarstoreError
    ├── FormatError(ValueError)                    what is on disk is wrong
    │   ├── MetaError                              a meta file does not describe a variable
    │   ├── ManifestError                          the manifest is torn, edited or contradicted by the folders
    │   ├── DigestMismatch                         the bytes are not the bytes that were saved
    │   ├── SizeMismatch                           a file is longer or shorter than its shape and type say
    │   └── UnsafeContent                          a pickle asks for code to run, or a link leads out
    ├── IncompleteCheckpoint(FileNotFoundError)    a directory does not have its marker
    ├── CheckpointNotFound(FileNotFoundError)      there is nothing at the path
    ├── UsageError(ValueError)                     the call is wrong
    │   ├── InvalidName                            a name cannot be a folder
    │   ├── UnsupportedDtype                       a type cannot be stored
    │   ├── VariableMismatch                       two things that should agree do not
    │   └── CheckpointExists(FileExistsError)      the target of a save exists
    ├── VariableNotFound(KeyError)                 no variable has this name; the message lists similar ones
    ├── StorageError(OSError)                      the system refused: permission, disk, network
    │   └── OutOfSpace                             the disk is full; the message says how much is needed
    └── MissingDependency(ImportError)             a package is not installed; the message says which

Example:
    >>> try:
    ...     vs.load("lenet")
    ... except vs.errors.CheckpointNotFound as error:
    ...     print(error.path, "was not found")
    lenet was not found
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from varstore.text.escape import one_line

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

_SENTENCE = 1000
"""Characters that are shown of a sentence, which names several values."""


class VarstoreError(Exception):
    """Base of all errors; says where the fault is, what was found, what was expected, and what to do next.

    The message reads ``path: variable 'name': field: problem: found X, expected Y. Hint``, with a line for each of the
    `rows`, if there are any, before the hint. Its parts are attributes too: `problem`, `rows`, `path`, `variable`,
    `field`, `found`, `expected` and `hint`; None where one is not known. The attributes are whole; in the message,
    what is not printable is escaped, and a long value is cut in the middle.

    Example:
        >>> checkpoint = vs.save("lenet", {"conv1/weight": np.zeros((6, 25), np.float32)})
        >>> try:
        ...     checkpoint["conv1/wieght"]
        ... except vs.VarstoreError as error:
        ...     print(error)
        ...     print(error.variable)
        lenet: variable 'conv1/wieght': no such variable. Did you mean 'conv1/weight'?
        conv1/wieght
    """

    def __init__(
        self,
        problem: str = "",
        *,
        rows: Iterable[str] = (),
        path: str | os.PathLike[str] | None = None,
        variable: str | None = None,
        field: str | None = None,
        found: Any = None,
        expected: Any = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.rows = tuple(rows)
        self.path = None if path is None else os.fspath(path)
        self.variable = variable
        self.field = field
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        where = [self.path, None if self.variable is None else f"variable {self.variable!r}", self.field]
        text = ": ".join([one_line(part) for part in where if part] + [one_line(self.problem, _SENTENCE)])
        facts = [
            f"{label} {one_line(value)}"
            for label, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        if facts:
            text += ": " + ", ".join(facts)
        text = "\n  ".join([text, *(one_line(row, _SENTENCE) for row in self.rows)])
        if self.hint:
            between = "\n" if self.rows else " " if text.endswith((".", "?", "!")) else ". "
            text += between + one_line(_sentence(self.hint), _SENTENCE)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return _error_of, (type(self), self.args, self.errno if isinstance(self, OSError) else None), dict(vars(self))

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @property
    def where(self) -> str | None:
        """The field or variable at fault, None where neither is known."""
        return self.variable if self.field is None else self.field


def _sentence(hint: str) -> str:
    """Return the hint with a capital first letter, unless it begins with code, such as ``varstore.load``."""
    is_code = any(mark in hint.partition(" ")[0].rstrip(".") for mark in "._(=")
    return hint if is_code else hint[0].upper() + hint[1:]


def _error_of(kind: type[VarstoreError], arguments: tuple[Any, ...], number: int | None) -> VarstoreError:
    """Return an error from another process; its attributes follow."""
    error = kind(*arguments)
    error.args = arguments
    if isinstance(error, OSError):
        error.errno = number
    return error


class FormatError(VarstoreError, ValueError):
    """What is on disk is not what the format says."""


class MetaError(FormatError):
    """A ``meta`` file does not describe a variable."""


class ManifestError(FormatError):
    """The manifest is torn, was edited, or contradicts the folders."""


class DigestMismatch(FormatError):
    """The bytes read are not the bytes that were saved."""


class SizeMismatch(FormatError):
    """A file is longer or shorter than its shape and type say."""


class UnsafeContent(FormatError):
    """A file asks for something that no checkpoint needs: code to run, or a path that leads out."""


class IncompleteCheckpoint(VarstoreError, FileNotFoundError):
    """The directory does not have its marker, ``snapshot_done``: its save never finished."""


class CheckpointNotFound(VarstoreError, FileNotFoundError):
    """There is no directory or file at this path."""


class UsageError(VarstoreError, ValueError):
    """The call asks for something that cannot be done."""


class InvalidName(UsageError):
    """A name cannot be a folder, or collides with another name."""


class UnsupportedDtype(UsageError):
    """A data type cannot be stored, or this version cannot read it."""


class VariableMismatch(UsageError):
    """Two things that should agree in name, shape or type do not."""


class CheckpointExists(UsageError, FileExistsError):
    """The target of a save exists; nothing was changed."""


class VariableNotFound(VarstoreError, KeyError):
    """No variable has this name."""


class StorageError(VarstoreError, OSError):
    """The operating system refused: `errno` says why, and ``__cause__`` is its own error."""

    def __init__(self, problem: str = "", *, number: int | None = None, **where: Any) -> None:
        super().__init__(problem, **where)
        self.errno = number


class OutOfSpace(StorageError):
    """The disk is full, or would be before the save is complete."""

    def __init__(self, problem: str = "", **where: Any) -> None:
        super().__init__(problem, number=where.pop("number", errno.ENOSPC), **where)


class MissingDependency(VarstoreError, ImportError):
    """A package that this operation needs is not installed."""
