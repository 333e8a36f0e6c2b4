"""One variable of a checkpoint: its shape and type are known, its values stay on disk until asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from varstore.disk.read.checks import check_files
from varstore.disk.read.parts import read_index
from varstore.disk.read.whole import map_values, read_values
from varstore.layout.digests import in_hex
from varstore.layout.dtypes import data_type_of, dtype_of
from varstore.layout.location import Location
from varstore.layout.manifest import Entry, known_meta
from varstore.layout.meta import Meta
from varstore.layout.readable import readable
from varstore.text.hints import plural
from varstore.values.arguments import checked
from varstore.values.arrays import Stored

__all__ = ["Variable"]


class Variable(Stored):
    """A variable on disk: `numpy` and ``np.asarray`` read all of it, ``[]`` only what the index asks for.

    `save` links it instead of copying it. Reading all of it checks the digests; a slice does not, except of a packed
    variable of at most 2 MiB, and of what several processes wrote: there, the regions inside the slice are checked. A
    variable can be pickled: another process on this machine reads the same values, or is told that the checkpoint was
    replaced.

    Example:
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.arange(12.0).reshape(3, 4)})
        >>> weight = checkpoint["fc/weight"]
        >>> weight.shape, weight.dtype.name, weight.nbytes
        ((3, 4), 'float64', 96)
        >>> weight[1, 2:]  # reads 16 bytes
        array([6., 7.])
        >>> float(weight.mean())  # reads all
        5.5
    """

    __slots__ = ("entry", "location")

    def __init__(self, location: Location, entry: Entry) -> None:
        self.location = location
        self.entry = entry

    def __reduce__(self) -> tuple[type[Variable], tuple[Location, Entry]]:
        return Variable, (self.location, self.entry)

    def __copy__(self) -> Variable:
        return self

    def __deepcopy__(self, memo: object) -> Variable:
        return self  # nothing in it changes

    @property
    def root(self) -> str:
        """The directory of the checkpoint."""
        return self.location.path

    @property
    def name(self) -> str:
        """The name under which it was saved."""
        return self.entry.name

    @property
    def path(self) -> str:
        """The folder that holds ``out`` and ``meta``."""
        return os.path.join(self.location.path, self.entry.folder)

    @property
    def has_meta(self) -> bool:
        """False for a folder without ``meta``, as OneFlow's oldest snapshots have them."""
        return self.entry.meta is not None

    @property
    def meta(self) -> Meta:
        """Shape and data type as stored.

        Raises:
            MetaError: the folder has no ``meta``.
        """
        return known_meta(self.entry, path=self.location.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return self.meta.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the values.

        Raises:
            UnsupportedDtype: numpy does not have this type of OneFlow's.
        """
        row = self.meta.data_type
        if row.dtype is not None:
            return row.dtype
        return dtype_of(row, path=self.path, variable=self.name)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What was saved as this variable's own attributes."""
        return self.entry.attributes

    @property
    def stored_nbytes(self) -> int:
        """The size of ``out`` in bytes; `nbytes` is that of the values, which takes more if it is packed."""
        return self.entry.nbytes

    @property
    def tied_to(self) -> str | None:
        """The name of the variable that it shared memory with when it was saved, and shares ``out`` with; or None."""
        return self.entry.alias_of or None

    @property
    def digests(self) -> tuple[str, ...]:
        """xxh3-128 of each 16 MiB block of ``out`` in hex; of one block, what ``xxhsum -H2`` prints.

        Empty if no digests are known, or those of regions, each of which one of several processes wrote.
        """
        return tuple(in_hex(self.entry.digests))

    @checked
    def numpy(self, mmap: bool = False) -> np.ndarray:
        """Read all values into a new array, or map them read-only with ``mmap=True``, unchecked.

        Raises:
            DigestMismatch: the bytes are not those that were saved.
            SizeMismatch: ``out`` is longer or shorter than shape and type say.
        """
        variable = readable(self.entry, path=self.location.path)
        (values,) = map_values(self.location, [variable]) if mmap else [read_values(self.location, variable)]
        return values

    def known_as(self, shape: tuple[int, ...], dtype: Any) -> Variable:
        """Return this variable with the shape and type that its missing ``meta`` would say."""
        meta = Meta(shape=tuple(shape), data_type=data_type_of(np.dtype(dtype), variable=self.name))
        entry = Entry(name=self.name, folder=self.entry.folder, meta=meta, nbytes=self.entry.nbytes)
        return Variable(self.location, entry)

    def check_files(self) -> None:
        """Check that the files are there and of the size that shape and type say; values are not read.

        Raises:
            FormatError: they are not.
        """
        readable(self.entry, path=self.location.path)
        check_files([(self.location, self.entry)])

    def __getitem__(self, index: Any) -> Any:
        return read_index(self.location, readable(self.entry, path=self.location.path), index)

    def __repr__(self) -> str:
        return f"<Variable {self.name!r}: {self.entry.form}, {plural(self.entry.nbytes, 'byte')} in {self.path!r}>"
