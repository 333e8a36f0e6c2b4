"""Paths that a file states: they must lead to something inside the folder that the file belongs to.

The snapshots of the Hugging Face Hub are the one exception. Their files are links to files of the same repository, one
per content: ``models--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST``. Such a link is followed if every part of it
has this form, and leads to a regular file.
"""

from __future__ import annotations

import os
import re
import stat

from varstore.errors import UnsafeContent

__all__ = ["inside", "is_below", "is_hub_link"]

_SNAPSHOT = re.compile(r"(.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/.+)?", re.DOTALL)
_BLOB = re.compile(r"(?:\.\./)+blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


def inside(folder: str, *parts: str, stated_by: str | None = None, variable: str | None = None) -> str:
    """Return the real path of something below a folder, symbolic links followed.

    Args:
        folder: what the path must not leave.
        parts: of the path, as they were stated.
        stated_by: the file that states it, for the error; the folder by default.
        variable: whose data lie there, for the error.

    Raises:
        UnsafeContent: the path is absolute, holds NUL, or leads to the folder itself or out of it.
    """
    home = os.path.realpath(folder)
    stated = os.path.join(*parts)
    if "\0" not in stated and not os.path.isabs(stated):
        place = os.path.join(home, stated)
        real = os.path.realpath(place)
        if is_below(home, real):
            return real
        parent = os.path.realpath(os.path.dirname(place))
        link = os.path.join(parent, os.path.basename(place))
        if (parent == home or is_below(home, parent)) and is_hub_link(link):
            return real
    raise UnsafeContent(
        "a path or link leads out of the folder",
        path=stated_by or folder,
        variable=variable,
        found=repr(stated[:100]),
    )


def is_hub_link(place: str) -> bool:
    """Return whether a link is that of a file in a snapshot of the Hub; all other parts of its path must be real."""
    folder, name = os.path.split(place)
    snapshot = _SNAPSHOT.fullmatch(folder)
    try:
        text = os.readlink(place)
        target = os.path.normpath(os.path.join(folder, text))
        is_regular = stat.S_ISREG(os.lstat(target).st_mode)
    except (OSError, ValueError):
        return False
    return (
        bool(name)
        and snapshot is not None
        and _BLOB.fullmatch(text) is not None
        and os.path.dirname(target) == os.path.join(snapshot[1], "blobs")
        and os.path.realpath(target) == target
        and is_regular
    )


def is_below(home: str, real: str) -> bool:
    """Tell whether a path lies below a folder; both are resolved."""
    return real.startswith(home.rstrip(os.sep) + os.sep)
