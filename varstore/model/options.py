"""Typed records of the options that `save`, `load` and the functions that call them take by keyword.

A function that passes its options on declares them as ``**options: Unpack[SaveOptions]``, so that editors and type
checkers know their names. A function that keeps them for a later call calls `check_options` at once, so that a
misspelt option is a TypeError where it was written, and not in a thread or an hour later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypedDict

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint
from varstore.disk.save.foreign import Foreign
from varstore.text.hints import nearest
from varstore.values.attached import FileContent
from varstore.values.plan import Encode

__all__ = ["LoadOptions", "Path", "RunOptions", "SaveOptions", "StateOptions", "StoreOptions", "check_options"]

Path = str | os.PathLike[str]


class LoadOptions(TypedDict, total=False):
    """How variables are read; see `varstore.load`."""

    verify: bool
    threads: int | None
    progress: Progress


class RunOptions(TypedDict, total=False):
    """What all saves of a run have in common; see `varstore.save`."""

    durable: bool
    threads: int | None
    progress: Progress
    variable_attributes: Mapping[str, Mapping[str, Any]] | None
    files: Mapping[str, FileContent] | None
    links: bool
    encoding: Encode


class StoreOptions(TypedDict, total=False):
    """What is written, and how; see `varstore.save`."""

    attributes: Mapping[str, Any] | None
    variable_attributes: Mapping[str, Mapping[str, Any]] | None
    files: Mapping[str, FileContent] | None
    base: Path | Checkpoint | None
    overwrite: bool
    foreign: Foreign
    durable: bool
    manifest: bool
    links: bool
    threads: int | None


class StateOptions(StoreOptions, total=False):
    """All options of `varstore.save_state`."""

    encoding: Encode
    progress: Progress


class SaveOptions(StateOptions, total=False):
    """All options of `varstore.save`."""

    tree: str


def check_options(options: Mapping[str, Any], record: type, function: str) -> None:
    """Refuse an unknown option, as Python refuses an unknown keyword.

    Raises:
        TypeError: an option is not in the record; the message suggests a similar one.
    """
    known = record.__annotations__
    for name in options:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function} got an unexpected keyword argument {name!r}{hint}")
