"""The variables that a bundle gets, by the names that its graphs have for them, and what each graph does with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from varstore.disk.blocks import digest_block, spans
from varstore.disk.read.attached import AttachedFile
from varstore.errors import VariableMismatch
from varstore.formats.binary.packing import bits_of, pack
from varstore.layout.dtypes import data_type_of
from varstore.layout.graphs import GRAPH, Binding, bindings_of, check_bound
from varstore.layout.meta import Meta
from varstore.text.hints import listed, shortened
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.attached import GivenFile
from varstore.values.lazy import LazyArray
from varstore.values.select import Rename, select

__all__ = ["Bound", "Known", "OnDifference", "Prepared", "digest_of", "mismatch"]

OnDifference = Literal["error", "inline", "add"]
"""What becomes of a value in a graph that is not that of the variable of its name."""
_SHOWN = 10


class Prepared(NamedTuple):
    """A graph to save: its file, the variables that it uses, and variables of its own that are saved with it.

    `folded` has the digests, in hex, of variables that the graph has other values of. `beside` are other files that
    belong to it, by name.
    """

    name: str
    content: bytes | str
    about: dict[str, Any]
    bindings: dict[str, Binding]
    added: dict[str, Any]
    folded: dict[str, str]
    beside: Mapping[str, str] = MappingProxyType({})

    def file(self) -> GivenFile:
        """Return what is attached."""
        bindings = {name: binding.as_json() for name, binding in self.bindings.items()}
        folded = {"folded": self.folded} if self.folded else {}
        return GivenFile(self.content, GRAPH, {**self.about, "bindings": bindings, **folded})


class Bound(NamedTuple):
    """What a graph uses of variables, and the variables that it brings; `folded` as for `Prepared`."""

    bindings: dict[str, Binding]
    added: dict[str, Any]
    folded: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Variables by name; `names` has the name of each, by that which graphs have for it."""

    variables: Mapping[str, Any]
    names: dict[str, str]
    own: frozenset[str] = frozenset()
    """Names of variables that graphs brought with them."""
    _sources: dict[str, Source] = field(default_factory=dict)

    @classmethod
    def of(cls, variables: Mapping[str, Any], rename: Rename | None) -> Known:
        """Take variables, and what renames them to what graphs call them.

        Raises:
            VariableMismatch, UsageError: see `select`.
        """
        return cls(variables=variables, names=select(variables, rename=rename))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def source(self, name: str) -> Source:
        """Return a variable by its name in a graph."""
        own = self.names[name]
        if own not in self._sources:
            self._sources[own] = as_source(self.variables[own], own)
        return self._sources[own]

    def binding(self, name: str, *, is_copied: bool) -> Binding:
        """Return how a graph uses a variable."""
        source = self.source(name)
        digest = self.digest(name).hex() if is_copied else ""
        return Binding(self.names[name], source.dtype.name, tuple(source.shape), digest)

    def bound(
        self,
        entry: str,
        arrays: Mapping[str, LazyArray],
        on_difference: OnDifference,
        *,
        path: str | None,
        hint: str,
        can_leave: Callable[[LazyArray], bool] = lambda _: True,
    ) -> Bound:
        """Bind the values of a graph to the variables of their names; those that cannot leave it are copies.

        Raises:
            VariableMismatch: a value is not the variable of its name, and `on_difference` is "error".
        """
        found = {key: self.difference(key, array) for key, array in arrays.items() if key in self}
        differing = {key: what for key, what in found.items() if what}
        if differing and on_difference == "error":
            raise mismatch(path, entry, differing, hint)
        bindings: dict[str, Binding] = {}
        added: dict[str, Any] = {}
        for key in found:
            array, leaves = arrays[key], can_leave(arrays[key])
            if key not in differing:
                bindings[key] = self.binding(key, is_copied=not leaves)
            elif on_difference == "add" and leaves:
                added[f"{entry}/{key}"] = array
                bindings[key] = Binding(f"{entry}/{key}", array.dtype.name, array.shape, own=True)
        return Bound(bindings, added, {self.names[key]: self.digest(key).hex() for key in differing})

    def check(self, file: AttachedFile) -> None:
        """Check that the variables that a graph uses are among these, and have the shapes and types that it expects.

        Raises:
            VariableNotFound, VariableMismatch: one does not; see `check_bound`.
        """
        used = {binding.variable for binding in bindings_of(file.entry).values()}
        sources = {name: self.source(name) for name in used if name in self}
        metas = {
            name: Meta(shape=tuple(source.shape), data_type=data_type_of(source.dtype, variable=name))
            for name, source in sources.items()
        }
        check_bound([file.entry], metas)

    def also(self, others: Mapping[str, str]) -> Known:
        """Return these variables with further names of theirs: names of variables by names in a graph."""
        more = {name: own for name, own in others.items() if name not in self.names and own in self.variables}
        return replace(self, names={**self.names, **more})

    def with_added(self, added: Mapping[str, Any]) -> Known:
        """Return these variables with those that a graph brings with it."""
        names = {**self.names, **{name: name for name in added}}
        return replace(self, variables={**self.variables, **added}, names=names, own=self.own | added.keys())

    def form_difference(self, name: str, array: LazyArray) -> str:
        """Return how shape or type of what a graph expects differ from the variable's, empty if they do not."""
        source = self.source(name)
        shape, dtype = tuple(source.shape), source.dtype.newbyteorder("=")
        if (shape, dtype) == (array.shape, array.dtype):
            return ""
        return f"{array.dtype} {list(array.shape)} in the graph, {dtype} {list(shape)} in the variables"

    def difference(self, name: str, array: LazyArray) -> str:
        """Return how the values of a graph differ from the variable of their name, empty if they do not."""
        if form := self.form_difference(name, array):
            return form
        values, dtype = array.numpy(), array.dtype
        if digest_of(values) == self.digest(name):
            return ""
        is_narrow = bits_of(dtype) < 8 * dtype.itemsize  # whose unused bits say nothing
        return "" if is_narrow and np.array_equal(pack(values), pack(self.values(name))) else "other values"

    def digest(self, name: str) -> bytes:
        """Return the digests of a variable's ``out``, by its name in a graph."""
        source = self.source(name)
        known = source.entry.value_digests if isinstance(source, Stored) else b""
        return known or digest_of(self.values(name))

    def values(self, name: str) -> np.ndarray:
        """Return the values of a variable, by its name in a graph."""
        source = self.source(name)
        return source if isinstance(source, np.ndarray) else source.numpy()


def digest_of(values: np.ndarray) -> bytes:
    """Return the digests of the blocks that values have as an ``out``."""
    return b"".join(digest_block(values, start, stop) for start, stop in spans(values.nbytes))


def mismatch(path: str | None, entry: str, differences: Mapping[str, str], hint: str) -> VariableMismatch:
    """Return the error for values of a graph that are not those of the variables."""
    rows = [f"{name}: {what}" for name, what in differences.items()]
    return VariableMismatch(
        f"the graph has other values than the variables: {listed(list(map(repr, differences)), 3)}",
        rows=shortened(rows, _SHOWN),
        path=path,
        field=f"graphs[{entry!r}]",
        hint=hint,
    )
