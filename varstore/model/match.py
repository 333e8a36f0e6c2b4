"""Compare a source with targets: names, shapes and data types go in, and a `Match` says what loading will do.

Nothing is read, changed or refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from varstore.values.arrays import Source, Stored
from varstore.values.select import Patterns

__all__ = [
    "Match",
    "Mismatch",
    "Missing",
    "OnMismatch",
    "OnTied",
    "Pair",
    "Shape",
    "SourceSpec",
    "Spec",
    "common_corner",
    "compare",
    "is_same_kind",
    "is_same_type",
    "is_transposed",
    "spec_of",
]

OnMismatch: TypeAlias = Literal["error", "skip", "overlap"]
OnTied: TypeAlias = Literal["error", "first", "last"]
Missing: TypeAlias = Patterns | None
"""Patterns of targets that need not be loaded; the word "error" alone: all must be."""
How: TypeAlias = Literal["exact", "cast", "overlap"]
Shape: TypeAlias = tuple[int, ...]
Spec: TypeAlias = tuple[Shape, np.dtype[Any]]
SourceSpec: TypeAlias = tuple[Shape | None, np.dtype[Any] | None]

_KINDS = "buifc"
_ML_KINDS = (("uint", "u"), ("int", "i"), ("float", "f"), ("bfloat", "f"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A variable that source and target both have, and that cannot be loaded as it is; `name` is the target's."""

    name: str
    source_name: str
    source_shape: Shape
    target_shape: Shape
    source_dtype: np.dtype[Any]
    target_dtype: np.dtype[Any]

    def __str__(self) -> str:
        sides = [[str(self.source_shape), str(self.source_dtype)], [str(self.target_shape), str(self.target_dtype)]]
        if is_same_type(self.source_dtype, self.target_dtype):
            sides = [side[:1] for side in sides]
        elif self.source_shape == self.target_shape:
            sides = [side[1:] for side in sides]
        note = ", transposed" if is_transposed(self.source_shape, self.target_shape) else ""
        return " -> ".join(" ".join(side) for side in sides) + note


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One variable to load.

    `how` is "exact" if the bytes can be copied as they are, "cast" if the values are converted, even if only in byte
    order, and "overlap" if only `common` is copied, the corner that both shapes share; it is converted if the types
    differ.
    """

    target: str
    source: str
    how: How
    source_shape: Shape
    target_shape: Shape
    source_dtype: np.dtype[Any]
    target_dtype: np.dtype[Any]
    common: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What loading will do: load `pairs`. `kept` are targets that the source does not have, `unused` the opposite."""

    pairs: tuple[Pair, ...]
    kept: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()


def spec_of(source: Source) -> SourceSpec:
    """Return the shape and type of a source; both None for a variable that does not have a ``meta`` file."""
    if not isinstance(source, Stored):
        return source.shape, source.dtype
    return (None, None) if source.entry.meta is None else (source.entry.meta.shape, source.dtype)


def compare(
    targets: Mapping[str, Spec],
    sources: Mapping[str, SourceSpec],
    selected: Mapping[str, str],
    *,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
) -> Match:
    """Decide for every target and every selected source whether and how it is loaded.

    A spec is (shape, dtype). None in a source's spec is unknown (no ``meta``) and is taken from the target. Sources
    that are not `selected` do not count as `unused`. ``on_mismatch="overlap"`` allows shapes with equally many
    dimensions that share a non-empty corner. ``cast=True`` allows what numpy calls "same_kind": from bool to unsigned
    to signed to floating to complex, and between sizes, for the types of `ml_dtypes` too. A different byte order is
    not a mismatch. What still does not fit is `mismatched`.
    """
    pairs: list[Pair] = []
    unused: list[str] = []
    mismatched: list[Mismatch] = []
    for name, source in selected.items():
        if name not in targets:
            unused.append(source)
            continue
        (shape, dtype), (known_shape, known_dtype) = targets[name], sources[source]
        source_shape = shape if known_shape is None else known_shape
        source_dtype = dtype if known_dtype is None else known_dtype
        common = common_corner(source_shape, shape) if on_mismatch == "overlap" or source_shape == shape else None
        fits = is_same_type(source_dtype, dtype) or (cast and is_same_kind(source_dtype, dtype))
        sides: dict[str, Any] = {
            "source_shape": source_shape,
            "target_shape": shape,
            "source_dtype": source_dtype,
            "target_dtype": dtype,
        }
        if common is None or not fits:
            mismatched.append(Mismatch(name=name, source_name=source, **sides))
        else:
            how: How = "overlap" if source_shape != shape else "exact" if source_dtype == dtype else "cast"
            pairs.append(Pair(target=name, source=source, how=how, common=common, **sides))
    kept = tuple(name for name in targets if name not in selected)
    return Match(pairs=tuple(pairs), kept=kept, unused=tuple(unused), mismatched=tuple(mismatched))


def is_same_type(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Tell whether two types hold the same values, whatever their byte order."""
    return source == target or source.newbyteorder("=") == target.newbyteorder("=")


def is_same_kind(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Tell whether ``cast=True`` converts a type to another one."""
    return 0 <= _rank(source) <= _rank(target)


def _rank(dtype: np.dtype[Any]) -> int:
    """Return the index of a type's kind in "buifc", or -1; ``np.can_cast`` does not know all types of `ml_dtypes`."""
    name = dtype.name
    kind = dtype.kind if dtype.kind in _KINDS else next((k for ml, k in _ML_KINDS if name.startswith(ml)), "none")
    return _KINDS.find(kind)


def is_transposed(source: Shape, target: Shape) -> bool:
    """Tell whether two shapes have the same extents in another order, as the weights of other frameworks do."""
    return source != target and sorted(source) == sorted(target)


def common_corner(source: Shape, target: Shape) -> Shape | None:
    """Return the shape of the corner that two shapes share; None if they share none."""
    if source == target:
        return target
    corner = tuple(map(min, source, target))
    return corner if len(source) == len(target) and 0 not in corner else None
