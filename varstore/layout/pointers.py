"""Pointers of Git LFS: short texts that git leaves in place of files whose content it has not fetched.

Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import re

from varstore.text.hints import plural

__all__ = ["FETCH", "POINTER_LIMIT", "is_pointer", "size_behind"]

POINTER_LIMIT = 1024
"""Bytes; a pointer is shorter."""
FETCH = "run `git lfs pull` in the repository"
"""What to do about a pointer."""

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size ([0-9]{1,20})$", re.MULTILINE)


def is_pointer(head: bytes) -> bool:
    """Tell whether a file that begins so is a pointer of Git LFS."""
    return head.startswith(_BEGINNING)


def size_behind(head: bytes) -> str | None:
    """Return how long the file is for which a pointer stands, in words; None if it does not say."""
    stated = _SIZE.search(head)
    return stated and plural(int(stated[1]), "byte")
