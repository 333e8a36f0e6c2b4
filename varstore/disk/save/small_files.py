"""The small files of a save: each ``meta``, and each ``out`` of less than a mebibyte, many of them in one job.

Thousands of small files cost calls, not bytes, and a call that the kernel answers at once is answered soonest to
one thread alone: several threads that make such calls spend more on handing the interpreter to each other than
they win. On a file system whose calls wait, for a disk or a server, several threads wait at the same time. So the
first batches are written by the thread that makes the jobs; once a batch turns out slow, or other threads are at
work anyhow, batches become jobs for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import xxhash

from varstore.disk.blocks import lies_as_out, write_block
from varstore.disk.save.staging import Place
from varstore.disk.threads import Job
from varstore.layout.meta import encode_meta
from varstore.storage import syscalls
from varstore.values.plan import PlannedVariable

__all__ = ["SmallFiles"]

_BATCH_BYTES = 8 << 20
_QUICK = 100e-6
"""Seconds for the files of one variable; of calls that take longer, the kernel or a server does most."""

_Batch = list[tuple[PlannedVariable, np.ndarray]]


class SmallFiles:
    """Writes ``meta`` files at once and small ``out`` files in batches; their digests go to `digests`, by name."""

    def __init__(
        self,
        staging: Place,
        digests: dict[str, bytes],
        advance: Callable[[int], None] | None,
        batch: int,
        make: Callable[[Iterable[PlannedVariable]], None] | None,
    ) -> None:
        """Prepare to write variables, so many in one batch.

        Where calls wait for a server, `make` makes the folders of a batch, and all is done by the jobs.
        """
        self._fd = staging.fd
        self._create = partial(syscalls.create_each, dir_fd=staging.fd, private=staging.is_private)
        self._sync = staging.durability.each
        self._digests = digests
        self._advance = advance
        self._batch: _Batch = []
        self._nbytes = 0
        self._limit = batch
        self._calls_are_slow = make is not None
        self._make = make

    def write_meta(self, variable: PlannedVariable) -> None:
        """Write what says the variable's shape and type."""
        syscalls.write_file(variable.folder + "/meta", encode_meta(variable.meta), self._fd, durable=self._sync)

    def add(self, variable: PlannedVariable, array: np.ndarray) -> bool:
        """Note a variable to be written; True where that makes a batch, and `jobs` is to be called."""
        self._batch.append((variable, array))
        self._nbytes += variable.nbytes
        return len(self._batch) == self._limit or self._nbytes >= _BATCH_BYTES

    def jobs(self, *, threads_take: bool) -> Iterator[Job]:
        """Write what was added since the last call, or yield the job that does.

        It is yielded where threads help, and where `threads_take` says that they decide: others are at work, or have
        failed, and nothing more is to be written.
        """
        batch, self._batch, self._nbytes = self._batch, [], 0
        if not batch:
            return
        if self._calls_are_slow or threads_take:
            yield partial(self._make_and_write if self._make else self._write, batch)
        else:
            start = time.perf_counter()
            self._write(batch)
            self._calls_are_slow = time.perf_counter() - start > _QUICK * len(batch)

    def _make_and_write(self, batch: _Batch) -> None:
        assert self._make is not None
        self._make(variable for variable, _ in batch)
        self._write(batch)

    def _write(self, batch: _Batch) -> None:
        durable = self._sync
        created = self._create([variable.folder + name for name in ("/meta", "/out") for variable, _ in batch])
        for (variable, _), fd in zip(batch, created, strict=False):  # each meta, and then each out
            try:
                syscalls.write_all(fd, encode_meta(variable.meta))
                if durable:
                    syscalls.sync(fd)
            finally:
                os.close(fd)
        plain = [lies_as_out(array) for _, array in batch]
        for (variable, array), is_plain, fd in zip(batch, plain, created, strict=True):
            try:
                values: Any = array  # numpy's types say that it is a buffer from Python 3.12 on
                if not array.nbytes:
                    digest = b""
                elif is_plain and os.write(fd, values) == array.nbytes:
                    digest = xxhash.xxh3_128_digest(values)
                else:
                    digest = write_block(fd, array, 0, array.nbytes)
                if durable:
                    syscalls.sync(fd)
            finally:
                os.close(fd)
            self._digests[variable.name] = digest
        if self._advance:
            self._advance(sum(array.nbytes for _, array in batch))
