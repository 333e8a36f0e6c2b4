"""The result of reading another system's file: a lazy mapping of its tensors, and its nested state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from varstore.errors import VariableNotFound
from varstore.formats.binary.budget import Budget
from varstore.text.hints import nearest, plural
from varstore.text.table import Table
from varstore.training.chosen import choose
from varstore.training.tensors import (
    PARAMETER,
    TENSOR,
    Framework,
    Leaf,
    MapLocation,
    as_saved,
    find_views,
    locate,
    to_torch,
    view_of,
    wanted,
)
from varstore.values.arguments import checked, described
from varstore.values.lazy import LazyArray
from varstore.values.nodes import Names, leaves, replaced
from varstore.values.opaque import Opaque, inner_leaves, replaced_inside
from varstore.values.select import Patterns, Rename, select

__all__ = ["ForeignCheckpoint", "LazyTable", "Origin", "read_state", "views_in"]

Record = TypeVar("Record")
Unknown = tuple[tuple[str, str, int], ...]

_HTML_ROWS = 50
_NAME = 150
"""The bytes of memory that a name takes beside its text."""


class LazyTable(Mapping[str, LazyArray]):
    """Arrays by name, each made when it is asked for: a record costs a tenth of the array that is made of it.

    Names that share one record object share one array, so that tied tensors stay tied.
    """

    def __init__(self, records: Mapping[str, Record], make: Callable[[str, Record], LazyArray]) -> None:
        self._records = records
        self._make = make
        self._made: dict[int, LazyArray] = {}

    def __getitem__(self, name: str) -> LazyArray:
        record = self._records[name]
        if (array := self._made.get(id(record))) is None:
            array = self._made.setdefault(id(record), self._make(name, record))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records


class Origin:
    """What opens a file again in another process, when something of it is used there."""

    __slots__ = ("_checkpoint", "reopen")

    def __init__(self, reopen: Callable[[], ForeignCheckpoint] | None = None) -> None:
        self.reopen = reopen
        self._checkpoint: ForeignCheckpoint | None = None

    def __reduce__(self) -> tuple[type[Origin], tuple[Callable[[], ForeignCheckpoint]]]:
        if self.reopen is None:
            raise TypeError("only what varstore.read returned can be pickled")
        return Origin, (self.reopen,)

    def checkpoint(self) -> ForeignCheckpoint:
        """Return the file, opened once."""
        if self._checkpoint is None:
            assert self.reopen is not None
            self._checkpoint = self.reopen()
        return self._checkpoint

    def __call__(self, name: str) -> LazyArray:
        """Return one tensor of the file."""
        return self.checkpoint()[name]


class ForeignCheckpoint(Mapping[str, LazyArray]):
    """The tensors in another system's file: a lazy mapping of names to arrays.

    Names are the keys and indices that lead to a tensor, joined by ``/``; if two tensors get one name so, the second
    is called ``name~2``, as `varstore.save_state` does. ``[]`` returns a `LazyArray`, which reads
    its values when they are used. `state` reads the whole nested object, with its scalars; `attributes` is the metadata
    of the file. It can be pickled: another process on this machine reads the same file, or is told that the file was
    replaced.

    `unknown` lists the names in a pickle that varstore does not know, as (module, name, how often). They are not
    imported; what they stand for is an `Opaque` leaf of the state.

    The names and values of the arrays are paid for from `budget`: the values once per name, because other formats
    store them so.
    """

    def __init__(
        self,
        path: str,
        format: str,
        tree: Any,
        attributes: Mapping[str, Any] | None = None,
        *,
        budget: Budget,
        unknown: Unknown = (),
    ) -> None:
        self.path = path
        self.format = format
        self.attributes = dict(attributes or {})
        self.origin = Origin()
        self._tree = tree
        self._absent_chunks: Mapping[str, int] = budget.absent_chunks
        self._unknown = unknown
        is_table = isinstance(tree, LazyTable)
        self._table: Mapping[str, LazyArray] | None = tree if is_table else self._named(tree, budget)

    def _named(self, tree: Any, budget: Budget) -> dict[str, LazyArray]:
        arrays: dict[str, LazyArray] = {}
        names = Names()
        inside: set[int] = set()
        for name, array in leaves(tree):
            budget.charge(_NAME + sys.getsizeof(name), variable=name)
            if isinstance(array, Opaque):
                for leaf in inner_leaves(array, inside):
                    _announce(leaf, name, budget)
            if not isinstance(array, LazyArray):
                continue
            _announce(array, name, budget)
            arrays[names.own(name)] = array
        return arrays

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __reduce__(self) -> tuple[Callable[..., ForeignCheckpoint], tuple[Any, ...]]:
        return _unopened, (self.path, self.format, self.attributes, self.origin)

    def __copy__(self) -> ForeignCheckpoint:
        return self

    def __deepcopy__(self, memo: object) -> ForeignCheckpoint:
        return self  # nothing in it changes

    @property
    def _arrays(self) -> Mapping[str, LazyArray]:
        if self._table is None:  # made by pickle
            opened = self.origin.checkpoint()
            self._table, self._tree = opened._table, opened._tree
            self._absent_chunks = opened._absent_chunks
            self._unknown = opened._unknown
            assert self._table is not None
        return self._table

    @property
    def absent_chunks(self) -> Mapping[str, int]:
        """How many chunks of an array are not in the file, of each array of Zarr or Orbax that lacks some.

        They are read as the fill value, which is Zarr's rule: it does not write chunks that have no other value. In a
        database of Orbax, those of an array are known once it was read.
        """
        arrays = self._arrays
        return MappingProxyType({name: count for name, count in self._absent_chunks.items() if name in arrays})

    @property
    def unknown(self) -> Unknown:
        """The names in the file that varstore does not know: (module, name, how often)."""
        return self._unknown if self._arrays is not None else ()

    @property
    def tree(self) -> Any:
        """The nested object with lazy arrays at its leaves."""
        if isinstance(self._arrays, LazyTable) and self._tree is self._arrays:
            self._tree = dict(self.items())
        return self._tree

    def __getitem__(self, name: str) -> LazyArray:
        if not isinstance(name, str):
            raise VariableNotFound("a tensor's name is a string", path=self.path, found=described(name))
        try:
            array = self._arrays[name]
        except KeyError:
            near = nearest(name, self._arrays)
            raise VariableNotFound(
                "there is no such tensor in this file",
                path=self.path,
                variable=name,
                hint=f"did you mean {' or '.join(map(repr, near))}?" if near else "`varstore ls` lists the names",
            ) from None
        if array.origin is None:
            array.name, array.origin = name, self.origin
        return array

    def get(self, key: str, default: Any = None) -> Any:
        """Return a tensor or the default, without the search for near names that an error would cost."""
        return self[key] if isinstance(key, str) and key in self._arrays else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._arrays

    def __repr__(self) -> str:
        return f"<{self.format} file {self.path!r}: {plural(len(self), 'tensor')}>"

    def _repr_html_(self) -> str:
        names = list(islice(self, _HTML_ROWS))
        rows = [(name, f"{list(self[name].shape)} {self[name].dtype}", f"{self[name].nbytes:,}") for name in names]
        notes = [f"… and {len(self) - len(rows)} more"] if len(rows) < len(self) else []
        headings = ("tensor", "shape and type", "bytes")
        return Table(title=repr(self)[1:-1], headings=headings, rows=rows, notes=notes).html()

    def lazy(self, name: str) -> LazyArray:
        """Return one tensor, like ``[]``.

        Raises:
            VariableNotFound: the file does not contain a tensor of this name.
        """
        return self[name]

    def select(
        self, *, include: Patterns | None = None, exclude: Patterns | None = None, rename: Rename | None = None
    ) -> dict[str, LazyArray]:
        """Return the chosen tensors by their new names, without reading them; see `varstore.load` for the parameters.

        Raises:
            VariableNotFound: a pattern of `include` does not match a name.
            VariableMismatch: two tensors would get the same name.
        """
        chosen = select(self, include=include, exclude=exclude, rename=rename, path=self.path)
        return {name: self[source] for name, source in chosen.items()}

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
        """Read everything: the nested object that was saved; tied tensors share memory.

        Args:
            include, exclude, rename: what of it to read, and where to put it; see `varstore.load_state`.
            framework: "torch" for tensors, as ``torch.load`` gives them; by default, arrays are numpy's.
            map_location: with "torch", where tensors go; see `varstore.load_state`. Default: the CPU.

        Raises:
            VariableNotFound, VariableMismatch: see `varstore.load`.
            MissingDependency: torch is not installed.
            UsageError: the device is not available, or `framework` is unknown.
        """
        chosen = choose(self.tree, include=include, exclude=exclude, rename=rename, path=self.path)
        return read_state(chosen, framework=framework, map_location=map_location)


def read_state(
    tree: Any,
    *,
    framework: Framework | None = None,
    map_location: MapLocation = None,
    advance: Callable[[int], None] | None = None,
) -> Any:
    """Return nested state with the values of its lazy arrays; see `ForeignCheckpoint.state`.

    Arrays of one memory are read once, and `advance` is called with the bytes of each.
    """
    views = views_in(tree) if framework == "torch" else {}
    read: dict[Hashable, np.ndarray] = {}
    moved: dict[Hashable, Any] = {}
    made: dict[tuple[Hashable, str, bool], Any] = {}
    inside: dict[int, Any] = {}

    def values(leaf: LazyArray) -> np.ndarray:
        if leaf.identity not in read:
            read[leaf.identity] = leaf.numpy()
            if advance:
                advance(leaf.nbytes)
        return read[leaf.identity]

    def tensor(leaf: LazyArray, about: Leaf) -> Any:
        if leaf.identity not in moved:
            if leaf.identity in views:
                owner, offset, strides = views[leaf.identity]
                within = replace(about, view=(owner.name, offset, strides))
                moved[leaf.identity] = view_of(tensor(owner, about), within, leaf.shape)
            else:
                moved[leaf.identity] = to_torch(values(leaf), about, locate(about, map_location))
        return moved[leaf.identity]

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Opaque):
            return replaced_inside(leaf, value, inside)
        if not isinstance(leaf, LazyArray):
            return leaf
        about = wanted(Leaf(name=leaf.name, type=leaf.type, requires_grad=leaf.requires_grad), framework or "numpy")
        if about.type not in (TENSOR, PARAMETER):
            return values(leaf)
        tensor(leaf, about)
        memory = leaf.identity
        return made.setdefault((memory, about.type, about.requires_grad), as_saved(moved[memory], about))

    return replaced(tree, value)


def _announce(leaf: Any, name: str, budget: Budget) -> None:
    """Pay for the values of an array and of the arrays that are its attributes."""
    if isinstance(leaf, LazyArray):
        for part in (leaf, *leaf.attributes.values()):
            if isinstance(part, LazyArray) and not part.dtype.hasobject:  # reading it raises
                budget.announce(part.nbytes, variable=name)


def views_in(tree: Any) -> dict[Hashable, tuple[LazyArray, int, tuple[int, ...]]]:
    """Return, by identity, what lies within another tensor of nested state: that one, and offset and strides in it."""
    first: dict[Hashable, tuple[str, LazyArray]] = {}
    for name, leaf in leaves(tree):
        if isinstance(leaf, LazyArray):
            first.setdefault(leaf.identity, (name, leaf))
    arrays = dict(first.values())
    found = find_views(arrays)
    return {arrays[name].identity: (arrays[owner], offset, steps) for name, (owner, offset, steps) in found.items()}


def _unopened(path: str, format: str, attributes: Mapping[str, Any], origin: Origin) -> ForeignCheckpoint:
    checkpoint = ForeignCheckpoint(path, format, {}, attributes, budget=Budget(path, 0))
    checkpoint.origin, checkpoint._table = origin, None
    return checkpoint
