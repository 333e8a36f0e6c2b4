"""Metadata in JSON: an object whose parsing is paid for."""

from __future__ import annotations

import json
from typing import Any

from varstore.errors import FormatError
from varstore.formats.binary.budget import Budget

__all__ = ["parse_json"]

_COST = 24
"""The bytes of memory that a byte of JSON takes at most."""


def parse_json(text: bytes, budget: Budget, *, path: str) -> dict[str, Any]:
    """Return the JSON object in a file of metadata.

    Raises:
        FormatError: it is not JSON, or not an object.
    """
    budget.charge(_COST * len(text))
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("the metadata is not valid JSON", path=path, found=str(error)) from None
    if not isinstance(fields, dict):
        raise FormatError("the metadata must be a JSON object", path=path)
    return fields
