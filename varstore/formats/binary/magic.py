"""The magic numbers that identify files, shared by the code that detects formats and the code that reads them."""

from __future__ import annotations

__all__ = [
    "LOAD_FROM_BYTES",
    "MEGENGINE_DUMP",
    "NPY",
    "TORCH_LEGACY",
    "TORCH_LEGACY_PICKLED",
    "is_megengine_graph",
    "is_tar",
]

NPY = b"\x93NUMPY"

TORCH_LEGACY = 0x1950A86A20F9469CFC6C
"""The value of the first pickle in PyTorch's format before version 1.6 (MAGIC_NUMBER in torch/serialization.py)."""
TORCH_LEGACY_PICKLED = b"\x8a\x0a" + TORCH_LEGACY.to_bytes(10, "little")
"""The same number as bytes of the file: the opcode LONG1, a length and ten bytes."""
LOAD_FROM_BYTES = b"_load_from_bytes"
"""The name of what a pickle that `pickle.dump` made of tensors calls for the storage of each."""

MEGENGINE_DUMP = b"mgv2"
"""The identifier of MegEngine's FlatBuffers, behind their size and the offset of the first table."""


def is_tar(head: bytes) -> bool:
    """Return whether a file with these first bytes is a tar archive, as PyTorch wrote before version 0.1.10."""
    return head[257:262] == b"ustar"


def is_megengine_graph(head: bytes) -> bool:
    """Return whether a file with these first bytes is a graph that MegEngine dumped, in either of its two formats."""
    return head[8:12] == MEGENGINE_DUMP or head[:4] in (b"MGBC", b"MGBS")
