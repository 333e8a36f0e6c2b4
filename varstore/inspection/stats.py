"""Statistics of the variables of a checkpoint or of any file that varstore reads, a few MiB in memory at a time."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from varstore.disk.blocks import digest_of
from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.disk.read.variable import Variable
from varstore.disk.threads import Job, run, thread_count
from varstore.errors import UnsupportedDtype
from varstore.formats.verbs import open_source
from varstore.inspection.moments import (
    Histogram,
    Piece,
    histogram,
    is_numeric,
    merged,
    name_of,
    quantile,
    quiet_piece_of,
)
from varstore.inspection.pictures import Bins, Counted, HeatMap, Mosaic, counted, joined, matrix_shape
from varstore.inspection.pieces import Pieces, in_groups, memory_of, read_together
from varstore.layout.readable import Readable, readable
from varstore.model.options import Path
from varstore.text.hints import plural
from varstore.text.table import Table
from varstore.values.arguments import check_names, checked
from varstore.values.arrays import Source, as_source
from varstore.values.select import Patterns, select

__all__ = ["Statistics", "StatsReport", "stats"]

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_ROWS_IN_A_NOTEBOOK = 100
_HEADINGS = ("name", "shape", "type", "zeros", "nan", "inf", "min", "max", "mean", "std", "norm", "")


def _exact(value: int | float) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _rounded(value: int | float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of one variable. Those of the values, `min` and the following, are of the finite ones.

    `min` and `max` are exact, as an int or a float, and None if no value is finite, as then are `mean`, `std` (of the
    population) and `norm` (Euclidean). Complex values count by their magnitude, and booleans as 0 and 1.

    `quantiles` has the values at 0.01, 0.05, 0.25, 0.5, 0.75, 0.95 and 0.99, by these numbers, each at most
    `quantile_error` from what ``numpy.quantile`` gives; it is empty if they were not asked for. `dead_rows` counts the
    rows along the first axis, of two or more, in which all values are zero. `duplicate_of` names the first variable of
    the same shape, type and bytes; constant variables, tied ones and links to one file are not duplicates.

    `histogram` counts the finite values in at most 64 bins, and `heat_map` shows a matrix in at most 64 x 64 blocks;
    they are None where they were not asked for, and where there is nothing to show.

    Example:
        >>> found = vs.stats({"w": np.array([[3.0, 4.0], [0.0, 0.0]])})["w"]
        >>> found.norm, found.zeros, found.dead_rows, found.marks
        (5.0, 2, 1, ('dead',))
    """

    shape: tuple[int, ...]
    dtype: str
    count: int
    zeros: int
    nan: int
    inf: int
    min: int | float | None
    max: int | float | None
    mean: float | None
    std: float | None
    norm: float | None
    quantiles: Mapping[float, float] = field(default_factory=dict)
    quantile_error: float | None = None
    dead_rows: int = 0
    duplicate_of: str | None = None
    histogram: Bins | None = None
    heat_map: HeatMap | None = None

    @property
    def ok(self) -> bool:
        """Whether no value is nan or infinite."""
        return not self.nan and not self.inf

    def __bool__(self) -> bool:
        return self.ok

    @property
    def marks(self) -> tuple[str, ...]:
        """What somebody should look at, of "nan", "inf", "zero", "constant", "dead" and "duplicate".

        A single value is not constant, and is not marked for being zero.
        """
        return tuple(self._marked())

    def _marked(self) -> Mapping[str, str]:
        is_constant = self.count > 1 and self.ok and self.min == self.max
        is_zero = is_constant and self.zeros == self.count
        rows = {
            "nan": f"{self.nan:,} nan" if self.nan else "",
            "inf": f"{self.inf:,} inf" if self.inf else "",
            "zero": "all zero" if is_zero else "",
            "constant": "constant" if is_constant else "",
            "dead": plural(self.dead_rows, "dead row") if self.dead_rows else "",
            "duplicate": f"the same as {self.duplicate_of}" if self.duplicate_of is not None else "",
        }
        return {mark: text for mark, text in rows.items() if text}

    def rows(self) -> list[tuple[str, str]]:
        """Return labels and values as text, for people."""
        rows = [(label, str(getattr(self, label))) for label in ("count", "zeros", "nan", "inf")]
        if self.min is not None and self.max is not None:
            rows += [("min", _exact(self.min)), ("max", _exact(self.max))]
            rows += [(label, _rounded(getattr(self, label))) for label in ("mean", "std", "norm")]
        rows += [(f"q {at:g}", _rounded(value)) for at, value in self.quantiles.items()]
        if self.quantile_error is not None:
            rows.append(("q ±", _rounded(self.quantile_error)))
        marks = [text for mark, text in self._marked().items() if mark not in ("nan", "inf")]
        return rows + ([("marks", ", ".join(marks))] if marks else [])

    def as_json(self) -> dict[str, Any]:
        """Return the statistics as JSON data."""
        numbers = {label: getattr(self, label) for label in ("min", "max", "mean", "std", "norm", "quantile_error")}
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            **{label: getattr(self, label) for label in ("count", "zeros", "nan", "inf")},
            **{label: None if value is None or math.isinf(value) else value for label, value in numbers.items()},
            "quantiles": {f"{at:g}": value for at, value in self.quantiles.items()},
            "dead_rows": self.dead_rows,
            "duplicate_of": self.duplicate_of,
            "marks": list(self.marks),
            **{name: found.as_json() for name in ("histogram", "heat_map") if (found := getattr(self, name))},
        }

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        return Table(title=f"{self.dtype} {list(self.shape)}", rows=self.rows(), form="  {:<10}  {}")

    def _cells(self, name: str) -> tuple[str, ...]:
        counts = [f"{number:,}" for number in (self.zeros, self.nan, self.inf)]
        values = [_rounded(value) for value in (self.min, self.max, self.mean, self.std, self.norm)]
        marked = self._marked()
        shown = [text for mark, text in marked.items() if "zero" not in marked or mark not in ("constant", "dead")]
        return name, str(list(self.shape)), self.dtype, *counts, *values, ", ".join(shown)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StatsReport(Mapping[str, Statistics]):
    """What `stats` found: a mapping of names to `Statistics`. It is true if no value is nan or infinite.

    `left_out` has a sentence for each variable whose values are not numbers, by name.

    Example:
        >>> report = vs.stats({"w": np.array([1.0, np.nan, 3.0]), "b": np.zeros(2)})
        >>> report
        <StatsReport: 2 variables, nan or inf in 1>
        >>> report.ok, report["w"].nan, report["w"].max, report["b"].marks
        (False, 1, 3.0, ('zero', 'constant'))
    """

    path: str
    variables: Mapping[str, Statistics]
    left_out: Mapping[str, str]

    def __getitem__(self, name: str) -> Statistics:
        return self.variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)

    @property
    def ok(self) -> bool:
        """Whether no value of any variable is nan or infinite."""
        return all(found.ok for found in self.variables.values())

    def __bool__(self) -> bool:
        return self.ok

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        variables = {name: found.as_json() for name, found in self.variables.items()}
        return {"path": self.path, "ok": self.ok, "variables": variables, "left_out": dict(self.left_out)}

    def _said(self) -> str:
        bad = sum(not found.ok for found in self.variables.values())
        return f"{plural(len(self), 'variable')}, {f'nan or inf in {bad:,}' if bad else 'no nan or inf'}"

    def __repr__(self) -> str:
        return f"<StatsReport{f' {self.path!r}' if self.path else ''}: {self._said()}>"

    def table(self, most: int | None = None) -> Table:
        """Return a row per variable, or for the first of them, as many as `most`; notes say what was left out."""
        shown = list(self.variables.items())[:most]
        left = [f"{name}: {why}" for name, why in self.left_out.items()]
        more = len(self) - len(shown)
        return Table(
            title=f"{self.path}: {self._said()}" if self.path else self._said(),
            headings=_HEADINGS,
            rows=[found._cells(name) for name, found in shown],
            notes=left + ([f"and {plural(more, 'more variable')}"] if more else []),
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table(_ROWS_IN_A_NOTEBOOK).html()


@checked
def stats(
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    quantiles: bool = True,
    histograms: bool = False,
    heat_maps: int = 0,
    threads: int | None = None,
    progress: Progress = None,
) -> StatsReport:
    """Count zeros, nan and inf, and take min, max, mean, std, norm and quantiles, of each variable.

    Values are read a few MiB at a time, and not compared with the digests; `varstore.verify` does that. Arrays of files
    that can only be read whole, such as compressed ones, are in memory one per thread. Arrays that share memory are
    read once.

    Args:
        source: a checkpoint, any path that `varstore.read` opens, or a mapping of names to arrays or tensors.
        include: a glob pattern or several, on whole names; only variables that match are looked at.
        exclude: a glob pattern or several; variables that match are not looked at.
        quantiles: also read them from a histogram of 4,096 bins, for which variables of more than 4 MiB are read
            twice; see `Statistics`.
        histograms: also count the values of each variable in bins, in the same pass.
        heat_maps: for how many matrices, the largest, a heat map is made, in the same pass.
        threads: default one per processor, at most eight.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Returns:
        A mapping of names to `Statistics`, which is true if nothing is nan or infinite. Counts, `min` and `max` are
        exact; `mean`, `std` and `norm` are taken in float64.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: the checkpoint cannot be opened.
        VariableNotFound: a pattern of `include` matches no variable.
        SizeMismatch: a file is longer or shorter than its shape and type say.
        UsageError: a value of the mapping is not an array.
        UnsafeContent, FormatError, MissingDependency: see `varstore.read`.

    Example:
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.eye(3, dtype=np.float32), "fc/bias": np.zeros(3)})
        >>> report = vs.stats("lenet")
        >>> report.ok, report["fc/weight"].norm == 3**0.5, report["fc/bias"].max
        (True, True, 0.0)
        >>> print(report)
        lenet: 2 variables, no nan or inf
          name       shape   type     zeros  nan  inf  min  max  mean      std       norm
          fc/weight  [3, 3]  float32  6      0    0    0    1    0.333333  0.471405  1.73205
          fc/bias    [3]     float64  3      0    0    0    0    0         0         0        all zero
    """
    wanted = _Wanted(quantiles, histograms, heat_maps)
    look = partial(_report, include=include, exclude=exclude, wanted=wanted, threads=threads, progress=progress)
    opened = open_source(source)
    if isinstance(opened, Mapping) and not isinstance(opened, Checkpoint):
        check_names(opened, "source")
        return look(opened)
    return retry_if_replaced(look, opened)


def _report(
    source: Mapping[str, Any],
    *,
    include: Patterns | None,
    exclude: Patterns | None,
    wanted: _Wanted,
    threads: int | None,
    progress: Progress,
) -> StatsReport:
    path = str(getattr(source, "path", ""))
    if isinstance(source, Checkpoint):
        chosen: Mapping[str, Any] = source.select(include=include, exclude=exclude)
    else:
        names = select(source, include=include, exclude=exclude, path=path or None)
        chosen = {name: source[name] for name in names}
    looked_at: dict[str, _Look] = {}
    left_out: dict[str, str] = {}
    shared: dict[Hashable, _Look] = {}
    for name, value in chosen.items():
        try:
            array = as_source(value, name)
            known = readable(array.entry, path=array.root) if isinstance(array, Variable) else None
            dtype = array.dtype if known is None else known.dtype
        except UnsupportedDtype as error:
            left_out[name] = error.problem
            continue
        if is_numeric(dtype):
            looked_at[name] = shared.setdefault(memory_of(array), _Look(name, array, known))
        else:
            left_out[name] = f"values of type {dtype} are not numbers"
    looks = list(shared.values())
    _begin_heat_maps(looks, wanted.heat_maps)
    quantiles = wanted.quantiles
    total = sum(look.nbytes * (2 if quantiles and not look.is_one else 1) for look in looks)
    with reporting(progress, total, f"looking at {path or 'arrays'}") as advance:
        count = min(thread_count(threads), max(1, sum(len(look.indices) for look in looks)))
        done = advance or (lambda _: None)
        run(_first_pass(looks, done, wanted), count)
        for look in looks:
            if not look.is_one:
                look.settle()
        if quantiles:
            run(_second_pass(looks, done), count)
    duplicates = _duplicates(looks)
    found = {id(look): look.statistics(duplicates.get(look.name), quantiles=quantiles) for look in looks}
    variables = {name: found[id(look)] for name, look in looked_at.items()}
    return StatsReport(path=path, variables=variables, left_out=left_out)


class _Wanted(NamedTuple):
    """What is asked for beside counts and moments."""

    quantiles: bool
    histograms: bool
    heat_maps: int


class _Look(Pieces):
    """A variable that is looked at, and what is known of it, piece by piece."""

    def __init__(self, name: str, array: Source, known: Readable | None) -> None:
        super().__init__(name, array, known=known)
        self.offsets = [0] if self.is_one else [0, *itertools.accumulate(math.prod(shape) for _, shape in self.indices)]
        """How many values come before each piece, in C order."""
        self.row = math.prod(self.shape[1:]) if len(self.shape) > 1 else 0
        """How many values a row has; 0 if there are no rows."""
        self.pieces: list[Piece | None] = [None] * len(self.indices)
        self.digests = [b""] * len(self.indices)
        self.dead: dict[int, int] = {}
        """By piece, how many whole rows of it are zero."""
        self.counted: dict[int, Counted] = {}
        """Histograms of the pieces that have finite values."""
        self.mosaic: Mosaic | None = None
        self.known: Piece | None = None
        self.counts: Histogram | None = None
        self._lock = threading.Lock()

    def look(self, at: int, values: np.ndarray, wanted: _Wanted) -> None:
        """Look at a piece for the first time, and for the last if it is the only one."""
        piece = self.pieces[at] = quiet_piece_of(values)
        self.digests[at] = digest_of(values)
        row = self.row
        if row and values.size % row == 0 and piece.zeros >= row:
            self.dead[at] = int(np.count_nonzero((values.reshape(-1, row) == 0).all(axis=1)))
        if wanted.histograms and piece.low is not None:
            self.counted[at] = counted(values, piece.low, piece.high)
        if self.mosaic:
            self.mosaic.add(self.offsets[at], values)
        if self.is_one:
            self.settle()
            if wanted.quantiles and self.is_spread:
                self.look_again(values)

    def settle(self) -> None:
        """Put together what is known of the pieces."""
        self.known = merged([piece for piece in self.pieces if piece is not None])

    @property
    def is_spread(self) -> bool:
        """Whether there are different values."""
        return self.known is not None and self.known.low is not None and self.known.low != self.known.high

    def look_again(self, values: np.ndarray) -> None:
        """Count the values of a piece by bins."""
        assert self.known is not None
        counts = histogram(values, self.known.low, self.known.high)
        with self._lock:
            self.counts = counts if self.counts is None else self.counts + counts

    def _dead_rows(self) -> int:
        row = self.row
        if self.is_one or not row or isinstance(self.indices[0][0][0], slice):
            return sum(self.dead.values())
        zeros: dict[int, int] = {}
        for (index, _), piece in zip(self.indices, self.pieces, strict=True):
            assert piece is not None
            zeros[index[0]] = zeros.get(index[0], 0) + piece.zeros
        return sum(count == row for count in zeros.values())

    @property
    def content(self) -> Hashable:
        """What is equal for variables of the same values, and only for them."""
        return self.shape, self.dtype.char, self.dtype.type, *self.digests

    @property
    def file(self) -> tuple[int, int] | None:
        """What tells the file of a variable from others; None for what is not a file of its own."""
        if not isinstance(self.array, Variable):
            return None
        try:
            found = os.stat(os.path.join(self.array.path, "out"))
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _quantile(self, known: Piece, at: float) -> tuple[float, float]:
        """Return a quantile and how far at most it is from the true one."""
        return (float(known.low), 0.0) if self.counts is None else quantile(self.counts, known.low, known.high, at)

    def statistics(self, duplicate_of: str | None, *, quantiles: bool) -> Statistics:
        """Return the record of all pieces."""
        known = self.known
        assert known is not None
        mean, std, norm = (None, None, None) if known.low is None else known.moments.unscaled()
        places: dict[float, float] = {}
        error = None
        if quantiles and known.low is not None:
            found = {at: self._quantile(known, at) for at in _QUANTILES}
            places = {at: value for at, (value, _) in found.items()}
            error = max(bound for _, bound in found.values())
        return Statistics(
            shape=self.shape,
            dtype=name_of(self.dtype),
            count=known.size,
            zeros=known.zeros,
            nan=known.nan,
            inf=known.inf,
            min=known.low,
            max=known.high,
            mean=mean,
            std=std,
            norm=norm,
            quantiles=places,
            quantile_error=error,
            dead_rows=self._dead_rows(),
            duplicate_of=duplicate_of,
            histogram=joined(list(self.counted.values())).bins() if self.counted else None,
            heat_map=self.mosaic.heat_map() if self.mosaic else None,
        )


def _begin_heat_maps(looks: Iterable[_Look], count: int) -> None:
    """Let the largest matrices have heat maps."""
    if not count:
        return
    found = [(look, shape) for look in looks if (shape := matrix_shape(look.shape)) is not None]
    for look, shape in heapq.nlargest(count, found, key=lambda item: math.prod(item[1])):
        look.mosaic = Mosaic(shape)


def _first_pass(looks: Sequence[_Look], done: Callable[[int], None], wanted: _Wanted) -> Iterator[Job]:
    for look in looks:
        if not look.is_one:
            for at in range(len(look.indices)):
                yield partial(_look_at_piece, look, at, done, wanted)
    yield from in_groups(((look, look.nbytes) for look in looks if look.is_one), partial(_look_at_all, done, wanted))


def _look_at_all(done: Callable[[int], None], wanted: _Wanted, group: Sequence[_Look]) -> None:
    with np.errstate(all="ignore"):
        for look, values in read_together(group):
            look.look(0, values, wanted)
    done(sum(look.nbytes for look in group))


def _look_at_piece(look: _Look, at: int, done: Callable[[int], None], wanted: _Wanted) -> None:
    values = look.read(at)
    with np.errstate(all="ignore"):
        look.look(at, values, wanted)
    done(look.size(at))


def _second_pass(looks: Iterable[_Look], done: Callable[[int], None]) -> Iterator[Job]:
    for look in looks:
        if look.is_one:
            continue
        for at in range(len(look.indices)):
            yield partial(_look_again_at, look, at, done)


def _look_again_at(look: _Look, at: int, done: Callable[[int], None]) -> None:
    if look.is_spread:
        look.look_again(look.read(at))
    done(look.size(at))


def _duplicates(looks: Iterable[_Look]) -> dict[str, str]:
    """Return the names of variables that have the bytes of an earlier one, and of that one."""
    first: dict[Hashable, _Look] = {}
    found: dict[str, str] = {}
    for look in looks:
        if look.is_spread and (other := first.setdefault(look.content, look)) is not look:
            file = look.file
            if file is None or file != other.file:
                found[look.name] = other.name
    return found
