"""What to do where a path does not lead to a complete checkpoint, which depends on what lies beside it and in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.staged import REPLACED, SAVING, STAGED, is_giving_way
from varstore.text.hints import nearest

__all__ = ["FOREIGN_NAMES", "advice_on_absent", "advice_on_incomplete", "is_being_replaced"]

FOREIGN_NAMES = frozenset(
    (
        *("zarr.json", ".zgroup", ".zarray", "_METADATA", "_CHECKPOINT_METADATA", ".metadata"),
        *("pickled_data", "model.mlir", "model_index.json", "pytorch_model.bin", "adapter_model.bin"),
    )
)
"""Files that other systems put into their folders, which `varstore.read` opens."""
_FOREIGN_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_FOLDERS = 100
"""Folders that are looked into at most."""
_SIBLINGS = 10_000


def is_being_replaced(path: str) -> bool:
    """Tell whether a save, running or interrupted, is between the steps that replace a checkpoint."""
    parent, name = os.path.split(path.rstrip(os.sep))
    return bool(_staged(_names_in(parent), name, REPLACED)) or is_giving_way(_names_in(path))


def advice_on_absent(path: str) -> str | None:
    """Return what to do where there is nothing at a path."""
    parent, name = os.path.split(path.rstrip(os.sep))
    if not os.path.isdir(parent):
        return f"the folder {parent!r} does not exist either"
    names = _names_in(parent)
    for aside in _staged(names, name, REPLACED):
        return f"a save was interrupted while it replaced it: `varstore clean {parent}` gives {aside!r} its name back"
    for staged in _staged(names, name, SAVING):
        return f"{staged!r} beside it is of a save that runs or was interrupted: `varstore clean {parent}` removes it"
    near = [os.path.join(parent, other) for other in nearest(name, names)]
    checkpoints = [repr(other) for other in near if os.path.lexists(os.path.join(other, MARKER))]
    return f"did you mean {' or '.join(checkpoints)}?" if checkpoints else None


def advice_on_incomplete(path: str) -> str | None:
    """Return what to do with a directory that does not have a marker."""
    walked = [(folder, files) for folder, _, files in itertools.islice(os.walk(path), _FOLDERS)]
    for folder, files in walked:
        if MARKER in files and folder != path:
            return f"it is a folder of checkpoints: open one of them, such as {folder!r}"
    names = _names_in(path)
    if not FOREIGN_NAMES.isdisjoint(names) or any(name.endswith(_FOREIGN_SUFFIXES) for name in names):
        return "another system wrote it: varstore.read opens it"
    if any("out" in files or MANIFEST in files for _, files in walked):
        return "`varstore salvage` makes a checkpoint of what is whole, and allow_incomplete=True opens it"
    return "check the path: no variable was found in it"


def _staged(names: Iterable[str], target: str, infix: str) -> list[str]:
    """Return those of the names that a save to a target gave to folders beside it."""
    matches = filter(None, map(STAGED.fullmatch, names))
    return [match[0] for match in matches if match["target"] == target and match["infix"] == infix]


def _names_in(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _SIBLINGS))
    except OSError:
        return []
