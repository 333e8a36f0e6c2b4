"""Read and write varstore's own checkpoint directories like any other format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.variable import Variable
from varstore.errors import FormatError, VarstoreError
from varstore.formats.state.flat import flat_leaves
from varstore.model.options import SaveOptions
from varstore.model.store import save
from varstore.text.hints import listed
from varstore.training.series import Series, check_files, prefixes_in
from varstore.training.state import load_state
from varstore.training.tensors import PARAMETER, TENSOR, Framework, Leaf, MapLocation, strides_of
from varstore.training.tree import Flat, flatten, unflatten
from varstore.values.arguments import checked
from varstore.values.lazy import LazyArray, Place
from varstore.values.select import Patterns, Rename

__all__ = ["OpenedCheckpoint", "Parts", "nested", "parts_of", "read", "step_in", "write"]

_SHOWN = 5


class OpenedCheckpoint(Checkpoint):
    """A checkpoint with what every opened file has: `format`, `state` and `lazy`."""

    format = "varstore"

    def lazy(self, name: str) -> Variable:
        """Return one variable, as ``[]`` does.

        Raises:
            VariableNotFound: there is no variable of this name.
        """
        return self[name]

    def lazy_state(self) -> Any:
        """Return the nested state that was saved, with lazy arrays at its leaves; None for plain variables.

        Raises:
            ManifestError: the tree in the manifest does not match the variables.
        """
        return nested(self)

    @checked
    def state(
        self,
        *,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        rename: Rename | None = None,
        framework: Framework | None = None,
        map_location: MapLocation = None,
    ) -> Any:
        """Read everything: the nested state that was saved, or a dict of arrays; see `varstore.load_state`."""
        return load_state(
            self, include=include, exclude=exclude, rename=rename, framework=framework, map_location=map_location
        )


def read(path: str, *, limit: int | None = None) -> OpenedCheckpoint:  # noqa: ARG001
    """Open a checkpoint directory, see `varstore.open`, or the latest step in the directory of a `CheckpointManager`.

    The files have the size of their values, without a limit.
    """
    opened = open_checkpoint(step_in(path))
    return OpenedCheckpoint(opened.location, opened.content)


def step_in(path: str) -> str:
    """Return the latest whole step in the directory of a run, or the path itself if it is not one.

    Raises:
        FormatError: there are the steps of several runs, whose names begin differently.
    """
    found: dict[str, str] = {}
    for prefix in prefixes_in(path):  # each of which lists the directory again
        for member in reversed(Series(path, prefix).members()):
            with contextlib.suppress(VarstoreError):  # passed over, as by CheckpointManager.latest
                check_files(member.saved)
                found[prefix] = member.saved.path
                break
    if len(found) > 1:
        raise FormatError(
            "there are the steps of several runs in this directory",
            path=path,
            found=listed(sorted(map(os.path.basename, found.values())), _SHOWN),
            hint="open one of them",
        )
    return next(iter(found.values()), path)


def nested(checkpoint: Checkpoint) -> Any:
    """Return the state that `varstore.save_state` saved, with lazy arrays as leaves; None for plain variables.

    Raises:
        ManifestError: the tree in the manifest does not match the variables.
    """
    if checkpoint.tree is None:
        return None
    return unflatten(checkpoint.tree, lambda leaf: _lazy(checkpoint, leaf), path=checkpoint.path)


def write(path: str, state: Any, **options: Unpack[SaveOptions]) -> None:
    """Write names and arrays as a checkpoint directory, and nested state like `varstore.save_state`.

    The attributes of an array, such as the scale of quantised values, become those of the variable.

    Raises:
        CheckpointExists, InvalidName, UnsupportedDtype, UsageError, StorageError: see `varstore.save`.
    """
    parts = parts_of(state)
    if parts.tree:
        options.setdefault("tree", parts.tree)
    if parts.variable_attributes:
        options.setdefault("variable_attributes", parts.variable_attributes)
    save(path, parts.variables, **options)


class Parts(NamedTuple):
    """What `varstore.save` takes of a state, and the names of what it does not."""

    variables: Mapping[str, Any]
    tree: str
    variable_attributes: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...] = ()


def parts_of(state: Any) -> Parts:
    """Return names and arrays as they are, and nested state as `varstore.save_state` saves it.

    Raises:
        InvalidName, UnsupportedDtype, UsageError: see `varstore.save_state`.
    """
    if isinstance(state, Checkpoint) or _is_flat(state):
        flat = Flat(variables=state if isinstance(state, Checkpoint) else flat_leaves(state), tree="")
    else:
        flat = flatten(state)
    leaves = flat.variables.items()
    said = {name: _plain(leaf) for name, leaf in leaves if isinstance(leaf, LazyArray) and leaf.attributes}
    return Parts(flat.variables, flat.tree, said, flat.left_out)


def _lazy(checkpoint: Checkpoint, leaf: Leaf) -> LazyArray:
    variable = checkpoint[leaf.name]
    entry = variable.entry
    array = LazyArray(
        variable.shape,
        variable.dtype,
        variable.numpy,
        variable.attributes,
        part=lambda index, _: variable[index],
        identity=("variable", entry.alias_of or variable.name, entry.meta),
        name=variable.name,
        type=leaf.type,
        requires_grad=leaf.requires_grad,
    )
    if leaf.type in (TENSOR, PARAMETER):
        owner, offset, strides = leaf.view or (leaf.name, 0, strides_of(variable.shape))
        if len(strides) == len(variable.shape) and min((offset, *strides)) >= 0 and owner in checkpoint:
            memory = checkpoint.path, checkpoint[owner].entry.alias_of or owner, variable.dtype.str
            array.place = Place(memory, offset, strides)
    return array


def _is_flat(state: Any) -> bool:
    """Return whether state is a mapping of names to arrays, with nothing else in it that a tree has to say."""
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and hasattr(value, "dtype") and not (isinstance(value, LazyArray) and value.type)
        for name, value in state.items()
    )


def _plain(array: LazyArray) -> dict[str, Any]:
    """Return the attributes of an array, with arrays among them as lists."""
    said = array.attributes.items()
    return {key: value.tolist() if isinstance(value, LazyArray) else value for key, value in said}
