"""The peers: varstore and its alternatives, with the same few methods.

Peers that are not installed, and methods that a peer does not have, are left out with a message.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.bench.workloads import Arrays


class Peer:
    """One way to store arrays in a file or folder; `needs` are the packages that it requires."""

    name = ""
    needs: tuple[str, ...] = ()

    @classmethod
    def missing(cls) -> str | None:
        """Return the first required package that is not installed, or None."""
        for package in cls.needs:
            try:
                importlib.import_module(package)
            except ImportError:
                return package
        return None

    def save(self, path: str, arrays: Arrays) -> None:
        """Write all arrays; not necessarily durable."""
        raise NotImplementedError

    def save_durable(self, path: str, arrays: Arrays) -> None:
        """Write all arrays and wait for the disk: fsync of every file and folder."""
        self.save(path, arrays)
        for entry in _tree(path):
            fd = os.open(entry, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

    def load(self, path: str) -> Any:
        """Read all arrays into new memory."""
        raise NotImplementedError

    def load_into(self, path: str, targets: Arrays) -> Any:
        """Read all arrays into existing memory."""
        raise NotImplementedError

    def load_some(self, path: str, names: list[str]) -> Any:
        """Open and read a few arrays."""
        raise NotImplementedError

    def row(self, path: str, name: str, index: int) -> Any:
        """Read one row of one array."""
        raise NotImplementedError

    def foreign_names(self, path: str) -> list[str]:
        """Open a safetensors file and list its names."""
        raise NotImplementedError

    def foreign_row(self, path: str, name: str, index: int) -> np.ndarray:
        """Read one row of one array of a safetensors file."""
        raise NotImplementedError


def _tree(path: str) -> Iterator[str]:
    if os.path.isdir(path):
        for folder, _, files in os.walk(path, topdown=False):
            yield from (os.path.join(folder, file) for file in files)
            yield folder
    else:
        yield path
    yield os.path.dirname(path)


class Varstore(Peer):
    name = "varstore"

    def save(self, path: str, arrays: Arrays) -> None:
        import varstore

        varstore.save(path, arrays, durable=False)

    def save_durable(self, path: str, arrays: Arrays) -> None:
        import varstore

        varstore.save(path, arrays)

    def load(self, path: str) -> Any:
        import varstore

        return varstore.load(path)

    def load_into(self, path: str, targets: Arrays) -> Any:
        import varstore

        return varstore.load_into(targets, path)

    def load_some(self, path: str, names: list[str]) -> Any:
        import varstore

        checkpoint = varstore.open(path)
        return [checkpoint[name].numpy() for name in names]

    def row(self, path: str, name: str, index: int) -> Any:
        import varstore

        return varstore.open(path)[name][index]

    def foreign_names(self, path: str) -> list[str]:
        import varstore

        return list(varstore.read(path))

    def foreign_row(self, path: str, name: str, index: int) -> np.ndarray:
        import varstore

        return np.asarray(varstore.read(path)[name][index])


class Safetensors(Peer):
    name = "safetensors"
    needs = ("safetensors",)

    def save(self, path: str, arrays: Arrays) -> None:
        from safetensors.numpy import save_file

        save_file(arrays, path)

    def load(self, path: str) -> Any:
        from safetensors.numpy import load_file

        return load_file(path)

    def load_into(self, path: str, targets: Arrays) -> Any:
        for name, values in self.load(path).items():
            np.copyto(targets[name], values)

    def load_some(self, path: str, names: list[str]) -> Any:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return [file.get_tensor(name) for name in names]

    def row(self, path: str, name: str, index: int) -> Any:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return file.get_slice(name)[index]

    def foreign_names(self, path: str) -> list[str]:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return list(file.keys())

    def foreign_row(self, path: str, name: str, index: int) -> np.ndarray:
        return np.asarray(self.row(path, name, index))


class Savez(Peer):
    name = "numpy.savez"

    def save(self, path: str, arrays: Arrays) -> None:
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub knows one keyword only

    def load(self, path: str) -> Any:
        with np.load(path) as file:
            return dict(file)

    def load_some(self, path: str, names: list[str]) -> Any:
        with np.load(path) as file:
            return [file[name] for name in names]


def _tensors(arrays: Arrays) -> dict[str, Any]:
    """Return tensors that share the arrays' memory; torch accepts bfloat16 only as integers with the same bits."""
    import torch

    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for name, array in arrays.items()
    }


class Torch(Peer):
    name = "torch.save"
    needs = ("torch",)
    mmap = False

    def save(self, path: str, arrays: Arrays) -> None:
        import torch

        torch.save(_tensors(arrays), path)

    def load(self, path: str) -> Any:
        import torch

        loaded = torch.load(path, mmap=self.mmap, weights_only=True)
        return {name: tensor.clone() for name, tensor in loaded.items()} if self.mmap else loaded

    def load_some(self, path: str, names: list[str]) -> Any:
        import torch

        loaded = torch.load(path, mmap=self.mmap, weights_only=True)
        return [loaded[name].clone() for name in names]


class TorchMmap(Torch):
    name = "torch.save (mmap)"
    mmap = True

    def load_into(self, path: str, targets: Arrays) -> Any:
        import torch

        for name, tensor in torch.load(path, mmap=True, weights_only=True).items():
            np.copyto(targets[name], tensor.numpy())

    def row(self, path: str, name: str, index: int) -> Any:
        import torch

        return torch.load(path, mmap=True, weights_only=True)[name][index].clone()


class TorchDistributed(Peer):
    name = "torch DCP"
    needs = ("torch",)

    def save(self, path: str, arrays: Arrays) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, sync_files=False, single_file_per_rank=True, thread_count=1)
        dcp.save(_tensors(arrays), storage_writer=writer, no_dist=True)

    def load_into(self, path: str, targets: Arrays) -> Any:
        import torch.distributed.checkpoint as dcp

        dcp.load(_tensors(targets), storage_reader=dcp.FileSystemReader(path), no_dist=True)


class Zarr(Peer):
    name = "zarr-python"
    needs = ("zarr",)

    def save(self, path: str, arrays: Arrays) -> None:
        import zarr

        group = zarr.create_group(path)
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=array.shape, compressors=None)

    def load(self, path: str) -> Any:
        import zarr

        return {name: array[...] for name, array in zarr.open_group(path, mode="r").arrays()}

    def load_some(self, path: str, names: list[str]) -> Any:
        import zarr

        group: Any = zarr.open_group(path, mode="r")
        return [group[name][...] for name in names]


class TensorStore(Peer):
    name = "TensorStore zarr3"
    needs = ("tensorstore",)

    def save(self, path: str, arrays: Arrays) -> None:
        import tensorstore as ts

        stores = [
            ts.open(_zarr3(path, name), create=True, dtype=str(array.dtype), shape=array.shape)
            for name, array in arrays.items()
        ]
        for write in [s.result().write(a) for s, a in zip(stores, arrays.values(), strict=True)]:
            write.result()

    def load(self, path: str) -> Any:
        return dict(zip(names := os.listdir(path), self.load_some(path, names), strict=True))

    def load_some(self, path: str, names: list[str]) -> Any:
        import tensorstore as ts

        stores = [ts.open(_zarr3(path, name)) for name in names]
        return [read.result() for read in [store.result().read() for store in stores]]

    def row(self, path: str, name: str, index: int) -> Any:
        import tensorstore as ts

        return ts.open(_zarr3(path, name)).result()[index].read().result()


def _zarr3(path: str, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}", "file_io_sync": False}}


class Orbax(Peer):
    name = "Orbax"
    needs: tuple[str, ...] = ("orbax.checkpoint", "jax")

    def save(self, path: str, arrays: Arrays) -> None:
        import orbax.checkpoint as ocp

        ocp.PyTreeCheckpointer().save(os.path.abspath(path), arrays)

    def load(self, path: str) -> Any:
        import orbax.checkpoint as ocp

        return ocp.PyTreeCheckpointer().restore(os.path.abspath(path))


_ONEFLOW_TYPES = {"float32": "kFloat", "bfloat16": "kBFloat16", "int64": "kInt64"}


class PlainLoop(Peer):
    """OneFlow's layout, written and read the way OneFlow does."""

    name = "plain loop"

    def save(self, path: str, arrays: Arrays) -> None:
        os.mkdir(path)
        for name, array in arrays.items():
            os.mkdir(os.path.join(path, name))
            with open(os.path.join(path, name, "meta"), "w") as meta:
                dims = "".join(f"  dim: {extent}\n" for extent in array.shape)
                meta.write(f"shape {{\n{dims}}}\ndata_type: {_ONEFLOW_TYPES[array.dtype.name]}\n")
            with open(os.path.join(path, name, "out"), "wb") as out:
                out.write(array.tobytes())
        with open(os.path.join(path, "snapshot_done"), "w"):
            pass

    def load(self, path: str) -> Any:
        folders = [entry.path for entry in os.scandir(path) if entry.is_dir()]
        return {folder: np.fromfile(os.path.join(folder, "out"), np.uint8) for folder in folders}

    def load_some(self, path: str, names: list[str]) -> Any:
        return [np.fromfile(os.path.join(path, name, "out"), np.uint8) for name in names]


PEERS: tuple[type[Peer], ...] = (
    Varstore,
    Safetensors,
    Savez,
    Torch,
    TorchMmap,
    TorchDistributed,
    Zarr,
    TensorStore,
    Orbax,
    PlainLoop,
)
