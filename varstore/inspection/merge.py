"""Make one checkpoint of several: by links, which move no data, or by the means of their values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from varstore.disk.progress import Progress
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.digests import check_linked
from varstore.disk.read.parts import row_chunks
from varstore.disk.read.variable import Variable
from varstore.disk.save.foreign import Foreign
from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.formats.native import nested, parts_of
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.inspection.moments import is_numeric
from varstore.inspection.pieces import Pieces, memory_of
from varstore.layout.attached import refused_name
from varstore.layout.readable import readable
from varstore.model.options import Path
from varstore.model.store import save
from varstore.training.tree import joined, prune
from varstore.values.arguments import check_names, checked, checked_path, described
from varstore.values.arrays import Source, as_source
from varstore.values.attached import is_usable
from varstore.values.casting import cast_values, is_floating
from varstore.values.lazy import LazyArray
from varstore.values.nodes import leaves
from varstore.values.select import Patterns, Rename, select

__all__ = ["merge"]

Sources: TypeAlias = Path | Checkpoint | Mapping[str, Any] | Iterable[Path | Checkpoint | Mapping[str, Any]]
_WIDEST_FLOAT32 = 4
"""Bytes of the floating-point types whose means are taken in float32."""


@checked
def merge(
    target: Path,
    sources: Sources,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    last_wins: bool = False,
    average: bool = False,
    weights: Iterable[float] | None = None,
    verify: bool = False,
    overwrite: bool = False,
    foreign: Foreign = "error",
    durable: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Checkpoint:
    """Make a new checkpoint of the variables of several, by links: no data moves.

    One source can be given too, to choose from it or to rename. Variables of files of other formats are copied.
    Attributes and attached files are kept, with those of variables; of a name that several sources have with different
    content, only if the last one wins. Nested state is joined where nothing is chosen or renamed. `left_out` of what is
    returned names the attributes, files and leaves of state that the new checkpoint does not have.

    Args:
        target: a path that does not exist, or an empty directory.
        sources: one or several: checkpoints, paths that `varstore.read` opens, or mappings of names to arrays.
        include, exclude, rename: which variables to take, and how to change names, for all sources; see
            `varstore.load`. Each pattern has to match, and a new name has to differ from the old one somewhere.
        last_wins: of a name that several sources have, take what the last of them has; otherwise that is an error.
        average: take means instead: each variable has to be in all sources, with the same shape, and becomes the mean
            of its values, of the type in the first source. It is accumulated in float32, in float64 for float64 and
            integers, which are rounded, one variable at a time. What is equal by digest is linked. State is that of the
            first source.
        weights: with `average`, a number per source; they are divided by their sum.
        verify: compare what is linked with its digests, before anything is written. What is read, is compared in any
            case.
        overwrite, foreign, durable, threads, progress: see `varstore.save`.

    Raises:
        VariableMismatch: two sources have a variable, or a leaf of state, of one name, or with `average`, do not have
            the same variables of the same shapes.
        VariableNotFound: a pattern matches no variable, or nothing is renamed.
        DigestMismatch: the bytes of a variable are not those that were saved.
        UsageError: nothing is left to write, or the weights are not a number per source with a sum that is not 0.
        CheckpointNotFound, IncompleteCheckpoint, ManifestError, UnsafeContent, FormatError: see `varstore.read`.
        CheckpointExists, InvalidName, UnsupportedDtype, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> backbone = vs.save("backbone", {"conv/w": np.ones((3, 3)), "fc/w": np.zeros(3)})
        >>> head = vs.save("head", {"fc/w": np.ones(3)})
        >>> model = vs.merge("model", ["backbone", "head"], last_wins=True)
        >>> sorted(model), model["fc/w"].numpy()
        (['conv/w', 'fc/w'], array([1., 1., 1.]))
        >>> vs.merge("soup", ["backbone", "model"], average=True, weights=[3, 1])["fc/w"].numpy()
        array([0.25, 0.25, 0.25])
    """
    given = [open_source(source) for source in _listed(sources)]
    if average and last_wins:
        hint = "pass average=True or last_wins=True, not both"
        raise UsageError("means leave nothing for the last source to win", hint=hint)
    factors = _factors(weights, len(given), average=average)
    for source in given:
        if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
            check_names(source, "sources")

    def use(*opened: Checkpoint) -> Checkpoint:
        left = iter(opened)
        found = [next(left) if _is_own(source) else source for source in given]
        parts = _chosen(found, include=include, exclude=exclude, rename=rename)
        whole = _averaged(parts, factors) if average else _joined(parts, last_wins=last_wins)
        if not whole.variables:
            raise UsageError("there is nothing to write: no variable is left", path=os.fspath(target))
        whole.keep_rest(parts, last_wins=last_wins)
        if verify:
            values = [*whole.variables.values(), *whole.files.values()]
            linked = [value for value in values if isinstance(value, Variable | AttachedFile)]
            check_linked([(value.location, value.entry) for value in linked], threads, progress)
        saved = save(
            target,
            whole.variables,
            attributes=whole.attributes,
            variable_attributes=whole.variable_attributes,
            tree="" if whole.tree is None else json.dumps(whole.tree, ensure_ascii=False, separators=(",", ":")),
            files=whole.files,
            overwrite=overwrite,
            foreign=foreign,
            durable=durable,
            threads=threads,
            progress=progress,
        )
        saved.left_out = tuple(whole.left_out)
        return saved

    return retry_if_replaced(use, *[source for source in given if _is_own(source)])


def _listed(sources: Any) -> list[Any]:
    if isinstance(sources, str | os.PathLike | Mapping):
        sources = [sources]
    if not isinstance(sources, Iterable):
        raise UsageError("a wrong value", field="sources", found=described(sources), expected="paths or checkpoints")
    found = [source if isinstance(source, Mapping) else checked_path(source, "sources") for source in sources]
    if not found:
        raise UsageError("there is no source", field="sources")
    return found


def _is_own(source: Any) -> bool:
    return isinstance(source, str | os.PathLike | Checkpoint)


def _factors(weights: Any, count: int, *, average: bool) -> list[float]:
    """Return what the values of each source are multiplied with."""
    if weights is not None and not average:
        raise UsageError("weights are for means", field="weights", hint="pass average=True")
    if weights is None:
        return [1 / count] * count
    given = list(weights) if isinstance(weights, Iterable) else [weights]
    is_right = all(isinstance(weight, int | float | np.integer | np.floating) for weight in given)
    total = math.fsum(given) if is_right and len(given) == count else 0.0
    if not total or not math.isfinite(total):
        raise UsageError(
            "wrong weights",
            field="weights",
            found=", ".join(map(str, given[:8])),
            expected=f"{count} finite numbers, one per source, whose sum is not 0",
        )
    return [float(weight) / total for weight in given]


@dataclass(kw_only=True)
class _Parts:
    """What is taken from one source, or from all; `tree` is None for plain variables."""

    path: str
    variables: dict[str, Any]
    tree: Any = None
    variable_attributes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, AttachedFile] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def keep_rest(self, parts: Sequence[_Parts], *, last_wins: bool) -> None:
        """Take the attributes and files of all sources whose names do not collide."""
        self.attributes, lost = _without_collisions([part.attributes for part in parts], _is_equal, last_wins=last_wins)
        self.left_out += [f"attribute {key}" for key in lost]
        self.files, lost = _without_collisions([part.files for part in parts], _is_one_content, last_wins=last_wins)
        tops = {name.partition("/")[0] for name in self.variables}
        while (refused := refused_name(self.files, tops)) is not None:
            lost.append(refused[0])
            del self.files[refused[0]]
        unusable = [name for name, file in self.files.items() if not is_usable(file.entry, self.variables)]
        for name in unusable:
            del self.files[name]
        self.left_out += [f"file {name}" for name in (*lost, *unusable)]


def _is_equal(a: Any, b: Any) -> bool:
    return bool(a == b)


def _is_one_content(a: AttachedFile, b: AttachedFile) -> bool:
    return a.entry == b.entry


def _without_collisions(
    given: Iterable[Mapping[str, Any]], is_same: Callable[[Any, Any], bool], *, last_wins: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return what has one content by its name, and the names of what does not."""
    found: dict[str, Any] = {}
    lost: dict[str, None] = {}
    for items in given:
        for name, item in items.items():
            if name in found and not last_wins and not is_same(found[name], item):
                lost[name] = None
            found[name] = item
    return {name: item for name, item in found.items() if name not in lost}, list(lost)


def _chosen(
    opened: Sequence[Mapping[str, Any]], *, include: Patterns | None, exclude: Patterns | None, rename: Rename | None
) -> list[_Parts]:
    """Return what is taken from each source."""
    paths = [str(getattr(source, "path", "")) or f"source {at}" for at, source in enumerate(opened, 1)]
    everything = dict.fromkeys(name for source in opened for name in source)
    wanted = select(everything, include=include, exclude=exclude, path=" and ".join(paths[:3]), all_apply=True)
    is_whole = include is None and exclude is None and rename is None
    parts = []
    is_renamed = rename is None
    for source, path in zip(opened, paths, strict=True):
        names = [name for name in source if name in wanted]
        targets = select(names, rename=rename, path=path)
        is_renamed = is_renamed or len(targets) < len(names) or any(new != old for new, old in targets.items())
        parts.append(_parts(source, path, None if is_whole else targets))
    if not is_renamed:
        raise VariableNotFound("no variable is renamed", path=" and ".join(paths[:3]), field="rename")
    return parts


def _parts(source: Mapping[str, Any], path: str, targets: Mapping[str, str] | None) -> _Parts:
    """Return what is taken from a source: these variables by their new names, or everything."""
    if isinstance(source, Checkpoint):
        found = _Parts(path=path, variables=dict(source), attributes=dict(source.attributes), files=dict(source.files))
        found.tree = source.tree
        state = nested(source) if targets is not None else None
    elif isinstance(source, ForeignCheckpoint):
        state = source.tree
        whole = parts_of(state)
        found = _Parts(
            path=path,
            variables=dict(source if targets is not None else whole.variables),
            variable_attributes=dict(whole.variable_attributes),
            left_out=[f"{name} of {path}" for name in whole.left_out],
        )
        found.tree = json.loads(whole.tree) if whole.tree else None
    else:
        return _Parts(path=path, variables=dict(source) if targets is None else _renamed(source, targets))
    if targets is not None:
        said = found.variable_attributes
        found.variables = _renamed(found.variables, targets)
        found.variable_attributes = {new: said[old] for new, old in targets.items() if old in said}
        found.tree = None
        found.left_out += [f"{name} of {path}" for name, leaf in leaves(state) if not isinstance(leaf, LazyArray)]
    return found


def _renamed(variables: Mapping[str, Any], targets: Mapping[str, str]) -> dict[str, Any]:
    return {new: variables[old] for new, old in targets.items()}


def _joined(parts: Sequence[_Parts], *, last_wins: bool) -> _Parts:
    """Return the variables and state of all sources."""
    whole = _Parts(path="", variables={})
    whole.left_out = [name for part in parts for name in part.left_out]
    first_of: dict[str, str] = {}
    for at, part in enumerate(parts):
        taken = [name for name in part.variables if name in whole.variables]
        if taken and not last_wins:
            raise _taken_twice(taken[0], first_of[taken[0]], part.path)
        for name in taken:
            whole.variables.pop(name)
            whole.variable_attributes.pop(name, None)
        for earlier in parts[:at] if taken else ():
            earlier.tree = prune(earlier.tree, frozenset(taken).__contains__)
        whole.variables |= part.variables
        whole.variable_attributes |= part.variable_attributes
        first_of |= dict.fromkeys(part.variables, part.path)
    if any(part.tree is not None for part in parts):
        _join_trees(whole, parts, last_wins=last_wins)
    return whole


def _join_trees(whole: _Parts, parts: Sequence[_Parts], *, last_wins: bool) -> None:
    def clash(name: str, a: Any, b: Any) -> Any:
        if not last_wins:
            raise _taken_twice(name, json.dumps(a)[:80], json.dumps(b)[:80])
        return b

    plain = [{name: {"$": "array", "name": name} for name in part.variables} for part in parts]
    trees = [own if part.tree is None else part.tree for part, own in zip(parts, plain, strict=True)]
    whole.tree = joined(trees, clash)
    if whole.tree is None:
        whole.left_out += [f"nested state of {part.path}" for part in parts if part.tree is not None]


def _taken_twice(name: str, first: str, second: str) -> VariableMismatch:
    return VariableMismatch(
        "two sources have this name",
        variable=name,
        found=f"{first} and {second}",
        hint="take that of the last source with last_wins=True, or leave it out with exclude=",
    )


# means


def _averaged(parts: Sequence[_Parts], factors: Sequence[float]) -> _Parts:
    """Return the variables of the first source, with the means of their values in all of them."""
    first = parts[0]
    for part in parts:
        if odd := next(iter(first.variables.keys() ^ part.variables.keys()), None):
            lacking = part if odd in first.variables else first
            raise VariableMismatch(
                "a variable is not in all sources",
                variable=odd,
                found=f"not in {lacking.path}",
                hint="leave it out with exclude=",
            )
    variables = {}
    for name in first.variables:
        arrays = [as_source(part.variables[name], name) for part in parts]
        variables[name] = arrays[0] if _are_linked(arrays) else _mean(name, arrays, factors, parts)
    return _Parts(
        path="",
        variables=variables,
        tree=first.tree,
        variable_attributes=first.variable_attributes,
        left_out=first.left_out,
    )


def _are_linked(arrays: Sequence[Source]) -> bool:
    """Tell whether all are the same by their digests, so that the mean is the first of them."""
    known = {
        (array.entry.meta, array.entry.nbytes, array.entry.encoding, array.entry.checksums)
        if isinstance(array, Variable) and (array.entry.checksums or not array.entry.nbytes)
        else id(array)
        for array in arrays
    }
    return len(known) == 1


def _mean(name: str, arrays: Sequence[Source], factors: Sequence[float], parts: Sequence[_Parts]) -> LazyArray:
    first = arrays[0]
    for array, part in zip(arrays, parts, strict=True):
        if tuple(array.shape) != tuple(first.shape) or not is_numeric(array.dtype):
            raise VariableMismatch(
                "no mean can be taken of values of different shapes, or that are not numbers",
                path=part.path,
                variable=name,
                found=f"{list(array.shape)} {array.dtype}",
                expected=f"{list(first.shape)} {first.dtype}",
                hint="leave it out with exclude=",
            )
    return LazyArray(
        tuple(first.shape),
        first.dtype.newbyteorder("="),
        partial(_mean_of, name, arrays, factors),
        identity=("mean", *map(_tied_memory, arrays)),
        name=name,
    )


def _tied_memory(array: Source) -> Hashable:
    """Return a key that is equal for tied values."""
    if isinstance(array, Variable):
        return array.location, array.entry.alias_of or array.entry.name, array.entry.meta
    return memory_of(array)


def _mean_of(name: str, arrays: Sequence[Source], factors: Sequence[float]) -> np.ndarray:
    dtype = arrays[0].dtype.newbyteorder("=")
    kinds = {array.dtype.kind for array in arrays}
    is_narrow = all(is_floating(array.dtype) and array.dtype.itemsize <= _WIDEST_FLOAT32 for array in arrays)
    wide = np.dtype(np.complex128 if "c" in kinds else np.float32 if is_narrow else np.float64)
    total = np.zeros(arrays[0].shape, wide)
    with np.errstate(all="ignore"):
        for array, factor in zip(arrays, factors, strict=True):
            for index, values in _chunks(name, array):
                total[index] += values.astype(wide) * wide.type(factor)
        if is_floating(dtype) or dtype.kind == "c":
            return cast_values(total.real if dtype.kind != "c" else total, dtype)[0]
        rounded = np.rint(total.real)
    if dtype.kind == "b" and not np.array_equal(rounded, total.real):
        raise VariableMismatch(
            "no mean can be taken of booleans that differ", variable=name, hint="leave it out with exclude="
        )
    return np.asarray(rounded.astype(dtype))


def _chunks(name: str, array: Source) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield indices and values, a few MiB at a time; those of checkpoints are compared with their digests."""
    if isinstance(array, Variable):
        yield from row_chunks(array.location, readable(array.entry, path=array.root), verify=True)
        return
    pieces = Pieces(name, array)
    for at, (index, _) in enumerate(pieces.indices):
        yield index, pieces.read(at)
