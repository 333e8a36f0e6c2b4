"""One variable of a checkpoint: its shape and type are known, its values stay on disk until asked for."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from varstore.disk.read import parts as rows
from varstore.disk.read.checks import check_files, check_readable, check_size, known_meta
from varstore.disk.read.whole import read_values
from varstore.layout.dtypes import data_type_of, dtype_of
from varstore.layout.manifest import Entry
from varstore.layout.meta import Meta
from varstore.storage import syscalls
from varstore.storage.beneath import Root, open_root, opened_file
from varstore.storage.failures import translated
from varstore.values.arrays import Stored

__all__ = ["Variable"]


class Variable(Stored):
    """A variable on disk: `numpy` and ``np.asarray`` read all of it, ``[]`` only what the index asks for.

    Given to `save` it is linked, not copied. Whole reads check the digest; slices do not.
    """

    __slots__ = ("_root", "entry")

    def __init__(self, root: str, entry: Entry) -> None:
        self._root = root
        self.entry = entry

    @property
    def root(self) -> str:
        """The directory of the checkpoint."""
        return self._root

    @property
    def checkpoint(self) -> Hashable:
        """Equal for variables of one checkpoint, and different for those of a later one at the same path."""
        return (self._root, self._root.identity if isinstance(self._root, Root) else None)

    @property
    def name(self) -> str:
        """The name under which it was saved."""
        return self.entry.name

    @property
    def path(self) -> str:
        """The folder that holds ``out`` and ``meta``."""
        return os.path.join(self._root, self.entry.folder)

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
        return known_meta(self._root, self.entry)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return self.meta.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of the values.

        Raises:
            UnsupportedDtype: one of OneFlow's types that numpy has not.
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
    def digests(self) -> tuple[str, ...]:
        """xxh3-128 of each 16 MiB block of ``out`` in hex; of one block, what ``xxhsum -H2`` prints."""
        whole = self.entry.digests
        return tuple(whole[start : start + 16].hex() for start in range(0, len(whole), 16))

    def numpy(self, mmap: bool = False) -> np.ndarray:
        """Read all values into a new array, or map them read-only with ``mmap=True``, unchecked.

        Raises:
            DigestMismatch: the bytes are not those that were saved.
            SizeMismatch: ``out`` is longer or shorter than shape and type say.
        """
        return self._map() if mmap else read_values(self._root, self.entry, self.dtype)

    def known_as(self, shape: tuple[int, ...], dtype: Any) -> Variable:
        """Return this variable with the shape and type that its missing ``meta`` would say."""
        meta = Meta(shape=tuple(shape), data_type=data_type_of(np.dtype(dtype), variable=self.name))
        entry = Entry(name=self.name, folder=self.entry.folder, meta=meta, nbytes=self.entry.nbytes)
        return Variable(self._root, entry)

    def check_files(self) -> None:
        """Check that the files are there and of the size that shape and type say; values are not read.

        Raises:
            FormatError: they are not.
        """
        check_readable(self._root, self.entry)
        check_files([(self._root, self.entry)])

    def _map(self) -> np.ndarray:
        check_readable(self._root, self.entry)
        stored = self.entry.stored_dtype
        if stored != self.dtype or self.nbytes == 0:
            return self.numpy()
        relative = f"{self.entry.folder}/out"
        with (
            translated(self._root, "mapping failed"),
            open_root(self._root) as root_fd,
            opened_file(root_fd, relative, root=self._root, variable=self.name) as (fd, size),
        ):
            check_size(self._root, self.entry, size)
            mapped = syscalls.map_file(fd, size)
        return np.frombuffer(mapped, self.dtype).reshape(self.shape)

    def __getitem__(self, index: Any) -> Any:
        return rows.read_index(self._root, self.entry, self.dtype, index)

    def __repr__(self) -> str:
        return f"<Variable {self.name!r}: {self.entry.form}, {self.entry.nbytes:,} bytes in {self.path!r}>"
