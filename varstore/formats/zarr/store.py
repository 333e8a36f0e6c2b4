"""The zarr library, and a store for it that holds one array of a tree and nothing else."""

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
        MissingDependency: it is not installed, or older than 3.
    """
    try:
        import zarr
    except ImportError as error:
        raise MissingDependency(
            "zarr trees need the zarr library", path=path, hint="install it: pip install varstore[zarr]"
        ) from error
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise MissingDependency(
            "zarr trees need zarr 3",
            path=path,
            found=zarr.__version__,
            expected="3.0.8 or newer",
            hint="install it: pip install varstore[zarr]",
        )
    return zarr


def check_folder(path: str, folder: str, name: str) -> None:
    """Refuse a folder that zarr would read as another: it could hold anything, and only this one is checked.

    Raises:
        UnsafeContent: a part that is empty, ``.`` or ``..``, or a backslash, which zarr takes for a slash.
    """
    if not _is_plain(folder):
        raise UnsafeContent(
            "the zarr library would read another folder than this one",
            path=path,
            variable=name,
            found=repr(folder),
        )


def inside(root: str, path: str, name: str) -> str:
    """Return the real path of what lies below `root`, itself a real path.

    Raises:
        UnsafeContent: it lies elsewhere.
    """
    real = os.path.realpath(os.path.join(root, name))
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise UnsafeContent("a path leads out of the tree", path=path, found=f"{name!r} -> {real!r}")
    return real


def store_of(path: str, root: str, folder: str, metadata: tuple[str, bytes]) -> Any:
    """Return a read-only store that holds one array and nothing else: the node at `folder` below `root`, a real path.

    Its metadata is what was checked, under its file's name and without a look at the disk; no other metadata exists.
    Its chunks are the regular files below the folder.
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
                raise UnsafeContent("the zarr library asks for what is not the array's", path=path, found=repr(key))
            try:
                return Source(inside(root, path, key))
            except CheckpointNotFound:  # a chunk that was never written
                return None

        def _refuse(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("one array, to be read")

        set = delete = set_partial_values = list = list_prefix = list_dir = _refuse

    return OneArray(read_only=True)


class _Bytes:
    """Bytes that are read as a `Source` is."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]


def _range(byte_range: Any, size: int, abc: Any) -> tuple[int, int]:
    """Return which bytes of a file of this size are asked for."""
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
    """Tell whether zarr leaves a key as it is."""
    return "\\" not in key and not {"", ".", ".."} & set(key.split("/"))
