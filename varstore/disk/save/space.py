"""Refuse a save that the disk cannot hold, before its first byte; say what is missing where it fills up later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from varstore.errors import OutOfSpace
from varstore.layout.location import Location
from varstore.storage import syscalls
from varstore.storage.directory import is_shared
from varstore.values.arrays import Stored
from varstore.values.attached import PlannedFile
from varstore.values.plan import PlannedVariable, SavePlan

__all__ = ["check_space", "disk_became_full"]

_FILES = 3
"""Of a variable that is written: its folder, ``out`` and ``meta``; one that is linked needs but the folder."""


def check_space(plan: SavePlan, target: str) -> None:
    """Check free bytes and inodes where the target will lie, as if links were possible within a file system.

    Raises:
        OutOfSpace: says what is free and what is needed.
        OSError: it is a read-only file system.
    """
    status = _file_system_of(target)
    if status.f_flag & syscalls.READ_ONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), target)
    free = _free(status)
    far = _far(plan, target)
    nbytes = sum(v.nbytes for v in far) + plan.nbytes
    files = len(plan.variables) + (_FILES - 1) * (len(plan.written) + len(far)) + len(plan.files)
    if status.f_favail < files and _counts_inodes(status, target):
        raise _too_few_inodes("too few files can be made on this disk; nothing was written", status, target, files)
    if free < nbytes and _counts_bytes(status, target):
        raise _too_few_bytes(
            "the disk is too full for this save; nothing was written", status, target, f"{nbytes:,} bytes", plan
        )


def disk_became_full(plan: SavePlan, target: str, copied: int) -> OutOfSpace:
    """Return the error for a save that was undone, when so many bytes of what was to be linked had been copied."""
    problem = "the disk became full; the save was undone"
    status = _file_system_of(target)
    nbytes = plan.nbytes + max(copied, sum(v.nbytes for v in _far(plan, target)))
    files = _FILES * len(plan.variables) + len(plan.files)
    if nbytes <= _free(status) and status.f_favail < files and _counts_inodes(status, target):
        return _too_few_inodes(problem, status, target, files)
    return _too_few_bytes(problem, status, target, f"at least {nbytes:,} bytes", plan)


def _far(plan: SavePlan, target: str) -> list[PlannedVariable | PlannedFile]:
    """Return the variables and files that are copied and not linked, such as those of other file systems."""
    if not plan.links:
        linked = [variable for variable in plan.variables if variable.is_linked]
        return [*linked, *(file for file in plan.files if file.stored is not None)]
    stored: list[tuple[PlannedVariable | PlannedFile, Location]] = [
        (v, v.source.location) for v in plan.variables if isinstance(v.source, Stored) and not v.alias_of
    ]
    stored += [(file, file.stored.location) for file in plan.files if file.stored is not None]
    if not stored:
        return []
    device: int = _looked_up(os.stat, target).st_dev
    roots = {location.absolute for _, location in stored}
    far = {root for root in roots if _device_of(root) not in (None, device)}
    return [v for v, location in stored if location.unshared or location.absolute in far]


def _device_of(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except (FileNotFoundError, NotADirectoryError):  # told when it is opened
        return None


def _too_few_inodes(problem: str, status: Any, target: str, files: int) -> OutOfSpace:
    return OutOfSpace(
        problem,
        path=target,
        found=f"{status.f_favail:,} free inodes",
        expected=f"{files:,}",
        hint="remove files that are not needed, or save elsewhere",
    )


def _too_few_bytes(problem: str, status: Any, target: str, needed: str, plan: SavePlan) -> OutOfSpace:
    base = ", or pass base= to link unchanged variables" if plan.nbytes else ""
    return OutOfSpace(
        problem,
        path=target,
        found=f"{_free(status):,} bytes free",
        expected=f"{needed} for the values",
        hint=f"free some space, or save elsewhere{base}",
    )


def _is_shared(path: str) -> bool:
    os.stat(path)
    return is_shared(path)


def _counts_inodes(status: Any, target: str) -> bool:
    """Tell whether a file system says how many files can be made; zeros say nothing on btrfs, ramfs and in FUSE."""
    return bool(status.f_files > 0 and (status.f_favail > 0 or not _looked_up(_is_shared, target)))


def _counts_bytes(status: Any, target: str) -> bool:
    """Tell whether a file system says how many bytes are free."""
    return bool(status.f_blocks > 0 and (status.f_bavail > 0 or not _looked_up(_is_shared, target)))


def _free(status: Any) -> int:
    nbytes: int = status.f_bavail * status.f_frsize
    return nbytes


def _file_system_of(target: str) -> Any:
    return _looked_up(syscalls.statvfs, target)


def _looked_up(look: Callable[[str], Any], target: str) -> Any:
    """Return what a call says of the target or, while there is nothing, of the first folder above it that there is."""
    place = target
    while True:
        try:
            return look(place)
        except (FileNotFoundError, NotADirectoryError):  # also while another writer replaces it
            above = os.path.dirname(place)
            if above == place:
                raise
            place = above
