"""The peers of packed checkpoints: varstore's two levels, and what others do to take less space."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

import varstore
from tools.bench.peers import Orbax, Peer
from tools.bench.workloads import Arrays

THREADS = 2


class Packed(Peer):
    """One way to store arrays in less space."""

    def ready(self, fresh: Callable[[], str], arrays: Arrays) -> None:
        """Prepare what is not measured; `fresh` gives a path that stays."""


class PackedVarstore(Packed):
    """Packs a checkpoint with raw values, which it reads; the others get arrays in memory."""

    level: Any = ""
    needs = ("numcodecs",)

    def __init__(self) -> None:
        self._arrays: Arrays | None = None
        self._raw = ""

    def ready(self, fresh: Callable[[], str], arrays: Arrays) -> None:
        if self._arrays is not arrays:
            self._arrays, self._raw = arrays, fresh()
            varstore.save(self._raw, arrays, durable=False)

    def save(self, path: str, arrays: Arrays) -> None:  # noqa: ARG002
        varstore.pack(self._raw, path, level=self.level, durable=False, threads=THREADS)

    def load(self, path: str) -> Any:
        return varstore.load(path, threads=THREADS)

    def row(self, path: str, name: str, index: Any) -> Any:
        return varstore.open(path)[name][index]


class PackedFast(PackedVarstore):
    name = "varstore, fast"
    level = "fast"


class PackedSmall(PackedVarstore):
    name = "varstore, small"
    level = "small"


class PackedSafetensors(Packed):
    """A safetensors file that is compressed whole, as one does by hand; zstd decompresses it in one thread.

    Its reader for numpy does not have bfloat16.
    """

    name = "safetensors + zstd -3"
    needs = ("safetensors", "zstandard")

    def save(self, path: str, arrays: Arrays) -> None:
        import zstandard
        from safetensors.numpy import save

        with open(path, "wb") as file:
            file.write(
                zstandard.ZstdCompressor(level=3, threads=THREADS).compress(
                    save({name: _known(array) for name, array in arrays.items()})
                )
            )

    def load(self, path: str) -> Any:
        import zstandard
        from safetensors.numpy import load

        with open(path, "rb") as file:
            return load(zstandard.ZstdDecompressor().decompress(file.read()))

    def row(self, path: str, name: str, index: Any) -> Any:
        return self.load(path)[name][index]


class PackedOrbax(Orbax, Packed):
    """Orbax compresses with zstd unless told otherwise; its arrays are one chunk each."""

    needs = ("orbax.checkpoint", "jax", "tensorstore")

    def row(self, path: str, name: str, index: Any) -> Any:
        import tensorstore as ts

        store = {"driver": "ocdbt", "base": f"file://{os.path.abspath(path)}/", "path": f"{name}/"}
        return ts.open({"driver": "zarr", "kvstore": store}).result()[index].read().result()


class PackedZarr(Packed):
    """zarr-python as it comes: its own chunks and compressor. It does not have bfloat16."""

    name = "zarr-python, default"
    needs = ("zarr",)

    def save(self, path: str, arrays: Arrays) -> None:
        import zarr

        with zarr.config.set({"threading.max_workers": THREADS}):
            group = zarr.create_group(path)
            for name, array in arrays.items():
                group.create_array(name, data=_known(array))

    def load(self, path: str) -> Any:
        import zarr

        with zarr.config.set({"threading.max_workers": THREADS}):
            return {name: array[...] for name, array in zarr.open_group(path, mode="r").arrays()}

    def row(self, path: str, name: str, index: Any) -> Any:
        import zarr

        group: Any = zarr.open_group(path, mode="r")
        return group[name][index]


def _known(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as integers with the same bits."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


class PackedZipNN(Packed):
    """ZipNN compresses bytes and leaves the file to others: here, the sizes as JSON in a line, then the arrays."""

    name = "ZipNN"
    needs = ("zipnn",)

    def save(self, path: str, arrays: Arrays) -> None:
        packed = {name: _zipnn(array.dtype.name).compress(array.tobytes()) for name, array in arrays.items()}
        head = [[name, list(a.shape), a.dtype.name, len(packed[name])] for name, a in arrays.items()]
        with open(path, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.writelines(packed.values())

    def load(self, path: str) -> Any:
        return dict(self._arrays(path))

    def row(self, path: str, name: str, index: Any) -> Any:
        return next(array[index] for _, array in self._arrays(path, name))

    def _arrays(self, path: str, wanted: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        with open(path, "rb") as file:
            for name, shape, dtype, nbytes in json.loads(file.readline()):
                if wanted in (name, None):
                    values = _zipnn(dtype).decompress(file.read(nbytes))
                    yield (
                        name,
                        np.frombuffer(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).reshape(shape),
                    )
                else:
                    file.seek(nbytes, os.SEEK_CUR)


def _zipnn(dtype: str) -> Any:
    from zipnn import ZipNN

    return ZipNN(input_format="byte", bytearray_dtype=dtype, threads=THREADS)


PACKED: tuple[type[Packed], ...] = (
    PackedFast,
    PackedSmall,
    PackedSafetensors,
    PackedOrbax,
    PackedZarr,
    PackedZipNN,
)
