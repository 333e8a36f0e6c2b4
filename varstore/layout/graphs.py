"""Graphs among the attached files: the variables that each uses, and the check that a checkpoint has them.

The attributes of a graph's entry say how it is called (``entry``), in which format it is (``format``), what it takes
and gives (``inputs``, ``outputs``), and which variables it uses (``bindings``): for each name in the graph, the
``variable``, its ``type`` and its ``shape``. A binding with a ``digest`` is of a value that the graph has in itself,
a copy of the variable; one that is ``own`` is of a variable that exists for this graph only. ``folded`` has the digests
of the variables that an exporter computed other values from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from varstore.errors import ManifestError, VariableMismatch, VariableNotFound
from varstore.layout.attached import FileEntry
from varstore.layout.meta import Meta

__all__ = ["GRAPH", "Binding", "bindings_of", "check_bound", "check_copies", "check_folded", "uses"]

GRAPH = "graph"
"""The kind of a file that is a graph."""


class Binding(NamedTuple):
    """What a graph uses: `digest`, in hex, is that of its own copy of the variable, empty if it has none."""

    variable: str
    type: str
    shape: tuple[int, ...]
    digest: str = ""
    own: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return what `bindings_of` reads."""
        said: dict[str, Any] = {"variable": self.variable, "type": self.type, "shape": list(self.shape)}
        optional = {"digest": self.digest, "own": self.own}
        return {**said, **{name: value for name, value in optional.items() if value}}


def bindings_of(file: FileEntry) -> dict[str, Binding]:
    """Return what a graph uses, by its names in the graph; nothing for a file that is not a graph.

    Raises:
        ManifestError: the attributes do not say it as `Binding.as_json` does.
    """
    if file.kind != GRAPH:
        return {}
    said = file.attributes.get("bindings", {})
    try:
        return {
            str(name): Binding(
                str(one["variable"]),
                str(one["type"]),
                tuple(one["shape"]),
                str(one.get("digest", "")),
                bool(one.get("own")),
            )
            for name, one in said.items()
        }
    except (AttributeError, LookupError, TypeError) as error:
        raise ManifestError("the bindings of a graph cannot be read", path=file.name, found=str(error)) from error


def uses(file: FileEntry) -> set[str]:
    """Return the variables whose files a graph needs."""
    return {binding.variable for binding in bindings_of(file).values() if not binding.digest}


def check_bound(files: Iterable[FileEntry], metas: Mapping[str, Meta]) -> None:
    """Check that all variables that graphs use are there, with the shapes and types that the graphs expect.

    Raises:
        VariableNotFound: a variable is not there.
        VariableMismatch: one has another shape or type.
    """
    for file in files:
        for binding in bindings_of(file).values():
            meta = metas.get(binding.variable)
            if meta is None and binding.digest:
                continue
            if meta is None:
                raise VariableNotFound(
                    "a graph uses this variable, which is not saved with it",
                    path=file.name,
                    variable=binding.variable,
                    hint="save the variable too, or leave out the graph",
                )
            dtype = meta.data_type.dtype
            found = "" if dtype is None else dtype.name
            if meta.shape != binding.shape or found != binding.type:
                raise VariableMismatch(
                    "a graph uses this variable with another shape or type",
                    path=file.name,
                    variable=binding.variable,
                    found=f"{found} {list(meta.shape)}",
                    expected=f"{binding.type} {list(binding.shape)}",
                    hint="export the graph again, and save both with vs.bundle",
                )


def check_copies(files: Iterable[FileEntry], digests: Mapping[str, bytes]) -> None:
    """Check that what graphs have in themselves of variables is of those that are saved.

    Raises:
        VariableMismatch: a copy of a variable, or what was computed from one, is of other values.
    """
    for file in files:
        for binding in bindings_of(file).values():
            digest = digests.get(binding.variable)
            if binding.digest and digest is not None and digest.hex() != binding.digest:
                raise VariableMismatch(
                    "the graph has other values of this variable in itself",
                    path=file.name,
                    variable=binding.variable,
                    hint="pass the checkpoint to vs.bundle as graphs=, or to CheckpointManager.save as graphs_from=",
                )
        check_folded(file, digests)


def check_folded(file: FileEntry, digests: Mapping[str, bytes]) -> None:
    """Check that the variables that values of a graph were computed from are as they were.

    Raises:
        VariableMismatch: one has other values.
    """
    folded = file.attributes.get("folded", {}) if file.kind == GRAPH else {}
    for variable, digest in folded.items() if isinstance(folded, Mapping) else ():
        if variable in digests and digests[variable].hex() != digest:
            raise VariableMismatch(
                "the graph has values that were computed from this variable, whose values are now others",
                path=file.name,
                variable=variable,
                hint="export the graph again, without optimization, and save both with vs.bundle",
            )
