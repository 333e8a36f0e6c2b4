"""Which checkpoint is meant: where it lies, and what tells it from one that has its place later."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Identity", "Location"]

Identity = bytes | tuple[int, int]
"""The digest of the manifest's body; without a manifest, inode and time of the marker, which is made once."""


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a checkpoint and its identity; picklable, and equal for handles of one checkpoint.

    `path` is what the caller wrote, for messages. `absolute` is opened: it was fixed when the caller wrote it,
    whatever becomes the working directory. `identity` is None where nothing can tell: before the checkpoint is
    opened, and for a directory without manifest and marker.
    """

    path: str = field(compare=False)
    absolute: str
    identity: Identity | None = None

    def known_as(self, identity: Identity | None) -> Location:
        """Return this place of the checkpoint that has this identity."""
        return Location(self.path, self.absolute, identity)

    def __reduce__(self) -> tuple[type[Location], tuple[str, str, Identity | None]]:
        return Location, (self.absolute, self.absolute, self.identity)  # a relative path means nothing elsewhere
