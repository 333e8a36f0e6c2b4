"""The numbers by which files are known, each where both who recognises and who reads a format find it."""

from __future__ import annotations

__all__ = ["NPY", "TORCH_LEGACY", "TORCH_LEGACY_PICKLED", "is_megengine_graph", "is_tar"]

NPY = b"\x93NUMPY"

TORCH_LEGACY = 0x1950A86A20F9469CFC6C
"""The first pickle of PyTorch's format of before 1.6 (torch/serialization.py, MAGIC_NUMBER)."""
TORCH_LEGACY_PICKLED = b"\x8a\x0a" + TORCH_LEGACY.to_bytes(10, "little")
"""The same as it stands in the file: the opcode LONG1 and ten bytes."""


def is_tar(head: bytes) -> bool:
    """Tell whether a file that begins so is a tar archive, as PyTorch's files of before 0.1.10 are."""
    return head[257:262] == b"ustar"


def is_megengine_graph(head: bytes) -> bool:
    """Tell whether a file that begins so is a graph that MegEngine dumped, of either version."""
    return head[8:12] == b"mgv2" or head[:4] == b"MGBC"
