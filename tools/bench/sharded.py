"""The peers of distributed checkpoints, which run in the processes that hold a state together (`tools.bench.ranks`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tools.bench import limits
from tools.bench.peers import Peer
from tools.bench.targets import LIMIT

State = Mapping[str, Any]
"""Maps names to tensors or DTensors."""
BARE = f"{LIMIT}bare calls"


class Part(NamedTuple):
    """The rectangle of an array that a process has: of which shape the array is, where it begins, and its values."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: np.ndarray

    def runs(self) -> Iterator[tuple[int, memoryview]]:
        """Yield where each run of bytes is in a file of the whole array, and its memory."""
        rows = self.values.reshape(len(self.values), -1).view(np.uint8)
        width = self.values.itemsize * int(np.prod(self.shape[1:]))
        if rows.shape[1] == width:
            yield self.offsets[0] * width, memoryview(rows.reshape(-1))  # type: ignore[arg-type]  # the stub of numpy
            return
        within = self.offsets[1] * self.values.itemsize
        for number, row in enumerate(rows, self.offsets[0]):
            yield number * width + within, row.data


Parts = Mapping[str, Part]


class Alone(NamedTuple):
    """The place of a process among those that work together; `group` is torch's, `wait` waits for the others."""

    rank: int
    size: int
    group: Any
    wait: Callable[[], object]


class Sharded(Peer):
    """One way to store what several processes hold; all of them call its methods, at once."""

    needs: tuple[str, ...] = ("torch",)

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:
        """Write a state."""
        raise NotImplementedError

    def load_sharded(self, path: str, state: State, parts: Parts, among: Alone) -> None:
        """Read a state into its memory."""
        raise NotImplementedError


class ShardedVarstore(Sharded):
    name = "varstore"

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:  # noqa: ARG002
        from varstore.adapters.torch_distributed import save

        save(path, state, durable=durable)

    def load_sharded(self, path: str, state: State, parts: Parts, among: Alone) -> None:  # noqa: ARG002
        from varstore.adapters.torch_distributed import load

        load(path, state, process_group=among.group)


class ShardedTorch(Sharded):
    """torch's own format; as everywhere, with the options that are fastest."""

    name = "torch DCP"

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:  # noqa: ARG002
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(path, sync_files=durable))

    def load_sharded(self, path: str, state: State, parts: Parts, among: Alone) -> None:  # noqa: ARG002
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(path), process_group=among.group)


class HuggingFace(Sharded):
    """Files of safetensors: one per process."""

    name = "Hugging Face, sharded"
    needs = ("torch", "safetensors")
    consolidates = False

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:  # noqa: ARG002
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(
            path,
            save_distributed=True,
            enable_consolidation=self.consolidates,
            thread_count_consolidation=limits.threads(),
        )
        writer.sync_files = durable
        dcp.save(dict(state), storage_writer=writer)

    def load_sharded(self, path: str, state: State, parts: Parts, among: Alone) -> None:  # noqa: ARG002
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(state), storage_reader=dcp.HuggingFaceStorageReader(path), process_group=among.group)


class HuggingFaceConsolidated(HuggingFace):
    """One file of safetensors, which the first process makes of those of all; it is not made durable by itself."""

    name = "Hugging Face, consolidated"
    consolidates = True

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:
        super().save_sharded(path, state, parts, among, durable=durable)
        if durable and among.rank == 0:
            for entry in os.scandir(path):
                if entry.is_file():
                    with open(entry.path, "rb") as file:
                        os.fsync(file.fileno())


class Bare(Sharded):
    """Only the system calls of the layout, without hashing or anything else: a folder per variable, ``meta``, ``out``.

    Each process has as many threads as its share of the processors.
    """

    name = BARE

    def save_sharded(self, path: str, state: State, parts: Parts, among: Alone, *, durable: bool) -> None:  # noqa: ARG002
        if among.rank == 0:
            os.mkdir(path)
        among.wait()
        folder = os.open(path, os.O_RDONLY)
        for number, name in enumerate(parts):
            if number % among.size == among.rank:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=folder)
                limits.bare_write(f"{name}/meta", limits.META, folder)
        self._each(partial(self._write, folder), parts, among)
        if durable:
            limits.flush(path)
        os.close(folder)

    def _write(self, folder: int, name: str, part: Part) -> None:
        flags = os.O_WRONLY | os.O_CREAT
        try:
            fd = os.open(f"{name}/out", flags, 0o644, dir_fd=folder)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=folder)
            fd = os.open(f"{name}/out", flags, 0o644, dir_fd=folder)
        for offset, memory in part.runs():
            for start in range(0, len(memory), limits.CHUNK):
                os.pwrite(fd, memory[start : start + limits.CHUNK], offset + start)
        os.close(fd)

    def load_sharded(self, path: str, state: State, parts: Parts, among: Alone) -> None:  # noqa: ARG002
        folder = os.open(path, os.O_RDONLY)
        self._each(partial(self._read, folder), parts, among)
        os.close(folder)

    def _read(self, folder: int, name: str, part: Part) -> None:
        fd = os.open(f"{name}/out", os.O_RDONLY, dir_fd=folder)
        for offset, memory in part.runs():
            for start in range(0, len(memory), limits.BLOCK):
                os.preadv(fd, [memory[start : start + limits.BLOCK]], offset + start)
        os.close(fd)

    def _each(self, do: Callable[[str, Part], None], parts: Parts, among: Alone) -> None:
        workers = max(1, limits.threads() // among.size)
        if workers == 1:
            for name, part in parts.items():
                do(name, part)
            return
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(do, name, part) for name, part in parts.items()]:
                done.result()


SHARDED: Sequence[type[Sharded]] = (ShardedVarstore, ShardedTorch, HuggingFace, HuggingFaceConsolidated)
