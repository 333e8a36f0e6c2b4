"""The options that travel together: what `save`, `load` and those who call them take by keyword.

A function that hands its options on declares them as ``**options: Unpack[SaveOptions]``, so that editors and type
checkers know their names. One that only keeps them for a later call asks `check_options` at once: a misspelt
option is a TypeError where it was written, not in a thread or an hour later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypedDict

from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint
from varstore.text.hints import nearest

__all__ = ["LoadOptions", "Path", "RunOptions", "SaveOptions", "StateOptions", "StoreOptions", "check_options"]

Path = str | os.PathLike[str]


class LoadOptions(TypedDict, total=False):
    """How variables are read; see `varstore.load`."""

    verify: bool
    threads: int | None
    progress: Progress


class RunOptions(TypedDict, total=False):
    """What every save of a run has in common; see `varstore.save`."""

    durable: bool
    threads: int | None
    progress: Progress
    variable_attributes: Mapping[str, Mapping[str, Any]] | None


class StoreOptions(TypedDict, total=False):
    """What is written, and how; see `varstore.save`."""

    attributes: Mapping[str, Any] | None
    variable_attributes: Mapping[str, Mapping[str, Any]] | None
    base: Path | Checkpoint | None
    overwrite: bool
    durable: bool
    manifest: bool
    threads: int | None


class StateOptions(StoreOptions, total=False):
    """All options of `varstore.save_state`."""

    progress: Progress


class SaveOptions(StateOptions, total=False):
    """All options of `varstore.save`."""

    tree: str


def check_options(options: Mapping[str, Any], record: type, function: str) -> None:
    """Refuse what is not an option, as Python refuses an unknown keyword.

    Raises:
        TypeError: names the option, and the one that was probably meant.
    """
    known = record.__annotations__
    for name in options:
        if name not in known:
            near = nearest(name, known, count=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function} got an unexpected keyword argument {name!r}{hint}")
