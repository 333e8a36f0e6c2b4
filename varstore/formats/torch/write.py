"""Write PyTorch's zip format: a pickle of protocol 2, and an uncompressed, 64-byte aligned member for each storage.

`torch.load` accepts such files with ``weights_only=True`` and with ``mmap=True``. Tensors are read and written one at a
time. Tensors that share memory share a storage, and so do those that lie within a contiguous one.

Source: `_save` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""

from __future__ import annotations

import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, BinaryIO

import numpy as np

from varstore.errors import UsageError
from varstore.formats.binary.zip import new_archive
from varstore.formats.opened import views_in
from varstore.formats.pickles.emit import Emitter, Named, Persistent
from varstore.formats.state.flat import fetch_plain
from varstore.formats.state.nested import nested_state
from varstore.formats.torch.member import ALIGNMENT, add_member
from varstore.formats.torch.rewrite import PROGRAM, write_program
from varstore.formats.torch.tensors import DTYPES, STORAGES
from varstore.training.tensors import NDARRAY, PARAMETER, TENSOR, strides_of
from varstore.values.lazy import LazyArray, retyped

__all__ = ["write"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CLASSES = {DTYPES[dtype]: name for name, dtype in STORAGES.items() if dtype and not name.startswith("Q")}


def write(path: str | os.PathLike[str], state: Any, *, model: str | os.PathLike[str] | None = None) -> None:
    """Write a mapping or nested state as a file that `torch.load` reads; the file appears complete or not at all.

    A path that ends in ``.pt2`` gets a copy of the exported program `model` with other weights: see `write_program`.

    Raises:
        UsageError: a value is not a tensor, a scalar or a container of them; or one of `path` and `model` is a
            program's and the other is not.
        UnsupportedDtype: torch does not have the type of a tensor.
        StorageError: the operating system refused.
    """
    is_program = os.fspath(path).endswith(PROGRAM)
    if is_program and model is not None:
        write_program(os.fspath(path), state, os.fspath(model))
        return
    if is_program or model is not None:
        raise UsageError(
            "an exported program can only be written as a copy of one with other weights",
            path=path,
            hint="pass the program: write('copy.pt2', values, model='original.pt2')",
        )
    tree = nested_state(state, format="torch", accept=lambda dtype: _native(dtype) in _NAMES)
    views = views_in(tree)
    storages: dict[Hashable, tuple[int, LazyArray]] = {}
    plain: dict[Hashable, LazyArray] = {}
    pickled = io.BytesIO()

    def tensor(emitter: Emitter, array: LazyArray) -> None:
        if array.type == NDARRAY:
            emitter.numpy(array, _native(array.dtype))
        elif array.type == PARAMETER:
            data = plain.setdefault(array.identity, retyped(array, TENSOR))
            emitter.call(Named("torch._utils", "_rebuild_parameter"), data, array.requires_grad, OrderedDict())
        else:
            owner, offset, strides = views.get(array.identity, (array, 0, strides_of(array.shape)))
            key, _ = storages.setdefault(owner.identity, (len(storages), owner))
            _emit_tensor(emitter, array, str(key), owner.nbytes, (offset, tuple(array.shape), strides))

    Emitter(pickled, 2, tensor).pickle(tree)
    with new_archive(os.fspath(path)) as (archive, file):
        _member(archive, file, "data.pkl", np.frombuffer(pickled.getvalue(), np.uint8))
        for name, text in ((".format_version", "1"), (".storage_alignment", str(ALIGNMENT)), ("byteorder", "little")):
            _member(archive, file, name, np.frombuffer(text.encode(), np.uint8))
        for key, array in storages.values():
            _member(archive, file, f"data/{key}", fetch_plain(f"storage {key}", array).reshape(-1).view(np.uint8))
        _member(archive, file, "version", np.frombuffer(b"3\n", np.uint8))


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("=")


def _emit_tensor(emitter: Emitter, array: LazyArray, key: str, nbytes: int, place: tuple[Any, ...]) -> None:
    """Emit a tensor at a place (offset, shape, strides) in a storage of so many bytes."""
    dtype = _native(array.dtype)
    view = (*place, array.requires_grad, OrderedDict())
    count = nbytes // dtype.itemsize
    if dtype in _CLASSES:
        storage = Persistent(("storage", Named("torch", _CLASSES[dtype]), key, "cpu", count))
        emitter.call(Named("torch._utils", "_rebuild_tensor_v2"), storage, *view)
    else:
        storage = Persistent(("storage", Named("torch.storage", "UntypedStorage"), key, "cpu", nbytes))
        emitter.call(Named("torch._utils", "_rebuild_tensor_v3"), storage, *view, Named("torch", _NAMES[dtype]))


def _member(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: np.ndarray) -> None:
    add_member(archive, file, f"archive/{name}", data)
