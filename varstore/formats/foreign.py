"""What every reader of another system's file returns: a lazy mapping, and the nested state behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from varstore.errors import FormatError, VariableNotFound

__all__ = ["BARE", "ForeignCheckpoint", "LazyArray"]

BARE = "(array)"
"""The name of a file's only tensor where the file gives it none."""


class LazyArray:
    """An array that a file holds: its shape and type cost nothing, `read` fetches the values.

    `attributes` is what the file says of it beyond that, such as the scale of quantised values.
    """

    __slots__ = ("_fetch", "attributes", "dtype", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fetch: Callable[[], np.ndarray],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.attributes = dict(attributes or {})
        self._fetch = fetch

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Fetch the values."""
        return self._fetch()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=bool(copy))

    def __repr__(self) -> str:
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


class ForeignCheckpoint(Mapping[str, np.ndarray]):
    """The tensors of another system's file by name; ``[]`` reads one of them and nothing else.

    Names are the keys and indices on the way, joined by ``/``. `state` gives the nested object with its
    scalars, arrays at its leaves; `attributes` is the file's own metadata.
    """

    def __init__(self, path: str, format: str, tree: Any, attributes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.format = format
        self.tree = tree
        self.attributes = dict(attributes or {})
        self._arrays: dict[str, LazyArray] = {}
        for name, array in _walk(tree, ()):
            if name in self._arrays:
                raise FormatError(
                    "two tensors have this name when their keys are joined by '/'",
                    path=path,
                    variable=name,
                    hint="read it with .state() of varstore.read(..., format=) and rename one",
                )
            self._arrays[name] = array

    def __getitem__(self, name: str) -> np.ndarray:
        return self.lazy(name).read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __repr__(self) -> str:
        return f"<{self.format} file {self.path!r}: {len(self)} tensors>"

    def lazy(self, name: str) -> LazyArray:
        """Return one tensor without reading its values.

        Raises:
            VariableNotFound: the file has no tensor of this name.
        """
        try:
            return self._arrays[name]
        except KeyError:
            raise VariableNotFound("no such tensor in this file", path=self.path, variable=name) from None

    def state(self) -> Any:
        """Read everything: the nested object as its system saved it, numpy arrays at its leaves."""
        return _read_leaves(self.tree)


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, LazyArray]]:
    if isinstance(node, LazyArray):
        yield "/".join(map(str, path)) or BARE, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _walk(value, (*path, index))


def _read_leaves(node: Any) -> Any:
    if isinstance(node, LazyArray):
        return node.read()
    if isinstance(node, OrderedDict):
        return OrderedDict((key, _read_leaves(value)) for key, value in node.items())
    if isinstance(node, dict):
        return {key: _read_leaves(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_read_leaves(value) for value in node]
    if isinstance(node, tuple):
        return tuple(_read_leaves(value) for value in node)
    return node
