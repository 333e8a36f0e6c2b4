"""Compare two checkpoints, or whatever else varstore reads: by name, shape, type and content, or by value.

Content is compared by what costs least. Two names of one file are equal; so are variables whose manifests have the same
digests; where a digest is missing, the values are read for it. A comparison of values does not rely on digests: it
reads all but what is one file, and finds damage that no manifest knows of.
"""

from __future__ import annotations

import math
import os
import pickle
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, entries_of, retry_if_replaced
from varstore.disk.read.digests import all_digests, digests_of
from varstore.disk.read.variable import Variable
from varstore.disk.threads import Job, for_each, run, thread_count
from varstore.errors import UsageError
from varstore.formats.native import nested
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.inspection.moments import is_numeric
from varstore.inspection.movement import Moved, Tolerance, moved, movement
from varstore.inspection.pieces import Pieces, in_groups, is_read_whole, memory_of, read_together
from varstore.layout.attached import FileEntry
from varstore.layout.difference import VALUES, DiffReport, Movement, changed_files, most_moved_first
from varstore.layout.encodings import is_plain
from varstore.layout.manifest import NO_FILES, Entry
from varstore.layout.readable import readable
from varstore.layout.regions import Checksums, equal_checksums
from varstore.model.options import Path
from varstore.storage.directory import Directory
from varstore.storage.failures import translated
from varstore.text.escape import one_line
from varstore.values.arguments import check_names, checked, described
from varstore.values.arrays import Source, as_source
from varstore.values.lazy import LazyArray
from varstore.values.nodes import leaves
from varstore.values.opaque import Opaque, inner_leaves
from varstore.values.select import Patterns, matcher, patterns_of, select

__all__ = ["DiffReport", "Movement", "diff"]

_SHOWN = 80
"""Characters of an attribute or of a leaf of the state that are shown."""
_ABSENT = object()
_NONE = np.empty(0)
Number = float
"""A tolerance, which is checked here."""


@checked
def diff(
    a: Path | Checkpoint | Mapping[str, Any],
    b: Path | Checkpoint | Mapping[str, Any],
    *,
    values: bool = False,
    rtol: Number | None = None,
    atol: Number | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> DiffReport:
    """Compare two checkpoints, or anything else that `varstore.read` opens.

    Variables are compared by name, shape, type and digest; they are read only where a digest is missing and both are
    not one file. Nested state is compared too, and between two sources of one format, attributes and attached files.

    Args:
        a: the earlier one: a checkpoint, any path that `varstore.read` opens, or a mapping of names to arrays.
        b: the later one.
        values: read all variables but those that are one file, and say how far each moved; see `Movement`. This does
            not rely on digests, so it also finds damage. A few MiB per thread are in memory; arrays of files that can
            only be read whole, such as compressed ones, are there whole.
        rtol, atol: also make variables equal whose values differ by at most ``atol + rtol * abs(b)``, whatever their
            types, such as float32 and bfloat16; nan equals nan. One that is left out is 0. They imply `values`.
        include: a glob pattern or several, on whole names: only variables and leaves of the state that match are
            compared, and neither attributes nor files. A pattern has to match a variable of `a` or `b`.
        exclude: a glob pattern or several; what matches is not compared.
        threads: default one per processor, at most eight.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: one of them cannot be opened.
        SizeMismatch: a file that has to be read is not as long as its shape and type say.
        VariableNotFound: a pattern of `include` matches no variable.
        UsageError: a value of a mapping is not an array, or a tolerance is not a number from 0 up.
        UnsafeContent, FormatError, MissingDependency: see `varstore.read`.

    Example:
        >>> first = vs.save("a", {"w": np.array([3.0, 4.0]), "bias": np.zeros(1)}, attributes={"epoch": 3})
        >>> second = {"w": np.array([3.0, 4.5]), "bias": np.zeros(1), "step": np.array(7)}
        >>> second = vs.save("b", second, attributes={"epoch": 4})
        >>> print(vs.diff("a", "b"))
        a -> b: 1 unchanged
          added    step
          changed  w: values
          changed  attribute epoch: 3 -> 4
        >>> report = vs.diff("a", "b", values=True)
        >>> report.moved["w"].largest, report.moved["w"].relative
        (0.5, 0.1)
        >>> vs.diff("a", "b", rtol=0.2, include="w").equal
        True
    """
    given: tuple[Any, Any] = open_source(a), open_source(b)
    for source, name in zip(given, ("a", "b"), strict=True):
        if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
            check_names(source, name)
    compared = partial(
        _report,
        tolerance=_tolerance(rtol, atol),
        values=values or rtol is not None or atol is not None,
        include=include,
        exclude=exclude,
        threads=threads,
        progress=progress,
    )

    def use(*opened: Checkpoint) -> DiffReport:
        left = iter(opened)
        first, second = (next(left) if _is_own(source) else source for source in given)
        return compared(first, second)

    return retry_if_replaced(use, *[source for source in given if _is_own(source)])


def _is_own(source: Any) -> TypeGuard[str | os.PathLike[str] | Checkpoint]:
    return isinstance(source, str | os.PathLike | Checkpoint)


def _tolerance(rtol: Any, atol: Any) -> Tolerance | None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        is_number = isinstance(value, int | float | np.integer | np.floating) and 0 <= value < math.inf
        if value is not None and not is_number:
            raise UsageError("a wrong value", field=name, found=described(value), expected="a number from 0 up")
    return None if rtol is None and atol is None else Tolerance(float(rtol or 0), float(atol or 0))


def _report(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    tolerance: Tolerance | None,
    values: bool,
    include: Patterns | None,
    exclude: Patterns | None,
    threads: int | None,
    progress: Progress,
) -> DiffReport:
    a, b = (str(getattr(source, "path", "")) for source in (first, second))
    names = list(select(dict.fromkeys([*first, *second]), include=include, exclude=exclude, path=f"{a} or {b}"))
    both = [name for name in names if name in first and name in second]
    is_whole = include is None and exclude is None
    with ExitStack() as opened:
        sides = _Side(first, both, opened), _Side(second, both, opened)
        is_one = _is_one_file(first, second)
        pairs = [] if is_one else [_Pair(name, sides[0].part(name), sides[1].part(name)) for name in both]
        _Comparing(sides, values, tolerance).run(pairs, threads, progress, f"comparing {a or 'arrays'}")
        what = {pair.name: pair.changed(tolerance) for pair in pairs}
        left_out = {pair.name: pair.unknown for pair in pairs if pair.unknown}
        moved = {
            pair.name: pair.movement for pair in pairs if pair.movement and (pair.movement.changed or pair.retyped)
        }
        files = _changed_files(sides, values=values) if is_whole else {}
    return DiffReport(
        a=a,
        b=b,
        added=tuple(name for name in names if name not in first),
        removed=tuple(name for name in names if name not in second),
        changed={name: said for name, said in what.items() if said},
        unchanged=tuple(name for name in both if not what.get(name) and name not in left_out),
        files=files,
        attributes=_attributes(first, second) if is_whole else {},
        variable_attributes=_variable_attributes(sides) if is_whole else {},
        state=_changed_in(_state(first), _state(second), _wanted(include, exclude)),
        moved=dict(sorted(moved.items(), key=lambda item: most_moved_first(item[1]))),
        damaged=tuple(pair.name for pair in pairs if pair.contradicts_digests),
        left_out=left_out,
    )


def _is_one_file(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Tell whether both are the same checkpoint, or the same file of another system."""
    if first is second:
        return True
    if isinstance(first, Checkpoint) and isinstance(second, Checkpoint):
        return first.location == second.location
    if isinstance(first, ForeignCheckpoint) and isinstance(second, ForeignCheckpoint) and first.path and second.path:
        return os.path.exists(first.path) and os.path.exists(second.path) and os.path.samefile(first.path, second.path)
    return False


@dataclass(kw_only=True, slots=True)
class _Part:
    """One variable of one side. `array` is None if numpy does not have its type, or its folder has no ``meta``."""

    array: Source | None
    entry: Entry | None
    shape: tuple[int, ...] | None
    dtype: Any
    form: str
    checksums: Checksums = b""
    file: tuple[int, int] | None = None

    @property
    def memory(self) -> Hashable:
        """What is equal for values that are one and the same."""
        assert self.array is not None
        return self.file or memory_of(self.array)


class _Side:
    """One of the two: its variables, and its directory if it is a checkpoint of varstore's own."""

    def __init__(self, source: Mapping[str, Any], names: Sequence[str], opened: ExitStack) -> None:
        self.source = source
        self.directory: Directory | None = None
        self.entries: dict[str, Entry] = {}
        if isinstance(source, Checkpoint):
            self.entries = dict(zip(names, entries_of(source, names), strict=True))
            self.directory = opened.enter_context(Directory(source.location))

    def part(self, name: str) -> _Part:
        """Return a variable of this side."""
        array: Source | None
        if name not in self.entries:
            array = as_source(self.source[name], name)
            if not isinstance(array, Variable):
                shape, dtype = tuple(array.shape), array.dtype.newbyteorder("=")
                return _Part(array=array, entry=None, shape=shape, dtype=dtype, form=f"{list(shape)} {dtype}")
            entry, array = array.entry, array
        else:
            entry, array = self.entries[name], None
        meta = entry.meta
        has_values = meta is not None and meta.data_type.dtype is not None
        if has_values and array is None:
            assert isinstance(self.source, Checkpoint)
            array = Variable(self.source.location, entry)
        return _Part(
            array=array if has_values else None,
            entry=entry,
            shape=meta and meta.shape,
            dtype=array.dtype.newbyteorder("=") if has_values and array is not None else meta and meta.data_type,
            form=entry.form,
            checksums=entry.value_checksums,
        )

    def find_file(self, part: _Part) -> None:
        """Find out which file a variable has, without opening it."""
        if part.entry is None:
            return
        try:
            if self.directory is not None:
                status = self.directory.status(part.entry.file)
            else:
                assert isinstance(part.array, Variable)
                status = os.stat(os.path.join(part.array.path, "out"), follow_symlinks=False)
        except OSError:  # whoever reads it says why
            return
        if stat.S_ISREG(status.st_mode) and status.st_size == part.entry.nbytes:
            part.file = status.st_dev, status.st_ino

    def digests(self, part: _Part) -> bytes:
        """Read a variable for its digests."""
        if part.entry is not None and (part.array is None or _lies_as_read(part.entry, self.source)):
            assert self.directory is not None
            with translated(self.directory.path, "reading failed"):
                return all_digests(self.directory, part.entry)
        assert part.array is not None
        return digests_of(_bytes_of(Pieces("", part.array)))


def _lies_as_read(entry: Entry, source: Mapping[str, Any]) -> bool:
    """Tell whether ``out`` holds the values as they are read, so that its digests are theirs."""
    if not isinstance(source, Checkpoint):
        return False
    found = readable(entry, path=source.path)
    return found.encoding.is_plain and found.stored == found.dtype


def _bytes_of(pieces: Pieces) -> Iterator[memoryview]:
    """Yield the bytes that an ``out`` with these values would have."""
    for at in range(len(pieces.indices)):
        values = pieces.read(at)
        yield values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


class _Pair:
    """A variable that both sides have, and what is found out about it."""

    def __init__(self, name: str, a: _Part, b: _Part) -> None:
        self.name = name
        self.a = a
        self.b = b
        self.is_equal: bool | None = None
        self.movement: Movement | None = None
        self.unknown = ""

    @property
    def retyped(self) -> bool:
        """Whether both have one shape, and types whose values can be compared."""
        return self.a.shape == self.b.shape and self.a.dtype != self.b.dtype and self.is_numeric

    @property
    def is_numeric(self) -> bool:
        """Whether both are numbers."""
        return all(isinstance(part.dtype, np.dtype) and is_numeric(part.dtype) for part in (self.a, self.b))

    @property
    def is_alike(self) -> bool:
        """Whether both have the same shape and type."""
        return (self.a.shape, self.a.dtype) == (self.b.shape, self.b.dtype)

    @property
    def is_one_file(self) -> bool:
        """Whether both are names of one file."""
        return self.a.file is not None and self.a.file == self.b.file

    @property
    def same_checksums(self) -> bool | None:
        """Whether both have the same digests; None if these cannot be compared."""
        return equal_checksums(self.a.checksums, self.b.checksums)

    @property
    def contradicts_digests(self) -> bool:
        """Whether the values differ although the manifests say that they do not."""
        moved = self.movement is not None and self.movement.changed > 0
        return moved and self.is_alike and self.same_checksums is True

    def changed(self, tolerance: Tolerance | None) -> str:
        """Return what differs, as text; nothing if the pair is equal or it is not known."""
        if not self.is_alike and (tolerance is None or self.movement is None):
            return f"{self.a.form} -> {self.b.form}"
        if self.movement is not None:
            return VALUES if (self.movement.changed if tolerance is None else self.movement.beyond) else ""
        return VALUES if self.is_equal is False else ""


@dataclass(slots=True)
class _Comparing:
    """The work of one comparison."""

    sides: tuple[_Side, _Side]
    values: bool
    tolerance: Tolerance | None
    done: Callable[[int], None] = field(default=lambda _: None)

    def run(self, pairs: Iterable[_Pair], threads: int | None, progress: Progress, title: str) -> None:
        """Find out whether the pairs are equal, or how far they moved."""
        open_pairs = [pair for pair in pairs if pair.is_alike or (self.values and pair.retyped)]
        for_each(filter(self._needs_files, open_pairs), self._find_files)
        open_pairs = [pair for pair in open_pairs if not self._decide(pair)]
        by_value: dict[Hashable, _Together] = {}
        by_digest: list[tuple[_Side, _Part, int]] = []
        for pair in open_pairs:
            if not self.values or not pair.is_numeric:
                by_digest += [(side, part, _nbytes(part)) for side, part in self._to_digest(pair)]
                continue
            assert pair.a.array is not None
            assert pair.b.array is not None
            both = by_value.setdefault((pair.a.memory, pair.b.memory), _Together(pair.name, pair.a.array, pair.b.array))
            both.pairs.append(pair)
        together = list(by_value.values())
        jobs = sum(len(both.a.indices) for both in together) + len(by_digest)
        total = sum(both.nbytes for both in together) + sum(size for _, _, size in by_digest)
        with reporting(progress, total, title) as advance:
            self.done = advance or self.done
            run(self._jobs(together, by_digest), min(thread_count(threads), max(1, jobs)))
        for pair in open_pairs:
            if not pair.unknown and pair.is_equal is None:
                pair.is_equal = pair.a.checksums == pair.b.checksums
        for both in together:
            found = movement(both.found, has_tolerance=self.tolerance is not None)
            for pair in both.pairs:
                pair.movement, pair.is_equal = found, not found.changed

    def _needs_files(self, pair: _Pair) -> bool:
        return self.values or pair.same_checksums is None

    def _find_files(self, pair: _Pair) -> None:
        for side, part in zip(self.sides, (pair.a, pair.b), strict=True):
            side.find_file(part)

    def _decide(self, pair: _Pair) -> bool:
        """Decide what can be decided without reading; tell whether that is so."""
        for part in (pair.a, pair.b):
            if part.array is not None and part.dtype.hasobject:
                pair.unknown = "its values are objects, which are not read"
        if pair.is_alike and pair.is_one_file:
            pair.is_equal = True
        elif not self.values and _nbytes(pair.a) == _nbytes(pair.b):
            pair.is_equal = pair.same_checksums
        elif pair.a.array is None and pair.b.array is None and _nbytes(pair.a) != _nbytes(pair.b):
            pair.is_equal = False
        return bool(pair.unknown) or pair.is_equal is not None

    def _to_digest(self, pair: _Pair) -> Iterator[tuple[_Side, _Part]]:
        """Yield what has to be read for its digests: what has none, or has those of other bytes than are read."""
        is_same_size = _nbytes(pair.a) == _nbytes(pair.b)
        for side, part in zip(self.sides, (pair.a, pair.b), strict=True):
            is_ordinary = bool(part.checksums) and isinstance(part.checksums, bytes)
            if self.values or not is_ordinary or not is_same_size:
                yield side, part

    def _jobs(self, together: Sequence[_Together], by_digest: Iterable[tuple[_Side, _Part, int]]) -> Iterator[Job]:
        for side, part, _ in by_digest:
            yield partial(self._digest, side, part)
        for both in together:
            if not both.a.is_one:
                for at in range(len(both.a.indices)):
                    yield partial(self._compare_piece, both, at)
        yield from in_groups(((both, both.nbytes) for both in together if both.a.is_one), self._compare_all)

    def _digest(self, side: _Side, part: _Part) -> None:
        part.checksums = side.digests(part)
        self.done(_nbytes(part))

    def _compare_piece(self, both: _Together, at: int) -> None:
        both.found[at] = moved(both.a.read(at), both.b.read(at), self.tolerance)
        self.done(both.a.size(at) + both.b.size(at))

    def _compare_all(self, group: Sequence[_Together]) -> None:
        before = {id(pieces): values for pieces, values in read_together([both.a for both in group])}
        after = {id(pieces): values for pieces, values in read_together([both.b for both in group])}
        for both in group:
            both.found[0] = moved(before[id(both.a)], after[id(both.b)], self.tolerance, is_all=True)
        self.done(sum(both.nbytes for both in group))


class _Together:
    """The pieces of two arrays, each of the same indices in both, for the pairs that have these arrays."""

    def __init__(self, name: str, a: Source, b: Source) -> None:
        itemsize = max(a.dtype.itemsize, b.dtype.itemsize)
        is_whole = is_read_whole(a) or is_read_whole(b)
        self.a, self.b = (Pieces(name, array, itemsize=itemsize, is_whole=is_whole) for array in (a, b))
        self.nbytes = self.a.nbytes + self.b.nbytes
        self.found: list[Moved] = [moved(_NONE, _NONE, None)] * len(self.a.indices)
        self.pairs: list[_Pair] = []


def _nbytes(part: _Part) -> int:
    if part.entry is not None and (part.array is None or is_plain(part.entry.encoding)):
        return part.entry.nbytes
    assert part.array is not None
    return math.prod(part.array.shape) * part.array.dtype.itemsize


# attached files, attributes and nested state


def _changed_files(sides: tuple[_Side, _Side], *, values: bool) -> Mapping[str, str]:
    if any(side.directory is None for side in sides):
        return {}
    first, second = (_files(side) for side in sides)
    if values:
        for name in [name for name in first if name in second]:
            if not _is_one_entry(sides, first[name], second[name]):
                for side, files in zip(sides, (first, second), strict=True):
                    assert side.directory is not None
                    with translated(side.directory.path, "reading failed"):
                        files[name] = files[name]._replace(digests=all_digests(side.directory, files[name]))
    return changed_files(first, second)


def _files(side: _Side) -> dict[str, FileEntry]:
    assert isinstance(side.source, Checkpoint)
    return dict(side.source.manifest.files if side.source.manifest else NO_FILES)


def _is_one_entry(sides: tuple[_Side, _Side], *entries: FileEntry) -> bool:
    found = []
    for side, entry in zip(sides, entries, strict=True):
        assert side.directory is not None
        try:
            status = side.directory.status(entry.file)
        except OSError:
            return False
        found.append((status.st_dev, status.st_ino, status.st_size == entry.nbytes and stat.S_ISREG(status.st_mode)))
    return found[0] == found[1] and found[0][2]


def _attributes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs in the attributes of two sources of one format."""
    kinds = [_format(source) for source in (first, second)]
    if kinds[0] != kinds[1] or not kinds[0]:
        return {}
    before, after = (dict(_flat(getattr(source, "attributes", {}))) for source in (first, second))
    return _changed_in(before, after)


def _format(source: Mapping[str, Any]) -> str:
    if isinstance(source, Checkpoint):
        return "varstore"
    return source.format if isinstance(source, ForeignCheckpoint) else ""


def _variable_attributes(sides: tuple[_Side, _Side]) -> dict[str, dict[str, str]]:
    first, second = (side.entries for side in sides)
    changed = {
        name: _changed_in(dict(_flat(first[name].attributes)), dict(_flat(second[name].attributes)))
        for name in first
        if name in second and (first[name].attributes or second[name].attributes)
    }
    return {name: said for name, said in changed.items() if said}


def _state(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what nested state holds besides arrays, by the keys that lead to it."""
    tree = nested(source) if isinstance(source, Checkpoint) else getattr(source, "tree", None)
    return {} if tree is None else {name: leaf for name, leaf in leaves(tree) if not isinstance(leaf, LazyArray)}


def _wanted(include: Patterns | None, exclude: Patterns | None) -> Callable[[str], bool]:
    is_wanted = (lambda _: True) if include is None else matcher(patterns_of("include", include))
    is_unwanted = (lambda _: False) if exclude is None else matcher(patterns_of("exclude", exclude))
    return lambda name: is_wanted(name) and not is_unwanted(name)


def _flat(said: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what attributes say, with the keys of nested mappings joined by ``/``; lists are not divided."""
    for key, value in said.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


def _changed_in(
    before: Mapping[str, Any], after: Mapping[str, Any], is_wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, str]:
    found = {}
    for name in filter(is_wanted, {**before, **after}):
        a, b = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if a is _ABSENT or b is _ABSENT or not _is_same(a, b):
            found[name] = f"{_said(a)} -> {_said(b)}"
    return found


def _said(value: Any) -> str:
    return "absent" if value is _ABSENT else one_line(repr(value), _SHOWN)


def _is_same(a: Any, b: Any) -> bool:
    """Tell whether two values of attributes or state are equal; nan equals nan, and 3 is 3.0 but not True."""
    if isinstance(a, Opaque) and isinstance(b, Opaque):
        return (a.module, a.name) == (b.module, b.name) and _insides(a) == _insides(b)
    a, b = (value.item() if isinstance(value, np.generic) else value for value in (a, b))
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, int | float | complex) and isinstance(b, int | float | complex):
        return all(x == y or (x != x and y != y) for x, y in ((a.real, b.real), (a.imag, b.imag)))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, str | bytes | None) or isinstance(b, str | bytes | None):
        return bool(type(a) is type(b) and a == b)
    return type(a) is type(b) and _pickled(a) == _pickled(b)


def _insides(opaque: Opaque) -> list[str]:
    """Return the leaves of a record as text; arrays by shape and type."""
    return [repr(leaf) for leaf in inner_leaves(opaque, set())]


def _pickled(value: Any) -> bytes | str:
    """Return what tells a value of any other type from others: dates, paths, random generators."""
    try:
        return pickle.dumps(value)
    except Exception:  # of the value's own class
        return repr(value)
