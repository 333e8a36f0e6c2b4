"""varstore's own checkpoint directories, under the two verbs that every format has."""

from __future__ import annotations

from typing import Any

from varstore.disk.reader import Checkpoint, open_checkpoint
from varstore.formats.flat import flat_leaves
from varstore.formats.foreign import LazyArray
from varstore.model.store import save

__all__ = ["read", "write"]


def read(path: str) -> Checkpoint:
    """Open a checkpoint directory; see `varstore.open`."""
    return open_checkpoint(path)


def write(path: str, state: Any, **options: Any) -> None:
    """Save names and arrays, or nested state of them, as a checkpoint directory; see `varstore.save`.

    What a file said of one array, such as the scale of quantised values, becomes the variable's attributes.
    """
    leaves = state if isinstance(state, Checkpoint) else flat_leaves(state)
    said = {name: _plain(leaf) for name, leaf in leaves.items() if isinstance(leaf, LazyArray) and leaf.attributes}
    save(path, leaves, **{"variable_attributes": said or None, **options})


def _plain(array: LazyArray) -> dict[str, Any]:
    """Return what is said of an array, with lists in the place of arrays."""
    said = array.attributes.items()
    return {key: value.read().tolist() if isinstance(value, LazyArray) else value for key, value in said}
