"""Copies of an exported program of PyTorch (``.pt2``) with other weights.

The bytes of weights are members of the archive or, before PyTorch 2.9, of a file of `torch.save` in it. They are
replaced in place, with their checksums; everything else is copied byte for byte, and no code or graph is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from varstore.errors import FormatError, VariableMismatch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.patched import copy_archive
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.state.copies import check_apart
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.formats.torch.export import read_archive
from varstore.formats.torch.tensors import Storage, storage_of
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray

__all__ = ["PROGRAM", "Change", "changed", "elements_of", "opened_program", "write_program"]

PROGRAM = ".pt2"


def write_program(path: str, state: Any, model: str) -> None:
    """Write a copy of a program in which the weights named in `state` have other values.

    Raises:
        UsageError: the copy and the model are the same file.
        VariableNotFound, VariableMismatch: the program does not have a weight, or not of this shape or type; or two
            weights that are one in the program get different values.
        FormatError: it is not an exported program of PyTorch, or damaged.
    """
    arrays = flat_arrays(state, format="torch")
    source = Source(model)
    check_apart(path, model)
    known = opened_program(source)
    changes: dict[Member, list[Change]] = {}
    for name, array in arrays.items():
        check_fits(model, name, array, known)
        if array.size:  # the offset of an empty weight need not be in its member
            storage = storage_of(known[name])
            if storage is None or storage.member is None:
                raise FormatError(
                    "weights of this type cannot be replaced", path=model, variable=name, found=str(array.dtype)
                )
            changes.setdefault(storage.member, []).append((name, array, elements_of(known[name], storage)))
    with replacing(path) as file:
        copy_archive(file, source, {member: partial(changed, made, model) for member, made in changes.items()})


Change = tuple[str, LazyArray, Callable[[np.ndarray], np.ndarray]]
"""The name of a weight, its new values, and what gives its elements among the bytes of a member."""


def opened_program(source: Source) -> ForeignCheckpoint:
    """Open an exported program.

    Raises:
        FormatError: it is not one, or damaged.
    """
    found = read_archive(source, Budget(source.path, source.size), encoding="utf-8", unknown="opaque")
    if not found.attributes.get("exported"):
        raise FormatError(
            "not an exported program of PyTorch", path=source.path, expected="a file of torch.export.save"
        )
    return found


def elements_of(array: LazyArray, storage: Storage) -> Callable[[np.ndarray], np.ndarray]:
    """Return what gives the elements of a weight among the bytes of its storage."""
    assert array.place is not None
    size, (_, offset, strides) = array.dtype.itemsize, array.place
    dtype = array.dtype.newbyteorder(">" if storage.swapped else "=")

    def elements(raw: np.ndarray) -> np.ndarray:
        return np.ndarray(array.shape, dtype, raw.data, offset * size, [size * step for step in strides])

    return elements


def changed(changes: list[Change], model: str, raw: np.ndarray) -> np.ndarray:
    """Return the bytes of a member with the new values of weights in them.

    Raises:
        VariableMismatch: two weights share bytes, and not their values.
    """
    values = {name: fetch_plain(name, array) for name, array, _ in changes}
    for name, _, elements in changes:
        elements(raw)[...] = values[name]
    for name, _, elements in changes:
        if np.ascontiguousarray(elements(raw)).astype(values[name].dtype).tobytes() != values[name].tobytes():
            raise VariableMismatch(
                "weights that are one in the program would have different values", path=model, variable=name
            )
    return raw
