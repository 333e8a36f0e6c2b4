"""Arrays whose values are read on demand: from a file, from a device, or from another array."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from varstore.text.hints import plural
from varstore.values.methods import NumpyMethods
from varstore.values.parts import Placed, Read, bounds, read_all, read_indexed, taken

__all__ = ["LazyArray", "Place", "chunked_array", "derived", "placed_array", "retyped"]

Part = Callable[[Any, Callable[[], np.ndarray]], Any]
"""Returns the part for an index, and calls the function if the index needs all values."""


class Place(NamedTuple):
    """Where an array lies in memory that others may share: a key for the memory, and offset and strides in elements."""

    memory: Hashable
    offset: int
    strides: tuple[int, ...]


class LazyArray(NumpyMethods):
    """An array with known shape and type. `numpy` and ``np.asarray`` read all values, ``[]`` the part for an index.

    `attributes` is other information in the file, such as the scale of quantised values; `name` is the name in the
    file. Values are not cached: each use reads them again. Two arrays with equal `identity` share memory. `type` is
    what a framework's file says that the array was, such as "torch.nn.Parameter", with its `requires_grad`.
    """

    __slots__ = (
        "_fetch",
        "_identity",
        "_part",
        "attributes",
        "dtype",
        "name",
        "origin",
        "place",
        "requires_grad",
        "shape",
        "type",
    )

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fetch: Callable[[], np.ndarray],
        attributes: Mapping[str, Any] | None = None,
        *,
        part: Part | None = None,
        identity: Hashable = None,
        name: str = "",
        type: str = "",
        requires_grad: bool = False,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.type = type
        self.requires_grad = requires_grad
        self.attributes = dict(attributes or {})
        self.name = name
        self._fetch = fetch
        self._part = part
        self._identity = identity
        self.origin: Callable[[str], LazyArray] | None = None
        """Gives the array by its name in another process; without it, the values themselves are pickled."""
        self.place: Place | None = None
        """Where a tensor of torch lies in its storage, if that is known."""

    @property
    def identity(self) -> Hashable:
        """A key that is equal for arrays that share memory."""
        return id(self) if self._identity is None else self._identity

    def __reduce__(self) -> tuple[Callable[..., LazyArray], tuple[Any, ...]]:
        if self.origin is not None:
            about = (self.type, self.requires_grad)
            return _from_origin, (self.shape, self.dtype, self.attributes, self.name, self.origin, *about)
        return _in_memory, (self.numpy(), self.attributes, self.name)

    def __copy__(self) -> LazyArray:
        return self

    def __deepcopy__(self, memo: object) -> LazyArray:
        return self  # nothing in it changes

    def numpy(self) -> np.ndarray:
        """Read the values into a new array."""
        return self._fetch()

    read = numpy

    def __getitem__(self, index: Any) -> Any:
        return self._take(index, self.numpy)

    def _take(self, index: Any, whole: Callable[[], np.ndarray]) -> Any:
        """Return the part for an index; `whole` is called if the index needs all values."""
        return taken(whole(), index) if self._part is None else self._part(index, whole)

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<LazyArray{name}: {self.dtype} {list(self.shape)}, {plural(self.nbytes, 'byte')}>"


def placed_array(
    read: Read,
    placed: Placed,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
    dtype: np.dtype[Any] | None = None,
) -> LazyArray:
    """Return an array that is stored among bytes; `convert` converts its elements to values of type `dtype`."""

    def fetch() -> np.ndarray:
        values = read_all(placed, read)
        return values if convert is None else np.asarray(convert(values))

    def part(index: Any, whole: Callable[[], np.ndarray]) -> Any:
        return read_indexed(placed, index, read, whole, convert)

    return LazyArray(placed.shape, placed.dtype if dtype is None else dtype, fetch, part=part)


def chunked_array(
    shape: tuple[int, ...], dtype: np.dtype[Any], fetch: Callable[[Sequence[range]], np.ndarray]
) -> LazyArray:
    """Return an array of which `fetch` reads a block, given as the rows along each axis: the block that is needed."""

    def part(index: Any, whole: Callable[[], np.ndarray]) -> Any:
        np.ndarray(shape, np.bool_, b"\0", 0, (0,) * len(shape))[index]  # raises numpy's own IndexError
        found = bounds(shape, index)
        return taken(whole(), index) if found is None else taken(fetch(found[0]), found[1])

    return LazyArray(shape, dtype, lambda: fetch([range(extent) for extent in shape]), part=part)


def derived(
    array: LazyArray,
    convert: Callable[[Any], Any] | None = None,
    dtype: np.dtype[Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    check: Callable[[np.ndarray], None] | None = None,
) -> LazyArray:
    """Return an array whose values are those of another after `convert`, which does not change the shape.

    `check` receives the values before they are converted, if all of them are read.
    """
    change = convert or (lambda values: values)

    def whole() -> np.ndarray:
        values = array.numpy()
        if check is not None:
            check(values)
        return values

    return LazyArray(
        array.shape,
        array.dtype if dtype is None else dtype,
        lambda: change(whole()),
        array.attributes if attributes is None else attributes,
        part=lambda index, _: change(array._take(index, whole)),
        name=array.name,
    )


def retyped(array: LazyArray, type: str, requires_grad: bool = False) -> LazyArray:
    """Return an array of the same memory that a file says was of another type."""
    typed = LazyArray(
        array.shape,
        array.dtype,
        array.numpy,
        array.attributes,
        part=lambda index, _: array[index],
        identity=array.identity,
        name=array.name,
        type=type,
        requires_grad=requires_grad,
    )
    typed.place = array.place
    return typed


def _in_memory(values: np.ndarray, attributes: Mapping[str, Any], name: str) -> LazyArray:
    return LazyArray(values.shape, values.dtype, values.copy, attributes, name=name)


def _from_origin(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    attributes: Mapping[str, Any],
    name: str,
    origin: Callable[[str], LazyArray],
    type: str,
    requires_grad: bool,
) -> LazyArray:
    array = LazyArray(
        shape,
        dtype,
        lambda: origin(name).numpy(),
        attributes,
        part=lambda index, _: origin(name)[index],
        name=name,
        type=type,
        requires_grad=requires_grad,
    )
    array.origin = origin
    return array
