"""Zarr trees, and the Orbax checkpoints that are made of them."""

from varstore.formats.zarr.tree import read, write

__all__ = ["read", "write"]
