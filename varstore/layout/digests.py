"""What one digest covers: 16 MiB of a file or of values, the last of them perhaps less (FORMAT, "Terms")."""

from __future__ import annotations

__all__ = ["BLOCK", "DIGEST_SIZE", "in_hex"]

BLOCK = 16 << 20
"""The number of bytes that each digest covers."""
DIGEST_SIZE = 16


def in_hex(digests: bytes) -> list[str]:
    """Return digests that follow each other as text, as ``xxhsum -H2`` prints them."""
    return [digests[start : start + DIGEST_SIZE].hex() for start in range(0, len(digests), DIGEST_SIZE)]
