"""What is known not to hold on some file systems, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["KNOWN"]

KNOWN: Final[Mapping[str, Mapping[str, str]]] = {}
