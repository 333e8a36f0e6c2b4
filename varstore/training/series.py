"""A directory with one checkpoint per step: which of them are complete, and what else is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.save.staging import is_staging_name
from varstore.errors import VarstoreError
from varstore.layout.names import MARKER
from varstore.training.policies import Saved

__all__ = ["KEY", "Member", "Series", "time_of"]

KEY = "training"
"""The attribute of a checkpoint that holds its step, time and metrics, and what was removed from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A complete checkpoint of the series; `trimmed` are the patterns of the variables that were removed from it."""

    saved: Saved
    trimmed: frozenset[str]


class Series:
    """The folders of a directory that are named ``PREFIX`` + step; each call looks at the disk."""

    def __init__(self, directory: str, prefix: str) -> None:
        self.directory = directory
        self.prefix = prefix
        self._pattern = re.compile(re.escape(prefix) + r"(0|[1-9][0-9]*)")
        self._known: dict[tuple[str, int], Member] = {}

    def path(self, step: int) -> str:
        """Return the path of a step's checkpoint, which need not exist."""
        return os.path.join(self.directory, f"{self.prefix}{step}")

    def members(self) -> list[Member]:
        """Return the complete checkpoints in the order of their steps."""
        found = [member for _, member in self._look() if isinstance(member, Member)]
        return sorted(found, key=lambda member: member.saved.step)

    def others(self) -> dict[str, str]:
        """Return the names of everything else, each with the reason why it is not a checkpoint of the series."""
        return {name: why for name, why in sorted(self._look(), key=lambda pair: pair[0]) if isinstance(why, str)}

    def _look(self) -> Iterator[tuple[str, Member | str]]:
        known, self._known = self._known, {}
        for entry in _entries(self.directory):
            match = self._pattern.fullmatch(entry.name)
            if is_staging_name(entry.name):
                continue
            if match is None or not entry.is_dir(follow_symlinks=False):
                yield entry.name, "not a step of this run"
                continue
            key = (entry.name, entry.inode())  # a save makes a new folder and never changes one in place
            try:
                self._known[key] = known.get(key) or _member(int(match[1]), entry.path)
            except (VarstoreError, OSError) as error:
                yield entry.name, str(error)
            else:
                yield entry.name, self._known[key]


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _member(step: int, path: str) -> Member:
    with open_checkpoint(path) as checkpoint:
        said = checkpoint.attributes.get(KEY)
        facts: Mapping[str, Any] = said if isinstance(said, dict) else {}
        metrics = facts.get("metrics") or {}
        saved = Saved(
            step=step,
            time=time_of(checkpoint),
            metrics=MappingProxyType({name: float(value) for name, value in metrics.items()}),
            path=path,
        )
        return Member(saved=saved, trimmed=frozenset(facts.get("trimmed", ())))


def time_of(checkpoint: Checkpoint) -> float:
    """Return when a checkpoint was saved, in seconds since the epoch, by the clock of the process that saved it."""
    said = checkpoint.attributes.get(KEY)
    if isinstance(said, dict) and "time" in said:
        return float(said["time"])
    if checkpoint.manifest is not None:
        return checkpoint.manifest.time_ns / 1e9
    return os.stat(os.path.join(checkpoint.path, MARKER)).st_mtime
