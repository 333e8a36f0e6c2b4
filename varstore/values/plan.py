"""Plan a save: determine every folder, size and link, and refuse what cannot be saved, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from varstore.errors import UsageError
from varstore.layout.collector import collector_paused
from varstore.layout.dtypes import data_type_of
from varstore.layout.encodings import RAW
from varstore.layout.manifest import NO_ATTRIBUTES, Entry, kept_attributes
from varstore.layout.meta import Meta
from varstore.layout.names import Folder, folder_of
from varstore.layout.readable import readable
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.lazy import LazyArray

__all__ = ["PlannedVariable", "SavePlan", "plan_save"]

_meta = lru_cache(maxsize=4096)(Meta)


class PlannedVariable(NamedTuple):
    """One variable to save: `nbytes` of ``out`` from `source`, or a link to the ``out`` of `alias_of`."""

    name: str
    folder: Folder
    meta: Meta
    nbytes: int
    source: Source
    attributes: Mapping[str, Any]
    alias_of: str = ""

    @property
    def is_linked(self) -> bool:
        """Whether ``out`` is a link to a file of another variable, in this checkpoint or in another one."""
        return bool(self.alias_of) or isinstance(self.source, Stored)

    def entry(self, digests: bytes) -> Entry:
        """Return the entry for the manifest, once the digests are known."""
        name, folder, meta, nbytes, _, attributes, alias_of = self
        return Entry(name, folder, meta, nbytes, digests, RAW.name, attributes, alias_of, witnessed=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePlan:
    """A complete save; `parents` are the folders that contain other folders, outermost first."""

    variables: tuple[PlannedVariable, ...]
    parents: tuple[str, ...]
    attributes: Mapping[str, Any]
    tree: str

    @property
    def written(self) -> list[PlannedVariable]:
        """The variables whose ``out`` is to be written, not linked."""
        return [variable for variable in self.variables if not variable.is_linked]

    @property
    def nbytes(self) -> int:
        """The number of bytes of values to write, links not included."""
        return sum(variable.nbytes for variable in self.written)


def plan_save(
    variables: Mapping[str, Any],
    *,
    attributes: Mapping[str, Any] | None = None,
    variable_attributes: Mapping[str, Mapping[str, Any]] | None = None,
    tree: str = "",
) -> SavePlan:
    """Return the plan for saving these variables.

    Raises:
        InvalidName: a name cannot be a folder; see `folder_of`.
        UnsupportedDtype: the format cannot store a type; see `data_type_of`.
        UsageError: `variables` is not a mapping of names to arrays, attributes are not JSON, or `variable_attributes`
            has names that are not in `variables`.
    """
    if not isinstance(variables, Mapping):
        raise UsageError(
            "variables must be a mapping of names to arrays",
            found=type(variables).__name__,
            hint="pass a dict, or save nested state with save_state",
        )
    own_attributes = variable_attributes or {}
    if unknown := [name for name in own_attributes if name not in variables]:
        raise UsageError("variable_attributes has names that are not in variables", found=unknown[:5])
    kept = kept_attributes(attributes)
    planned: list[PlannedVariable] = []
    parents: dict[str, None] = {}
    ties: dict[Hashable, str] = {}
    with collector_paused():
        for name, value in variables.items():
            variable = _plan_variable(name, value, own_attributes.get(name), ties)
            planned.append(variable)
            if "/" in variable.folder:
                parents.update(dict.fromkeys(_parents(variable.folder)))
    return SavePlan(variables=tuple(planned), parents=tuple(sorted(parents)), attributes=kept, tree=tree)


def _plan_variable(
    name: str, value: Any, attributes: Mapping[str, Any] | None, ties: dict[Hashable, str]
) -> PlannedVariable:
    folder = folder_of(name)
    if type(name) is not str:  # an enum's member; the manifest keeps its text
        name = str.__str__(name)
    source = as_source(value, variable=name)
    identity = _identity(source)
    kept = NO_ATTRIBUTES if attributes is None else kept_attributes(attributes, variable=name)
    if isinstance(source, np.ndarray):
        shape = source.shape
    elif isinstance(source, Stored):
        kept = source.entry.attributes if attributes is None else kept
        shape, source = _stored_source(source)
    else:
        shape = source.shape
    dtype = source.dtype
    meta = _meta(shape, data_type_of(dtype, variable=name))
    first = name if identity is None else ties.setdefault(identity, name)
    return PlannedVariable(
        name,
        folder,
        meta,
        math.prod(shape) * dtype.itemsize,
        source,
        kept,
        "" if first == name else first,
    )


def _stored_source(stored: Stored) -> tuple[tuple[int, ...], Stored | LazyArray]:
    """Return the shape, and the variable itself if its file can be linked, else a source that reads its values."""
    if stored.entry.meta is None:
        raise UsageError(
            "the variable does not have a meta file, so its shape and data type are unknown",
            path=stored.location.path,
            variable=stored.entry.name,
            hint="load it with load_variables or load_into, whose targets have a shape and type, and save those",
        )
    variable = readable(stored.entry, path=stored.location.path)
    if variable.encoding.is_plain and variable.stored == variable.dtype:
        return variable.shape, stored
    return variable.shape, LazyArray(variable.shape, variable.dtype, stored.numpy)


def _identity(source: Source) -> Hashable | None:
    """Return a key that is equal for tied values, or None for a value that cannot be tied."""
    if isinstance(source, np.ndarray):
        return _memory_key(source) if source.size else None
    if isinstance(source, Stored):
        entry = source.entry
        return (source.location, entry.alias_of or entry.name, entry.meta)
    return source.identity if source.nbytes else None


def _memory_key(array: np.ndarray) -> Hashable:
    """Return a key that is equal for arrays that are the same view of the same memory."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)


def _parents(folder: Folder) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
