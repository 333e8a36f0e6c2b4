"""What a viewer computes when it is asked: statistics and pictures of one variable, and slices of its values."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

import varstore as vs
from varstore.errors import UsageError
from varstore.view.comparison import moved_row
from varstore.view.survey import looked_at, number_of

__all__ = ["MOST_VALUES", "Looks", "part"]

MOST_VALUES = 65_536
"""Values of an answer."""
_RUNNING = 2
"""Variables that are looked at at the same time; one more ends the oldest."""
_KEPT = 500
"""Answers that are kept."""
_INDEX = re.compile(r"\s*(?:(?P<at>-?\d{1,18})|(?P<start>-?\d{1,18})?\s*:\s*(?P<stop>-?\d{1,18})?)\s*")


class _Ended(Exception):
    """Nobody waits for this look any more."""


class _Look:
    """A variable that is looked at in a thread of its own."""

    def __init__(self, array: Any, before: Any) -> None:
        self._sources = ({"": array}, None if before is None else {"": before})
        self._is_wanted = True
        self._parts = [0.0, 0.0]
        self.answer: dict[str, Any] | None = None
        self.is_over = threading.Event()
        threading.Thread(target=self._work, name="varstore view", daemon=True).start()

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1."""
        return self._parts[0] if self._sources[1] is None else sum(self._parts) / 2

    def end(self) -> None:
        """Stop reading as soon as possible."""
        self._is_wanted = False

    def _work(self) -> None:
        try:
            self.answer = self._found()
        except _Ended:
            pass
        except Exception as error:  # whatever a stranger's file does
            self.answer = {"failed": f"The values cannot be read: {type(error).__name__}."}
        finally:
            self.is_over.set()

    def _found(self) -> dict[str, Any]:
        array, before = self._sources
        options: Any = {"quantiles": False, "histograms": True}
        report = vs.stats(array, heat_maps=1, progress=lambda *done: self._advance(0, *done), **options)
        if "" not in report:
            return {"left": report.left_out[""]}
        row = looked_at(report[""], {})
        if before is not None:
            found = vs.diff(before, array, values=True, progress=lambda *done: self._advance(1, *done))
            row |= moved_row(found, "", vs.stats(before, **options))
        return row

    def _advance(self, part: int, done: int, total: int) -> None:
        if not self._is_wanted:
            raise _Ended
        self._parts[part] = done / total if total else 1.0


class Looks:
    """The answers about the variables of what is opened, by their numbers; each is computed once."""

    def __init__(self, opened: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        self._opened, self._before = opened, before
        self.names = tuple(opened)
        self._looks: OrderedDict[int, _Look] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, number: int, seconds: float) -> dict[str, Any]:
        """Return what is known of a variable, or after some seconds how much is done: ``{"share": 0.3}``."""
        with self._lock:
            look = self._looks.get(number)
            if look is None or (look.is_over.is_set() and look.answer is None):
                look = self._looks[number] = self._begin(number)
            self._looks.move_to_end(number)
        look.is_over.wait(seconds)
        return look.answer if look.answer is not None else {"share": look.share}

    def _begin(self, number: int) -> _Look:
        running = [look for look in self._looks.values() if not look.is_over.is_set()]
        for look in running[: max(0, len(running) - _RUNNING + 1)]:
            look.end()
        while len(self._looks) >= _KEPT:
            self._looks.popitem(last=False)[1].end()
        name = self.names[number]
        before = self._before.get(name) if self._before is not None else None
        return _Look(self._opened[name], before)

    def values(self, number: int, at: str) -> dict[str, Any]:
        """Return a slice of a variable as numbers, and of the one before; ``{"failed": why}`` for what is not one."""
        name = self.names[number]
        try:
            answer = part(self._opened[name], at)
            if self._before is not None and name in self._before:
                answer["before"] = part(self._before[name], at)
        except (UsageError, IndexError) as error:
            return {"failed": error.problem if isinstance(error, UsageError) else "The slice is out of range."}
        except Exception as error:  # whatever a stranger's file does
            return {"failed": f"The values cannot be read: {type(error).__name__}."}
        return answer

    def end(self) -> None:
        """Stop all that is computed."""
        with self._lock:
            for look in self._looks.values():
                look.end()


def part(array: Any, at: str) -> dict[str, Any]:
    """Return a slice of an array, as ``0:3, 5``, in JSON: its shape and its values in C order.

    Raises:
        UsageError: it is not a slice, or has more than 65,536 values; nothing was read.
        IndexError: it is out of range.
    """
    texts = at.split(",") if at.strip() else []
    matches = [_INDEX.fullmatch(text) for text in texts]
    if len(texts) > len(array.shape) or None in matches:
        raise UsageError(f"This is not a slice of {len(array.shape)} axes; an example is 0:3, 5.")
    index: list[int | slice] = []
    count = 1
    for match, length in zip(matches, array.shape, strict=False):
        assert match is not None
        if match["at"] is not None:
            index.append(int(match["at"]))
            continue
        piece = slice(*(None if match[end] is None else int(match[end]) for end in ("start", "stop")))
        index.append(piece)
        count *= len(range(*piece.indices(length)))
    count *= math.prod(array.shape[len(index) :])
    if count > MOST_VALUES:
        raise UsageError(f"This slice has {count:,} values; an answer has at most {MOST_VALUES:,}.")
    values = np.asarray(array[tuple(index)])
    return {"shape": list(values.shape), "values": [_shown(value) for value in values.reshape(-1)]}


def _shown(value: Any) -> Any:
    found = value.item() if isinstance(value, np.generic) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        found = float(value) if value.dtype.kind == "V" else str(found)
    return number_of(found)
