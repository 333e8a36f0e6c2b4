"""What the page shows of a checkpoint, as JSON data: names, statistics, pictures, attributes, and what is compared.

All text is made printable here: control characters and those that change the direction of text become escapes, and what
is long is cut.
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

import varstore as vs
from varstore.text.escape import one_line

__all__ = ["HEAT_MAPS", "bins_of", "described", "looked_at", "number_of", "survey"]

HEAT_MAPS = 500
"""Matrices of which a heat map is made, the largest."""
_NAME = 1000
_LINE = 2000
_ATTRIBUTES = 20_000
_ALL_ATTRIBUTES = 2_000_000
"""Characters of the attributes of all variables together."""
_EXACT = 1 << 53
"""Integers from here on are not exact in JavaScript."""


def survey(path: str, opened: Any, *, progress: bool = False) -> dict[str, Any]:
    """Look at all values of what was opened at a path, and return the data of the page.

    Raises:
        VarstoreError: it cannot be read; see `varstore.stats`.
    """
    data = described(path, opened)
    report = vs.stats(opened, quantiles=False, histograms=True, heat_maps=HEAT_MAPS, progress=progress)
    numbers = {name: number for number, name in enumerate(opened)}
    for name, row in zip(opened, data["variables"], strict=True):
        if name in report:
            row |= looked_at(report[name], numbers)
        else:
            row["left"] = one_line(report.left_out[name], _LINE)
    return data


def described(path: str, opened: Any) -> dict[str, Any]:
    """Return the data of the page without anything that values have to be read for."""
    names = [one_line(name, _NAME) for name in opened]
    limit = max(200, min(_ATTRIBUTES, _ALL_ATTRIBUTES // max(1, len(names))))
    own = [_text_of(getattr(array, "attributes", {}), limit) for array in opened.values()]
    rows = [
        {
            "name": shown,
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "count": math.prod(array.shape),
            "nbytes": int(array.nbytes),
            **({"attributes": attributes} if attributes else {}),
        }
        for shown, array, attributes in zip(names, opened.values(), own, strict=True)
    ]
    for number, first in _tied(opened):
        rows[number]["tied"] = first
    files = getattr(opened, "files", {})
    return {
        "title": one_line(os.path.basename(os.path.abspath(path))),
        "path": one_line(path, _NAME),
        "format": one_line(opened.format),
        "made": f"varstore {vs.__version__}, {time.strftime('%Y-%m-%d %H:%M %z')}",
        "attributes": _text_of(opened.attributes, _ATTRIBUTES),
        "separator": "/" if any("/" in name for name in names) else ".",
        "variables": rows,
        "files": [[one_line(file.name, _NAME), one_line(file.kind), file.nbytes] for file in files.values()],
    }


def looked_at(found: vs.Statistics, numbers: Mapping[str, int]) -> dict[str, Any]:
    """Return what the page shows of the values of a variable; `numbers` are those of the variables by name."""
    row: dict[str, Any] = {name: getattr(found, name) for name in ("zeros", "nan", "inf")}
    row |= {name: number_of(getattr(found, name)) for name in ("min", "max", "mean", "std", "norm")}
    row["marks"] = list(found.marks)
    row["dead"] = found.dead_rows
    if found.duplicate_of is not None:
        row["same"] = numbers[found.duplicate_of]
    if found.histogram is not None:
        row["bins"] = bins_of(found)
    if found.heat_map is not None:
        heat = found.heat_map
        row["map"] = {
            "shape": list(heat.shape),
            "blocks": list(heat.means.shape),
            "means": _shades(heat.means, 127, 128),
            "magnitudes": _shades(heat.magnitudes, 254, 1),
        }
    return row


def bins_of(found: vs.Statistics) -> list[Any]:
    """Return the histogram of a variable that has one."""
    bins = found.histogram
    assert bins is not None
    return [number_of(bins.start), number_of(bins.width), list(bins.counts)]


def _shades(values: np.ndarray, steps: int, middle: int) -> list[Any]:
    """Return the largest magnitude, and a byte for each value, as base64: 0 is nan, `middle` is zero."""
    largest = float(np.nan_to_num(np.abs(values)).max())
    scaled = values / largest if largest else values
    codes = np.where(np.isnan(values), 0, np.rint(np.nan_to_num(scaled) * steps) + middle).astype(np.uint8)
    return [largest, base64.b64encode(codes.tobytes()).decode("ascii")]


def number_of(value: Any) -> Any:
    """Return a number as JSON can hold it: as text where JavaScript or JSON would change it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, int) and abs(value) >= _EXACT else value


def _tied(opened: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of the variables that share their values with an earlier one, and that of the earlier one."""
    first: dict[Hashable, int] = {}
    for number, (name, array) in enumerate(opened.items()):
        is_own = isinstance(array, vs.Variable)
        key = (array.entry.alias_of or name) if is_own else array.identity
        earlier = first.setdefault(key, number)
        if earlier != number:
            yield number, earlier


def _text_of(attributes: Mapping[str, Any], limit: int) -> str:
    if not attributes:
        return ""
    text = json.dumps(dict(attributes), indent=2, ensure_ascii=False, default=str)
    shown = text if len(text) <= limit else f"{text[:limit]} …"
    return "\n".join(one_line(line, _LINE) for line in shown.split("\n"))
