"""What lies beside an encoded ``out``, so that zarr and TensorStore open the folder: ``zarr.json`` and a link.

They look for the shard under the name of a chunk, and take a file that they do not find for zeros. So there is never a
``zarr.json`` without the link.
"""

from __future__ import annotations

import contextlib
import os

from varstore.errors import FormatError
from varstore.layout.manifest import Entry, known_meta
from varstore.layout.shards import DOCUMENT, Level, Shard
from varstore.storage.directory import Directory

__all__ = ["check_companions", "link_chunk", "read_level", "shard_of"]

_LIMIT = 1 << 20
"""Bytes of a ``zarr.json``."""


def shard_of(entry: Entry, *, path: str) -> Shard | None:
    """Return the shard that an encoded variable's ``out`` is; None if numpy does not have its type."""
    meta = known_meta(entry, path=path)
    return None if meta.data_type.dtype is None else Shard(meta.shape, meta.data_type.dtype)


def read_level(directory: Directory, entry: Entry) -> Level:
    """Return the level of compression that ``zarr.json`` says.

    Raises:
        FormatError: the file is missing, or says anything but what varstore writes for this shape and type.
    """
    relative = f"{entry.folder}/{DOCUMENT}"
    text = directory.read_if_there(relative, limit=_LIMIT, variable=entry.name)
    shard = shard_of(entry, path=directory.path)
    level = shard.level(text) if shard and text is not None else None
    if level is None:
        raise FormatError(
            "zarr.json does not describe this variable as varstore does",
            path=directory.place(relative),
            variable=entry.name,
            found="nothing" if text is None else repr(text[:200].decode("utf-8", "replace")),
            hint="varstore reads the variable without it, zarr does not; `varstore pack` to a new path writes it again"
            if entry.witnessed
            else "restore it from a copy",
        )
    return level


def check_companions(directory: Directory, entry: Entry) -> None:
    """Check that zarr would find in the folder what varstore finds there.

    Raises:
        FormatError: ``zarr.json`` or the link to ``out`` is missing, or says something else.
    """
    read_level(directory, entry)
    shard = shard_of(entry, path=directory.path)
    assert shard is not None  # the level is known
    fd = directory.open(entry.folder, variable=entry.name, folder=True)
    try:
        found = repr(os.readlink(shard.link, dir_fd=fd))
    except FileNotFoundError:
        found = "nothing"
    except OSError:
        found = "something else"
    finally:
        os.close(fd)
    if found != repr("out"):
        raise FormatError(
            "zarr would read zeros: the link with the name of the chunk does not lead to out",
            path=directory.place(f"{entry.folder}/{shard.link}"),
            variable=entry.name,
            found=found,
            expected="a symbolic link to 'out'",
            hint="`varstore seal` makes it again; copies that drop links (zip, uploads) lose it"
            if found == "nothing"
            else "remove what has its name, and `varstore seal` makes it again",
        )


def link_chunk(directory: Directory, entry: Entry) -> None:
    """Make the link to ``out`` where it is missing, as after a copy that dropped links.

    Raises:
        OSError: the folder cannot be written to.
    """
    shard = shard_of(entry, path=directory.path)
    fd = directory.open(entry.folder, variable=entry.name, folder=True)
    try:
        with contextlib.suppress(FileExistsError):
            if shard is not None:
                os.symlink("out", shard.link, dir_fd=fd)
    finally:
        os.close(fd)
