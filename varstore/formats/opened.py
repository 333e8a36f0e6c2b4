"""The result of reading another system's file: a lazy mapping of its tensors, and its nested state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from varstore.errors import FormatError, VariableNotFound
from varstore.formats.nodes import leaves, replaced
from varstore.text.hints import plural
from varstore.values.lazy import LazyArray
from varstore.values.select import Patterns, Rename, select

__all__ = ["ForeignCheckpoint"]

_MOST_TEXT = 1 << 27
"""The maximum number of characters of all names, because long keys of nested containers multiply."""


class ForeignCheckpoint(Mapping[str, LazyArray]):
    """The tensors in another system's file: a lazy mapping of names to arrays.

    Names are the keys and indices that lead to a tensor, joined by ``/``. ``[]`` returns a `LazyArray`, which reads
    its values when they are used. `state` reads the whole nested object, with its scalars; `attributes` is the metadata
    of the file.
    """

    def __init__(self, path: str, format: str, tree: Any, attributes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.format = format
        self.tree = tree
        self.attributes = dict(attributes or {})
        self._arrays: dict[str, LazyArray] = {}
        left = _MOST_TEXT
        for name, array in leaves(tree):
            left -= len(name)
            if left < 0:
                raise FormatError("the names of the tensors are too long", path=path, variable=name[:100])
            if not isinstance(array, LazyArray):
                continue
            if name in self._arrays:
                raise FormatError(
                    "two tensors have the same name when their keys are joined by '/'",
                    path=path,
                    variable=name,
                    hint="rename one of them with the framework that wrote the file",
                )
            self._arrays[name] = array

    def __getitem__(self, name: str) -> LazyArray:
        try:
            return self._arrays[name]
        except KeyError:
            raise VariableNotFound("there is no such tensor in this file", path=self.path, variable=name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __repr__(self) -> str:
        return f"<{self.format} file {self.path!r}: {plural(len(self), 'tensor')}>"

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

    def state(self) -> Any:
        """Read everything: the nested object that was saved, with numpy arrays as leaves; tied tensors share memory."""
        read: dict[int, np.ndarray] = {}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, LazyArray):
                return leaf
            if id(leaf) not in read:
                read[id(leaf)] = leaf.numpy()
            return read[id(leaf)]

        return replaced(self.tree, value)
