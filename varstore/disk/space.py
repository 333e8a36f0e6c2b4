"""Refuse a save that the disk cannot hold, before its first byte."""

from __future__ import annotations

import os

from varstore.errors import OutOfSpace
from varstore.spec.arrays import Stored
from varstore.spec.plan import SavePlan

__all__ = ["check_space", "out_of_space"]


def check_space(plan: SavePlan, target: str) -> None:
    """Check free bytes and inodes where the target will lie.

    Raises:
        OutOfSpace: says what is free and what is needed.
    """
    status = _file_system_of(target)
    files = sum(3 - v.is_linked for v in plan.variables)
    if status.f_files > 0 and status.f_favail < files:
        raise OutOfSpace(
            "too few files can be made on this disk; nothing was written",
            path=target,
            found=f"{status.f_favail:,} free inodes",
            expected=f"{files:,}",
        )
    if status.f_bavail * status.f_frsize < _bytes_needed(plan, target):
        raise out_of_space(plan, target, "the disk is too full for this save; nothing was written")


def out_of_space(plan: SavePlan, target: str, problem: str) -> OutOfSpace:
    """Return the error that says what a save needs and what the disk has."""
    status = _file_system_of(target)
    return OutOfSpace(
        problem,
        path=target,
        found=f"{status.f_bavail * status.f_frsize:,} bytes free",
        expected=f"{_bytes_needed(plan, target):,} bytes for the values",
        hint="free some space, save elsewhere, or give base= so that unchanged variables are linked",
    )


def _bytes_needed(plan: SavePlan, target: str) -> int:
    """Return the bytes that will be written: variables of other file systems are copied, not linked."""
    stored = [(v.source.root, v.nbytes) for v in plan.variables if isinstance(v.source, Stored) and not v.alias_of]
    device = os.stat(_place_of(target)).st_dev
    far = {root for root in {root for root, _ in stored} if os.path.isdir(root) and os.stat(root).st_dev != device}
    return plan.nbytes + sum(nbytes for root, nbytes in stored if root in far)


def _file_system_of(target: str) -> os.statvfs_result:
    return os.statvfs(_place_of(target))


def _place_of(target: str) -> str:
    place = target if os.path.isdir(target) else os.path.dirname(target)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place
