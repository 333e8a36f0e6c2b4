"""Stored bytes that are compared with their digests before anybody decodes them.

Digests cover blocks of 16 MiB, and the chunks that one thread decodes lie in two of them or three, which other threads
read too. So threads share the blocks of a variable: each is read and compared once, by the first thread that asks, and
what is decoded is the very memory that was compared.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

import numpy as np

from varstore.disk.blocks import read_block
from varstore.disk.encodings.stored import Stored
from varstore.disk.read.checks import check_digest
from varstore.layout.manifest import BLOCK, Entry
from varstore.layout.readable import Readable
from varstore.storage.directory import Directory

__all__ = ["stored_blocks"]

_KEPT = 3
"""Blocks that stay in memory for each thread, and for the next one: two with its chunks, and the one with the index."""


def stored_blocks(directory: Directory, variable: Readable) -> Callable[[int], Stored]:
    """Return what gives a thread the stored bytes of a variable, given a descriptor of its ``out``.

    Those of an encoded variable are compared with their digests, if it has any. Plain values are compared by whoever
    reads them, where they are read to.

    Raises:
        DigestMismatch: from what it returns, when bytes are read that are not those that were saved.
    """
    if variable.encoding.is_plain or not variable.entry.digests:
        return Stored
    return partial(_Compared, _Blocks(directory, variable.entry))


class _Blocks:
    """The blocks of one variable's ``out``, for several threads."""

    def __init__(self, directory: Directory, entry: Entry) -> None:
        self._directory = directory
        self._entry = entry
        self._lock = threading.Lock()
        self._blocks: WeakValueDictionary[int, _Block] = WeakValueDictionary()
        self._kept: deque[_Block] = deque(maxlen=_KEPT)

    def block(self, fd: int, number: int) -> _Block:
        """Return a block whose bytes are those that were saved.

        Raises:
            DigestMismatch: they are not.
        """
        with self._lock:
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = _Block()
            self._kept.append(block)
        with block.lock:
            if block.content is None:
                start = number * BLOCK
                content = np.empty(min(BLOCK, self._entry.nbytes - start), np.uint8)
                found = read_block(fd, content, start, hashed=True)
                check_digest(self._directory, self._entry, self._entry.digests, number, found)
                block.content = content.data
        return block


class _Block:
    """The bytes of a block; None until they are read and compared, by the thread that holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.content: memoryview | None = None


class _Compared(Stored):
    """Stored bytes for one thread."""

    def __init__(self, blocks: _Blocks, fd: int) -> None:
        super().__init__(fd)
        self._blocks = blocks
        self._held: dict[int, _Block] = {}
        """Those that this thread read in last; the needs of others do not let go of them."""

    def read(self, nbytes: int, offset: int) -> bytes | memoryview:
        parts, stop = [], offset + nbytes
        while offset < stop:
            number, begin = divmod(offset, BLOCK)
            block = self._held.pop(number) if number in self._held else self._blocks.block(self.fd, number)
            self._held[number] = block
            if len(self._held) > _KEPT:
                del self._held[next(iter(self._held))]
            assert block.content is not None  # it was compared
            parts.append(block.content[begin : begin + stop - offset])
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)
