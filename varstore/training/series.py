"""A directory with one checkpoint per step: which steps are whole, and what else is there.

What a step is has one definition, here. A *name* of a step is the prefix and a number. It is *taken* if a folder, or a
symbolic link to one, has it. A step is *whole* if that folder has its marker and a manifest that can be read. A name
that is taken by something that is not whole counts for nothing, except that a save does not take it unasked and that
`others` says what is wrong with it. Looking at every file would take too long for each of these calls: only where the
latest step is asked for, a step also counts only if its files are there and as long as they were saved.

A manager records in the manifest what it later decides by. A whole step without a record, or with one that another
program wrote, can be restored, but nothing is known of its metrics.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.threads import for_each
from varstore.errors import ManifestError, VarstoreError
from varstore.layout.attached import FileEntry
from varstore.layout.manifest import Entry
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.staged import is_staging_name
from varstore.storage import syscalls
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.training.policies import Saved

__all__ = [
    "KEY",
    "Member",
    "Record",
    "Series",
    "Taken",
    "check_files",
    "open_step",
    "prefixes_in",
    "require_manifest",
    "time_of",
]

KEY = "training"
"""The attribute of a checkpoint that holds its step, time and metrics, and what was removed from it."""


_STEP = re.compile(r"(.*?)(?:0|[1-9][0-9]*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a manager records of a step, beside its number.

    `trimmed` are the patterns of the variables that were removed. `run` counts how often the training had stepped back
    before this step was saved. `rewound` is the last such run whose steps are no longer kept for that reason. `pinned`
    says that a `Pinned` policy named the step when it was saved; policies decide by their own steps, not by this.
    `is_given` is false for a checkpoint that no manager saved, of which only the time is known.
    """

    time: float
    metrics: Mapping[str, float]
    trimmed: tuple[str, ...] = ()
    run: int = 0
    rewound: int = 0
    pinned: bool = False
    is_given: bool = True

    def as_json(self, step: int) -> dict[str, Any]:
        """Return the attribute of the checkpoint; what has its default is left out."""
        optional = {"trimmed": list(self.trimmed), "run": self.run, "rewound": self.rewound, "pinned": self.pinned}
        said = {name: value for name, value in optional.items() if value}
        return {"step": step, "time": self.time, "metrics": dict(self.metrics), **said}

    @classmethod
    def parse(cls, said: Any) -> Record | None:
        """Return the record that an attribute holds, None if it does not hold one."""
        said = said if isinstance(said, dict) else {}
        time, metrics, trimmed = said.get("time"), said.get("metrics"), said.get("trimmed", [])
        run, rewound = said.get("run", 0), said.get("rewound", 0)
        if not (_is_number(time) and isinstance(metrics, dict) and all(map(_is_number, metrics.values()))):
            return None
        if not (isinstance(trimmed, list) and all(isinstance(pattern, str) for pattern in trimmed)):
            return None
        if not (isinstance(run, int) and isinstance(rewound, int)):
            return None
        pinned = said.get("pinned") is True
        numbers = MappingProxyType({name: float(value) for name, value in metrics.items()})
        return cls(time=float(time), metrics=numbers, trimmed=tuple(trimmed), run=run, rewound=rewound, pinned=pinned)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A whole step; `record` is None if another program wrote what is in its place."""

    saved: Saved
    record: Record | None
    is_link: bool


class Taken(NamedTuple):
    """What has the name of a step: a member, or why it is not one."""

    step: int
    path: str
    found: Member | VarstoreError

    @property
    def is_remains(self) -> bool:
        """Whether it has a marker or a manifest, so that it is what is left of a checkpoint."""
        return any(os.path.lexists(os.path.join(self.path, name)) for name in (MARKER, MANIFEST))


class Series:
    """The folders of a directory that are named ``PREFIX`` + step; each call looks at the disk."""

    def __init__(self, directory: str, prefix: str) -> None:
        self.directory = directory
        self.prefix = prefix
        self._above = os.path.join(directory, "")
        self._pattern = re.compile(re.escape(prefix) + r"(0|[1-9][0-9]*)")
        self._known: dict[tuple[Any, ...], Member] = {}

    def path(self, step: int) -> str:
        """Return the path of a step's checkpoint, which need not exist."""
        return os.path.join(self.directory, f"{self.prefix}{step}")

    def members(self) -> list[Member]:
        """Return the whole steps in order."""
        return [taken.found for taken in self.taken() if isinstance(taken.found, Member)]

    def taken(self) -> list[Taken]:
        """Return all that has the name of a step, in the order of the steps."""
        return sorted((found for _, found in self._look() if isinstance(found, Taken)), key=lambda taken: taken.step)

    def others(self) -> dict[str, str]:
        """Return the names of everything that is not a whole step, each with the reason why."""
        reasons = {}
        for name, found in self._look():
            if found is None:
                reasons[name] = "not a step of this run"
            elif isinstance(found.found, VarstoreError):
                reasons[name] = str(found.found)
        return dict(sorted(reasons.items()))

    def _look(self) -> list[tuple[str, Taken | None]]:
        known, self._known = self._known, {}
        with translated(self.directory, "the directory cannot be read"):
            try:
                (fd,) = map(syscalls.open_folder, (self.directory,))  # not to be divided by Ctrl-C
            except FileNotFoundError:
                return []
            try:
                with os.scandir(fd if syscalls.HAS_FOLDERS else self.directory) as entries:
                    return [*self._looked_at(list(entries), fd, known)]
            finally:
                syscalls.close_folder(fd)

    def _looked_at(
        self, entries: list[os.DirEntry[str]], fd: int, known: dict[tuple[Any, ...], Member]
    ) -> Iterator[tuple[str, Taken | None]]:
        for entry in entries:
            match = self._pattern.fullmatch(entry.name)
            if match is not None and _is_folder(entry):
                yield entry.name, self._taken(entry, int(match[1]), fd, known)
            elif not is_staging_name(entry.name):
                yield entry.name, None

    def _taken(self, entry: os.DirEntry[str], step: int, fd: int, known: dict[tuple[Any, ...], Member]) -> Taken:
        path = f"{self._above}{entry.name}"
        is_link, state = entry.is_symlink(), self._state(entry.name, fd)
        key = entry.name, is_link, state
        try:
            member = known.get(key) or _member(step, path, is_link=is_link)
        except VarstoreError as error:
            return Taken(step, path, error)
        if state is not None:
            self._known[key] = member
        return Taken(step, path, member)

    def _state(self, name: str, fd: int) -> tuple[int, ...] | None:
        """Return what changes whenever the manifest or the marker does, None if one of them is not there.

        Both are found by the descriptor of the directory, which is quicker than
        following the whole path each time.
        """
        at, dir_fd = (name, fd) if syscalls.HAS_FOLDERS else (self._above + name, None)
        try:
            manifest = os.stat(f"{at}/{MANIFEST}", dir_fd=dir_fd)
            marker = os.stat(f"{at}/{MARKER}", dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return None
        return manifest.st_dev, manifest.st_ino, manifest.st_size, manifest.st_mtime_ns, marker.st_ino, marker.st_mode


def prefixes_in(path: str) -> set[str]:
    """Return what the names of the steps in a directory begin with: of each run, if there are several.

    There are none in a checkpoint, whatever its folders are named.
    """
    if any(os.path.lexists(os.path.join(path, name)) for name in (MARKER, MANIFEST)):
        return set()
    with translated(path, "reading failed"):
        names = os.listdir(path) if os.path.isdir(path) else []
    numbered = ((name, match[1]) for name in names if (match := _STEP.fullmatch(name)))
    return {prefix for name, prefix in numbered if os.path.lexists(os.path.join(path, name, MARKER))}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _member(step: int, path: str, *, is_link: bool) -> Member:
    with open_step(path) as checkpoint:
        time = time_of(checkpoint)
        if KEY in checkpoint.attributes:
            record = Record.parse(checkpoint.attributes[KEY])
        else:
            record = Record(time=time, metrics=MappingProxyType({}), is_given=False)
        metrics = MappingProxyType({}) if record is None else record.metrics
        saved = Saved(step=step, time=time, metrics=metrics, path=path)
        return Member(saved=saved, record=record, is_link=is_link)


def open_step(path: str) -> Checkpoint:
    """Open the checkpoint of a step.

    Raises:
        ManifestError: it does not have a manifest, or the manifest cannot be read.
        CheckpointNotFound, IncompleteCheckpoint: see `varstore.open`.
    """
    checkpoint = open_checkpoint(path)
    try:
        require_manifest(checkpoint)
    except ManifestError:
        checkpoint.close()  # the error may be kept, and this handle with it, and would count as reading the step
        raise
    return checkpoint


def require_manifest(checkpoint: Checkpoint) -> None:
    """Refuse a step that does not have a manifest.

    Raises:
        ManifestError: it does not.
    """
    if checkpoint.manifest is None:
        raise ManifestError(
            "the manifest of this step is lost, and with it the metrics and the structure of the state",
            path=checkpoint.path,
            hint=f"read its arrays by name with vs.load({checkpoint.path!r})",
        )


def check_files(saved: Saved) -> None:
    """Check that all files of a step are there and as long as they were saved.

    Raises:
        VarstoreError: one is not, or the step cannot be opened.
    """
    with open_step(saved.path) as checkpoint, Directory(checkpoint.location) as directory:
        files = [file.entry for file in checkpoint.files.values()]
        for_each([*checkpoint.content.entries.values(), *files], partial(_check_file, directory))


def _check_file(directory: Directory, entry: Entry | FileEntry) -> None:
    with directory.out(entry):
        pass


def time_of(checkpoint: Checkpoint) -> float:
    """Return when a checkpoint was saved, in seconds since the epoch, by the clock of the process that saved it."""
    said = checkpoint.attributes.get(KEY)
    if isinstance(said, dict) and _is_number(said.get("time")):
        return float(said["time"])
    if checkpoint.manifest is not None:
        return checkpoint.manifest.time_ns / 1e9
    with translated(checkpoint.path, "the time of its marker cannot be read"):
        return os.stat(os.path.join(checkpoint.path, MARKER)).st_mtime
