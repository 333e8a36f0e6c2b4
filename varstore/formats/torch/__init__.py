"""PyTorch's files: the zip format (since 1.6), the older sequence of pickles, and distributed checkpoint folders.

Reading and writing do not need torch, and reading does not run code from the file. Files are written in the plainest
form of the zip format, which `torch.load` accepts with ``weights_only=True`` and ``mmap=True``.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""

from __future__ import annotations

import os
import stat

from varstore.errors import FormatError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.magic import LOAD_FROM_BYTES, TORCH_LEGACY_PICKLED, is_tar
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import is_zip
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Unknown
from varstore.formats.torch.distributed import read_distributed
from varstore.formats.torch.export import read_archive
from varstore.formats.torch.legacy import read_legacy, read_pickle
from varstore.formats.torch.write import write
from varstore.storage.looking import kind_of

__all__ = ["opened", "read", "write"]

_SHOWN = 1 << 16


def read(
    path: str | os.PathLike[str], *, limit: int | None = None, encoding: str = "utf-8", unknown: Unknown = "opaque"
) -> ForeignCheckpoint:
    """Open a PyTorch file or distributed checkpoint folder; a whole module is read as its state dict.

    `unknown` says what becomes of names that varstore does not know: see `varstore.read`.

    Raises:
        UnsafeContent: the file asks to run code, or grows out of proportion to its size.
        FormatError: it is truncated or damaged, not a PyTorch file, or a tar archive as
            PyTorch wrote before version 0.1.10.
        SizeMismatch: a tensor extends beyond its storage.
        CheckpointNotFound: there is nothing at the path.
        StorageError: the operating system refused.
    """
    if kind_of(path) == stat.S_IFDIR:
        return read_distributed(os.fspath(path), limit=limit, encoding=encoding, unknown=unknown)
    return opened(Source(path), limit=limit, encoding=encoding, unknown=unknown)


def opened(
    source: Source,
    *,
    limit: int | None = None,
    folder: Budget | None = None,
    encoding: str = "utf-8",
    unknown: Unknown = "opaque",
) -> ForeignCheckpoint:
    """Open a file, as `read` does; `folder` is the budget of the folder that it is opened with."""
    budget = Budget.of(source, limit=limit, folder=folder)
    if is_zip(source):
        return read_archive(source, budget, encoding=encoding, unknown=unknown)
    if is_tar(source.bytes(0, min(512, source.size))):
        raise FormatError(
            "PyTorch's tar format, used before version 0.1.10, is not supported",
            path=source.path,
            hint="load it with torch and save it again",
        )
    head = source.bytes(0, min(_SHOWN, source.size))
    is_pickle = TORCH_LEGACY_PICKLED not in head[:16] and LOAD_FROM_BYTES in head
    return (read_pickle if is_pickle else read_legacy)(source, budget, encoding=encoding, unknown=unknown)
