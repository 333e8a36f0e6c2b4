"""The zarr library, and a store for it that stays within one folder whatever links lie there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from varstore.errors import MissingDependency, UnsafeContent

__all__ = ["library", "store_of"]


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


def store_of(path: str, root: str, overrides: Mapping[str, bytes]) -> Any:
    """Return a read-only store below `root` (a real path); keys of `overrides` have that content instead."""
    from zarr.storage import LocalStore

    prefix = root.rstrip(os.sep) + os.sep

    class Inside(LocalStore):
        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            if key in overrides and byte_range is None:
                return prototype.buffer.from_bytes(overrides[key])
            real = os.path.realpath(os.path.join(root, key))
            if not real.startswith(prefix):
                raise UnsafeContent("a path leads out of the tree", path=path, found=f"{key!r} -> {real!r}")
            return await super().get(key, prototype, byte_range)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
            return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    return Inside(root, read_only=True)
