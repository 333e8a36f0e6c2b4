"""What is known not to hold on some file systems, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["KNOWN"]

_BY_FILES = "rclone renames a folder file by file, and shows what was written or removed seconds later"
_LATE = "what was just written may be shown incomplete until rclone's cache has written it back, some seconds later"
_RCLONE: Final = dict.fromkeys(
    (
        "overwrite",
        "two writers",
        "two writers, two mounts",
        "load beside overwrites",
        "load beside overwrites, second mount",
        "kill -9, clean",
        "save beside clean",
        "save beside clean, second mount",
        "manager",
        "image layer",
    ),
    _BY_FILES,
)

_STUCK = (
    "encfs may take a file of the loser, closed just before the rename that was refused, for open until it is unmounted"
)

_CACHED: Final = {
    **_RCLONE,
    **dict.fromkeys(("save, durable", "save", "load", "slices", "mmap", "verify", "base=", "seal", "convert"), _LATE),
}

KNOWN: Final[Mapping[str, Mapping[str, str]]] = {
    "encfs": {"two writers": _STUCK},
    "rclone, no cache": _RCLONE,
    "rclone, cached writes": _CACHED,
    "rclone, all cached": _CACHED,
}
"""By the names of the file system and the check."""
