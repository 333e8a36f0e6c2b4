"""Copies of an exported program of PyTorch (``.pt2``) with other weights.

Since PyTorch 2.9, the bytes of each weight are a member of the archive. They are replaced in place, with their
checksums; everything else is copied byte for byte, and no code or graph is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from varstore.errors import FormatError, UsageError, VariableMismatch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.patched import copy_archive
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member, archive_members
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.formats.torch.export import index_of, is_big_endian, layout_of, listed_weights, read_archive
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray

__all__ = ["PROGRAM", "write_program"]

PROGRAM = ".pt2"


def write_program(path: str, state: Any, model: str) -> None:
    """Write a copy of a program in which the weights named in `state` have other values.

    Raises:
        UsageError: the copy and the model are the same file.
        VariableNotFound, VariableMismatch: the program does not have a weight, or not of this shape or type; or two
            weights that are one in the program get different values.
        FormatError: it is not an exported program of PyTorch 2.9 or later, or damaged.
    """
    arrays = flat_arrays(state, format="torch")
    source = Source(model)
    if os.path.realpath(path) == os.path.realpath(model):
        raise UsageError("the copy and the model are the same", path=path, hint="write it to another path")
    members = archive_members(source)
    index = index_of(members)
    if index is None:
        raise FormatError(
            "this is not an exported program whose weights can be replaced",
            path=model,
            expected="a file of torch.export.save of PyTorch 2.9 or later",
            hint="load it with a later version of PyTorch, and save it again",
        )
    known = read_archive(source, Budget(model, source.size), encoding="utf-8", unknown="opaque")
    for name, array in arrays.items():
        check_fits(model, name, array, known)
    order = ">" if is_big_endian(members, index) else "="
    changes: dict[str, list[_Change]] = {}
    for name, member, about in listed_weights(source, members, index, Budget(model, source.size)):
        if name in arrays and arrays[name].size:  # the offset of an empty weight need not be in its member
            if about.get("use_pickle"):
                raise FormatError("the program holds this weight as a pickle", path=model, variable=name)
            changes.setdefault(member.name, []).append(_change(name, arrays[name], member, about, order, model))
    contents = {name: partial(_changed, made, model) for name, made in changes.items()}
    with replacing(path) as file:
        copy_archive(file, source, members, contents)


_Change = tuple[str, LazyArray, Callable[[np.ndarray], np.ndarray]]
"""The name of a weight, its new values, and what gives its elements among the bytes of a member."""


def _change(name: str, array: LazyArray, member: Member, about: dict[str, Any], order: Any, model: str) -> _Change:
    dtype, shape, strides, offset = layout_of(about, model, name)
    if dtype.shape:
        raise FormatError("weights of this type cannot be replaced", path=member.path, variable=name, found=str(dtype))
    size = dtype.itemsize
    steps = [size * step if extent > 1 else 0 for step, extent in zip(strides, shape, strict=True)]

    def elements(raw: np.ndarray) -> np.ndarray:
        return np.ndarray(shape, dtype.newbyteorder(order), raw.data, offset * size, steps)

    return name, array, elements


def _changed(changes: list[_Change], model: str, raw: np.ndarray) -> np.ndarray:
    values = {name: fetch_plain(name, array) for name, array, _ in changes}
    for name, _, elements in changes:
        elements(raw)[...] = values[name]
    for name, _, elements in changes:
        if np.ascontiguousarray(elements(raw)).astype(values[name].dtype).tobytes() != values[name].tobytes():
            raise VariableMismatch(
                "weights that are one in the program would have different values", path=model, variable=name
            )
    return raw
