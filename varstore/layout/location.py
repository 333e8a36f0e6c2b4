"""The place of a checkpoint, and its identity, which distinguishes it from a later checkpoint at the same place."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Identity", "Location"]

Identity = bytes | tuple[int, int]
"""The digest of the manifest's body or, without a manifest, inode and time of the marker, which is created once."""


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a checkpoint and its identity; picklable, and equal for handles of one checkpoint.

    `path` is what the caller wrote, for messages. `absolute` is the path that is opened; it does not change with the
    working directory. `identity` is None before the checkpoint is opened, and for a directory that has neither a
    manifest nor a marker. `has_marker` is False for a checkpoint that was opened although it is not complete.
    `unshared` is True for one whose files are not to get a second name.
    """

    path: str = field(compare=False)
    absolute: str
    identity: Identity | None = None
    has_marker: bool = True
    unshared: bool = False

    def known_as(self, identity: Identity | None, *, has_marker: bool = True, unshared: bool = False) -> Location:
        """Return this location with the identity of the checkpoint."""
        return Location(self.path, self.absolute, identity, has_marker, unshared)

    def __reduce__(self) -> tuple[type[Location], tuple[str, str, Identity | None, bool, bool]]:
        # In another process, a relative path can mean another place.
        return Location, (self.absolute, self.absolute, self.identity, self.has_marker, self.unshared)
