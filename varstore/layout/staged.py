"""The names that a save gives to temporary folders, so that others recognise them; see `varstore.disk.save`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from varstore.layout.names import MANIFEST

__all__ = [
    "FILLING",
    "GIVING_WAY",
    "NEW_MANIFEST",
    "NOTE",
    "REPLACED",
    "REPLACING",
    "SAVING",
    "STAGED",
    "is_giving_way",
    "is_passing_name",
    "is_staging_name",
]

SAVING, REPLACED, REPLACING, FILLING = ".saving-", ".replaced-", ".replacing-", ".filling-"
STAGED = re.compile(r"\.(?P<target>.+)(?P<infix>\.saving-|\.replaced-)[0-9a-f]{8}", re.DOTALL)
"""Matches the name of a folder beside the target."""
NOTE = re.compile(r"\.saving-[0-9a-f]{8}")
"""Matches the name of a note in a folder that is written to, which says who does that."""
GIVING_WAY = re.compile(r"\.(?:replaced|replacing|filling)-[0-9a-f]{8}")
"""Matches the name of a note in a folder that is replaced where it lies, or in the one that replaces it."""

NEW_MANIFEST = re.compile(rf"\.{MANIFEST}\.[0-9a-f]{{8}}")
"""Matches the name of a manifest that a seal writes."""


def is_passing_name(name: str) -> bool:
    """Tell whether a name is one that only a save, a seal or a removal gives, for a time."""
    return any(pattern.fullmatch(name) for pattern in (STAGED, NOTE, GIVING_WAY, NEW_MANIFEST))


def is_staging_name(name: str) -> bool:
    """Tell whether a folder's name is one that only staging gives."""
    return STAGED.fullmatch(name) is not None


def is_giving_way(names: Iterable[str]) -> bool:
    """Tell from the names in a folder whether it is being removed to make place for another one."""
    return any(map(GIVING_WAY.fullmatch, names))
