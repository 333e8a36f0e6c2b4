"""The types of `ml_dtypes` as data types of zarr-python, under the names of Zarr's list of extensions.

zarr raises where two of its registered types match one numpy type. So a type is registered only where its name is free,
and it steps aside where another package's type matches the numpy type, whichever was registered first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import zarr

from varstore.errors import UsageError
from varstore.layout.dtypes import TABLE

try:
    from zarr.core.dtype import get_data_type_from_json
    from zarr.core.dtype.common import HasEndianness, HasItemSize
    from zarr.dtype import ZDType, data_type_registry
except ImportError as error:
    raise UsageError(
        "this zarr cannot be given more data types",
        found=f"zarr {zarr.__version__}",
        hint="install a newer one: pip install 'zarr>=3.1'",
    ) from error
try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # before zarr 3.2
    from zarr.dtype import DataTypeValidationError  # type: ignore[no-redef, unused-ignore]

__all__ = ["register_data_types"]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True, slots=True)
class _MlDtype(ZDType[Any, Any], HasItemSize):
    """A type of `ml_dtypes`. Each has a class of its own, because zarr asks classes, not objects, what they match."""

    dtype_cls: ClassVar[type[np.dtype[Any]]]
    _native: ClassVar[np.dtype[Any]]

    @property
    def _is_integer(self) -> bool:
        return "int" in self._zarr_v3_name

    def __reduce__(self) -> tuple[Any, tuple[str, np.dtype[Any]]]:
        return _named, (self._zarr_v3_name, self.to_native_dtype())

    @property
    def item_size(self) -> int:
        """Bytes per element; one for types that are smaller."""
        return self._native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """Return the type for a numpy type, unless another package has one for it."""
        if not cls._check_native_dtype(dtype) or any(_matches(other, dtype) for other in _others()):
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the numpy type."""
        return self._native

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:  # noqa: ARG003
        raise DataTypeValidationError(f"Zarr v2 does not have {cls._zarr_v3_name}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: Any) -> Any:
        """Return the name of the type."""
        if zarr_format != 3:
            raise ValueError(f"Zarr v2 does not have {self._zarr_v3_name}; use zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (bool, int, float, np.generic))

    def cast_scalar(self, data: Any) -> Any:
        """Return a number as an element of the type."""
        if not self._check_scalar(data):
            raise TypeError(f"{data!r} is not a number that {self._zarr_v3_name} could hold")
        with np.errstate(all="ignore"):
            scalar = np.asarray(data).astype(self._native)[()]
        number = float(data)
        if not math.isfinite(number) and str(float(scalar)) != str(number):  # as text, NaN equals NaN
            raise ValueError(f"{self._zarr_v3_name} does not have {number}")
        return scalar

    def default_scalar(self) -> Any:
        """Return zero."""
        return self.cast_scalar(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:  # noqa: ARG002
        """Return an element from a number, the name of one that is not finite, or its bits as ``"0x…"``."""
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(bits, self._native)[0]
        return self.cast_scalar(_NOT_FINITE[data] if isinstance(data, str) else data)

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> Any:  # noqa: ARG002
        """Return what `from_json_scalar` takes."""
        number = float(self.cast_scalar(data))
        if math.isnan(number):
            return "NaN"
        if math.isinf(number):
            return "Infinity" if number > 0 else "-Infinity"
        return int(number) if self._is_integer else number


@dataclass(frozen=True, kw_only=True, slots=True)
class _WideMlDtype(_MlDtype, HasEndianness):
    """A type of more than one byte, so that zarr's codec ``bytes`` says in which order they lie."""

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """Return the type for a numpy type of either byte order."""
        super(_WideMlDtype, cls).from_native_dtype(dtype)
        return cls(endianness="little" if dtype == cls._native else "big")

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the numpy type in this byte order."""
        return self._native.newbyteorder(self.endianness)


def _class(dtype: np.dtype[Any]) -> type[_MlDtype]:
    names = {"dtype_cls": type(dtype), "_native": dtype, "_zarr_v3_name": dtype.name, "__slots__": ()}
    return type(f"_{dtype.name}", (_MlDtype if dtype.itemsize == 1 else _WideMlDtype,), names)


_CLASSES = {
    row.dtype.name: _class(row.dtype) for row in TABLE if row.dtype is not None and row.dtype.type.__module__ != "numpy"
}


def _named(name: str, native: np.dtype[Any]) -> _MlDtype:
    known = _CLASSES[name]
    return (
        known(endianness="little" if native == known._native else "big") if issubclass(known, _WideMlDtype) else known()
    )


def _others() -> list[type[ZDType[Any, Any]]]:
    return [known for known in data_type_registry.contents.values() if not issubclass(known, _MlDtype)]


def _matches(other: type[ZDType[Any, Any]], dtype: np.dtype[Any]) -> bool:
    try:
        other.from_native_dtype(dtype)
    except (DataTypeValidationError, TypeError, ValueError):
        return False
    return True


def register_data_types() -> None:
    """Let zarr open arrays of bfloat16, float8 and the other types of `ml_dtypes`, wherever these arrays lie.

    Types that another package has registered under the same name stay as they are. `CheckpointStore` calls this.

    Example:
        >>> import zarr
        >>> from varstore.adapters.zarr import register_data_types
        >>> register_data_types()
        >>> array = zarr.create_array({}, shape=(2, 3), dtype="bfloat16")
        >>> array.dtype
        dtype(bfloat16)
    """
    for name, known in _CLASSES.items():
        try:
            get_data_type_from_json(name, zarr_format=3)
        except ValueError:
            data_type_registry.register(name, known)
