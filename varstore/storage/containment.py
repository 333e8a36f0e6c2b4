"""Paths that a file states: they must lead to something inside the folder that the file belongs to."""

from __future__ import annotations

import os

from varstore.errors import UnsafeContent

__all__ = ["inside"]


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
    real = "" if "\0" in stated else os.path.realpath(os.path.join(home, stated))
    if os.path.isabs(stated) or not real.startswith(home.rstrip(os.sep) + os.sep):
        raise UnsafeContent(
            "a path or link leads out of the folder",
            path=stated_by or folder,
            variable=variable,
            found=repr(stated[:100]),
        )
    return real
