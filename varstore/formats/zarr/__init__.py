"""Zarr trees, and Orbax checkpoints, which consist of zarr arrays."""

from varstore.formats.zarr.tree import read, write

__all__ = ["read", "write"]
