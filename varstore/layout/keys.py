"""Keys that a file chooses, in maps that cannot be made slow by them.

Python hashes text and bytes with a secret key, but not numbers and tuples: a file can choose thousands of them that
have one hash, and each is then compared with all before it. A map for internal use has its keys packed as bytes. In the
dicts and sets of a state, which keep the keys that were saved, only a few may have the same hash. What programs save is
never like that: integers of less than 61 bits are their own hash.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

__all__ = ["Keys", "packed"]

_MOST_EQUAL = 16
_KEYED = (str, bytes, bool, type(None))
_OWN_HASH = 1 << 61


def packed(*numbers: Any) -> bytes:
    """Return numbers, text, None and tuples of them as bytes, which differ if they do."""
    return repr(numbers).encode("utf-8", "surrogatepass")


class Keys:
    """The numbers and tuples that are keys in one file, or in one container of it."""

    __slots__ = ("_by_hash",)

    def __init__(self) -> None:
        self._by_hash: dict[bytes, list[Hashable]] = {}

    def admits(self, key: Hashable) -> bool:
        """Return whether few other keys have the hash of this one; TypeError if it cannot be a key."""
        kind = type(key)
        if kind in _KEYED or (kind is int and -_OWN_HASH < key < _OWN_HASH):  # type: ignore[operator]
            return True
        alike = self._by_hash.setdefault(b"%x" % hash(key), [])
        if key not in alike:
            alike.append(key)
        return len(alike) <= _MOST_EQUAL
