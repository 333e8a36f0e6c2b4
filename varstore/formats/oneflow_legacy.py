"""The folders that OneFlow 0.9's ``flow.load`` reads whole: OneFlow's legacy layout, without what it does not know.

A checkpoint of varstore is in that layout too, but ``flow.load`` lists one level of folders only, takes a folder's name
as the variable's, warns of the manifest, and fails as a whole if one variable has a type that it cannot load. So this
writer replaces ``/`` in names, refuses names whose folders are called otherwise, and refuses or casts those types.

Source: ``legacy_load`` in
https://github.com/Oneflow-Inc/oneflow/blob/v0.9.0/python/oneflow/framework/check_point_v2.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import ml_dtypes
import numpy as np

from varstore.errors import InvalidName, UnsupportedDtype
from varstore.formats.native import read
from varstore.formats.state.flat import flat_arrays
from varstore.layout.names import folder_of
from varstore.model.options import SaveOptions
from varstore.model.store import save
from varstore.values.lazy import LazyArray, derived

__all__ = ["read", "write"]

_LOADED = ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")


def write(path: str, state: Any, *, separator: str = ".", dtype: Any = None, **options: Unpack[SaveOptions]) -> None:
    """Write names and arrays as a folder that OneFlow 0.9 loads whole.

    Args:
        path: as for `varstore.save`.
        state: a mapping of names to arrays, or nested state whose leaves are arrays or numbers.
        separator: what replaces each ``/`` in a name.
        dtype: the type to which tensors of types that OneFlow cannot load are cast, or a mapping from the names of
            such types to types. The type must be able to store every value exactly.
        options: the options of `varstore.save`. The folder never has a manifest.

    Raises:
        InvalidName: two names are equal once ``/`` is replaced, or OneFlow would not see a variable under its name.
        UnsupportedDtype: OneFlow cannot load the type of a tensor, and `dtype` does not say what to do.
        UsageError: a value is not a tensor or a number.
        CheckpointExists, StorageError: see `varstore.save`.
    """
    variables: dict[str, LazyArray] = {}
    origins: dict[str, str] = {}
    for origin, array in flat_arrays(state, format="oneflow-legacy").items():
        name = _flat_name(origin, separator)
        if name in variables:
            raise InvalidName(
                f"two variables have the same name when '/' is replaced by {separator!r}",
                variable=origin,
                found=f"{origins[name]!r} and {origin!r} are both {name!r}",
                hint="choose another separator, or rename one of them",
            )
        origins[name] = origin
        variables[name] = _loadable(origin, array, dtype)
    options["manifest"] = False
    save(path, variables, **options)


def _flat_name(name: str, separator: str) -> str:
    flat = name.replace("/", separator)
    if "/" in flat or folder_of(flat) != flat:
        raise InvalidName(
            "OneFlow would not see the variable under this name, because its folder has another one",
            variable=name,
            found=f"the folder {folder_of(flat)!r}",
            hint="rename the variable, or choose another separator",
        )
    return flat


def _loadable(name: str, array: LazyArray, dtype: Any) -> LazyArray:
    kind = array.dtype.newbyteorder("=")
    if kind.name in _LOADED:
        return array
    wanted = dtype.get(kind.name) if isinstance(dtype, Mapping) else dtype
    target = None if wanted is None else _named_dtype(wanted)
    if target is None or target.name not in _LOADED or not _is_exact(kind, target):
        raise UnsupportedDtype(
            "OneFlow 0.9 cannot load this type, and the whole folder with it",
            variable=name,
            found=kind.name if target is None else f"{kind.name}, to be cast to {target.name}",
            expected=f"one of {', '.join(_LOADED)}, in which every value can be stored exactly",
            hint="cast it, for example dtype='float32' or dtype={'bfloat16': 'float32', 'uint16': 'int32'}",
        )
    return derived(array, lambda part: part.astype(target), target)


def _named_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        return np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        raise UnsupportedDtype(
            "there is no such type", field="dtype", found=repr(dtype), expected=f"one of {', '.join(_LOADED)}"
        ) from None


def _is_exact(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Return whether every value of a type exists in another; numpy calls 64-bit integers to float64 safe, too."""
    if source.kind in "iu" and target.kind == "f":
        return source.itemsize * 8 <= np.finfo(target).nmant + 1
    return bool(np.can_cast(source, target, "safe"))
