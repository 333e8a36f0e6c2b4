"""Copies of a program in which some arrays have other values, in the places of the old ones."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from varstore.errors import UsageError
from varstore.formats.binary.patched import PatchedCopy
from varstore.formats.binary.source import Source
from varstore.formats.state.flat import fetch_plain
from varstore.storage.appearing import replacing
from varstore.values.lazy import LazyArray

__all__ = ["check_apart", "write_copy"]


def check_apart(path: str, model: str) -> None:
    """Check that a copy is not to replace the model that it is made of.

    Raises:
        UsageError: both are the same file.
    """
    if os.path.realpath(path) == os.path.realpath(model):
        raise UsageError("the copy and the model are the same", path=path, hint="write it to another path")


def write_copy(path: str, model: Source, arrays: Mapping[str, LazyArray], starts: Mapping[str, int]) -> None:
    """Write a copy of a file; `starts` says where in it the values of each array are, which do not overlap.

    Raises:
        VariableMismatch: an array does not have the shape and type that it stated.
        StorageError: the operating system refused.
    """
    with replacing(path) as file:
        copy = PatchedCopy(file, model)
        for name in sorted(arrays, key=starts.__getitem__):
            copy.replace(starts[name], fetch_plain(name, arrays[name]).reshape(-1).view(np.uint8).data)
        copy.up_to(model.size)
