"""Import the zarr library, and restrict what it reads to one array of a tree."""

from __future__ import annotations

import os
from typing import Any

from varstore.errors import CheckpointNotFound, MissingDependency, UnsafeContent
from varstore.formats.binary.source import Source

__all__ = ["V2_ARRAY", "V2_ATTRIBUTES", "V2_GROUP", "V3", "check_folder", "inside", "library", "store_of"]

V3, V2_ARRAY, V2_GROUP, V2_ATTRIBUTES = "zarr.json", ".zarray", ".zgroup", ".zattrs"
_METADATA = {V3, V2_ARRAY, V2_GROUP, V2_ATTRIBUTES, ".zmetadata"}


def library(path: str) -> Any:
    """Import zarr.

    Raises:
        MissingDependency: it is not installed, or older than version 3.
    """
    try:
        import zarr
    except ImportError as error:
        raise MissingDependency(
            "zarr trees require the zarr library", path=path, hint="install it: pip install varstore[zarr]"
        ) from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise MissingDependency(
            "zarr trees require zarr 3",
            path=path,
            found=zarr.__version__,
            expected="3.0.8 or later",
            hint="install it: pip install varstore[zarr]",
        )
    return zarr


def check_folder(path: str, folder: str, name: str) -> None:
    """Check that zarr does not rewrite the name of a folder, because it would read a folder that was not checked.

    Raises:
        UnsafeContent: a part is empty, ``.`` or ``..``, or there is a backslash, which zarr changes to a slash.
    """
    if not _is_plain(folder):
        raise UnsafeContent(
            "the zarr library would read another folder instead of this one",
            path=path,
            variable=name,
            found=repr(folder),
        )


def inside(root: str, path: str, name: str) -> str:
    """Return the real path of a file or folder below `root`, which is a real path itself.

    Raises:
        UnsafeContent: it is not below `root`.
    """
    real = os.path.realpath(os.path.join(root, name))
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise UnsafeContent("a path leads out of the tree", path=path, found=f"{name!r} -> {real!r}")
    return real


def store_of(path: str, root: str, folder: str, metadata: tuple[str, bytes]) -> Any:
    """Return a read-only store with a single array: the one in `folder` below `root`, which is a real path.

    The store returns `metadata`, a file name and the content that was checked, and never reads metadata from disk. The
    chunks are the regular files below the folder.
    """
    from zarr.abc import store as abc

    known = {_joined(folder, metadata[0]): _Bytes(metadata[1])}

    class OneArray(abc.Store):
        supports_writes = supports_deletes = supports_partial_writes = supports_listing = False

        def __eq__(self, other: object) -> bool:
            return self is other

        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            content = self._content(key)
            if content is None:
                return None
            start, stop = _range(byte_range, content.size, abc)
            return prototype.buffer.from_bytes(content.read(start, stop - start))

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
            return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

        async def exists(self, key: str) -> bool:
            return self._content(key) is not None

        def _content(self, key: str) -> Source | _Bytes | None:
            if key in known:
                return known[key]
            if os.path.basename(key) in _METADATA:
                return None
            if not (_is_plain(key) and key.startswith(_joined(folder, ""))):
                raise UnsafeContent(
                    "the zarr library asks for a file that does not belong to the array", path=path, found=repr(key)
                )
            try:
                return Source(inside(root, path, key))
            except CheckpointNotFound:  # a chunk that was never written
                return None

        def _refuse(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("the store contains one array, which can only be read")

        set = delete = set_partial_values = list = list_prefix = list_dir = _refuse

    return OneArray(read_only=True)


class _Bytes:
    """Bytes in memory, with the interface of `Source`."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]


def _range(byte_range: Any, size: int, abc: Any) -> tuple[int, int]:
    """Return the first byte and the end of a requested range in a file of this size."""
    start, stop = 0, size
    if isinstance(byte_range, abc.RangeByteRequest):
        start, stop = byte_range.start, byte_range.end
    elif isinstance(byte_range, abc.OffsetByteRequest):
        start = byte_range.offset
    elif isinstance(byte_range, abc.SuffixByteRequest):
        start = size - byte_range.suffix
    start = min(max(start, 0), size)
    return start, min(max(start, stop), size)


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_plain(key: str) -> bool:
    """Return whether zarr uses a key unchanged."""
    return "\\" not in key and not {"", ".", ".."} & set(key.split("/"))
