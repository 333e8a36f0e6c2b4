"""What commands open: a checkpoint, one variable's folder, the latest step of a run, or a file of another format."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import click

import varstore as vs
from varstore.errors import CheckpointNotFound, IncompleteCheckpoint, UsageError, VarstoreError

__all__ = ["allow_incomplete_option", "open_path", "steps_in"]

allow_incomplete_option = click.option(
    "--allow-incomplete",
    is_flag=True,
    help="Open a checkpoint that is incomplete or whose manifest is torn, and use the variables that are whole.",
)


def open_path(path: str, *, allow_incomplete: bool = False) -> Any:
    """Open a `varstore.Variable` by its folder, or else a `varstore.Checkpoint` or whatever `varstore.read` opens."""
    if os.path.isfile(os.path.join(path, "out")):
        found = vs.checkpoint.get(path)
        return found if isinstance(found, vs.Variable) else found.checkpoint
    if allow_incomplete:
        return vs.open(path, allow_incomplete=True)
    opened = _checkpoint(path)
    if not isinstance(opened, VarstoreError):
        return opened
    try:
        return vs.read(path)
    except (UsageError, CheckpointNotFound):
        if os.path.isfile(path):
            raise
        raise opened from None


def steps_in(path: str) -> vs.RunSteps | None:
    """Return the steps of a run, None if a path is not a directory with such steps."""
    if os.path.isdir(path) and isinstance(_checkpoint(path), VarstoreError):
        with contextlib.suppress(UsageError):
            return vs.steps(path)
    return None


def _checkpoint(path: str) -> vs.Checkpoint | CheckpointNotFound | IncompleteCheckpoint:
    """Return the checkpoint at a path, or the error of one that says that there is none."""
    try:
        return vs.open(path)
    except (CheckpointNotFound, IncompleteCheckpoint) as error:
        return error
