"""Keys that a file chooses, in maps that cannot be made slow by them.

Python hashes text and bytes with a secret key, but not numbers and tuples. A file can choose thousands of them that
have one hash, or whose searches for a free place in the table of a dict all lead along the same taken places, so that
the time grows with the square of their number. A map for internal use has its keys packed as bytes, or is keyed by
text. The dicts and sets of a state keep the keys that were saved. For these, the table is modelled while it is filled:
each key takes the place in a table of bytes that it takes in Python's, and what walks too far is refused. Keys that
programs save take two or three steps.

Source: https://github.com/python/cpython/blob/v3.13.0/Objects/dictobject.c and setobject.c
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["FEW", "KEYED", "KeyTable", "are_far_apart", "packed"]

KEYED = frozenset({str, bytes, bool, type(None)})
"""The types whose hashes a file cannot choose."""

_WORD = (1 << 64) - 1
_SMALLEST = 8
_LINEAR = 9
"""How many places after the first one a set tries before it goes on to another part of its table."""
FEW = 64
"""So many keys cannot take much time, whatever they are."""
_STEPS, _FREE_STEPS = 32, 1024
"""The number of steps that each key may take on average, and more for all."""


def packed(*numbers: Any) -> bytes:
    """Return numbers, text, None and tuples of them as bytes, which differ if they do."""
    return repr(numbers).encode("utf-8", "surrogatepass")


def are_far_apart(keys: Iterable[Any], *, is_set: bool = False) -> bool:
    """Return whether a dict or set of these keys is filled in linear time; TypeError if one cannot be a key."""
    keys = list(keys)
    table = KeyTable(is_set=is_set)
    if all(map(table.admits, keys)):
        return True
    table = KeyTable(is_set=is_set)  # the model takes a key that occurs twice for two keys that collide
    return all(map(table.admits, {packed(key): key for key in keys}.values()))


class KeyTable:
    """A model of the table of a dict or set, which is given the keys in the same order."""

    __slots__ = ("_hashes", "_is_set", "_places", "_room", "_steps")

    def __init__(self, *, is_set: bool) -> None:
        self._is_set = is_set
        self._hashes: list[int] = []
        self._steps = 0
        self._places = bytearray()
        self._room = FEW

    def admits(self, key: Any) -> bool:
        """Add a key, and return whether the keys have walked few steps so far; a key that is text takes none."""
        hashed = hash(key)
        if type(key) in KEYED:
            return True
        self._hashes.append(hashed & _WORD)
        if len(self._hashes) > self._room:
            return self._grow()
        return not self._places or self._place(hashed & _WORD)

    def _grow(self) -> bool:
        size = _SMALLEST
        while (room := self._room_in(size)) < len(self._hashes):
            wanted = 2 * size if not self._is_set else (room + 1) * (2 if room >= 50_000 else 4)
            size = 1 << wanted.bit_length() if self._is_set else wanted
        self._places, self._room = bytearray(size), room
        return all(map(self._place, self._hashes))

    def _room_in(self, size: int) -> int:
        """Return how many keys a table has room for until it grows."""
        return (3 * (size - 1) - 1) // 5 if self._is_set else 2 * size // 3

    def _place(self, hashed: int) -> bool:
        places, mask = self._places, len(self._places) - 1
        most = _STEPS * len(self._hashes) + _FREE_STEPS
        at, left = hashed & mask, hashed
        while places[at]:
            if self._is_set and at + _LINEAR <= mask:
                free = places.find(0, at, at + _LINEAR + 1)
                if free >= 0:
                    at = free
                    break
            self._steps += 1
            if self._steps > most:
                return False
            left >>= 5
            at = (at * 5 + left + 1) & mask
        places[at] = 1
        return True
