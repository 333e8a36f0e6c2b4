"""What one digest covers: 16 MiB of a file or of values, the last of them perhaps less (FORMAT, "Terms")."""

from __future__ import annotations

__all__ = ["BLOCK", "DIGEST_SIZE"]

BLOCK = 16 << 20
"""The number of bytes that each digest covers."""
DIGEST_SIZE = 16
