"""What the page shows of two checkpoints: how far each variable moved, and what only one of them has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import varstore as vs
from varstore.text.escape import one_line
from varstore.text.hints import plural
from varstore.view.survey import bins_of, number_of

__all__ = ["compare", "moved_row", "unlike"]

_LISTED = 10_000
_LINE = 500


def compare(data: dict[str, Any], opened: Any, other: str, *, progress: bool = False) -> None:
    """Add to the data of the page how what is opened differs from the earlier one at the path `other`.

    Raises:
        VarstoreError: it cannot be opened or read; see `varstore.diff`.
    """
    before = vs.read(other)
    found = vs.diff(before, opened, values=True, progress=progress)
    moved = {name: before[name] for name in found.moved}
    histograms = vs.stats(moved, quantiles=False, histograms=True, progress=progress)
    numbers = {name: number for number, name in enumerate(opened)}
    for name in found.unchanged:
        data["variables"][numbers[name]]["moved"] = 0
    for name in found.moved:
        data["variables"][numbers[name]] |= moved_row(found, name, histograms)
    title = _title(other)
    data["comparison"] = {
        "title": title,
        "said": f"Compared with {one_line(other)}: {_said(found)}.",
        "lists": [
            [f"Only in {data['title']}", _lines(found.added)],
            [f"Only in {title}", _lines(found.removed)],
            ["Of another shape or type, or not compared", _lines(_not_compared(found))],
            ["Damaged: the digests are equal, and one of both is damaged", _lines(found.damaged)],
            ["Attributes, state and files", _lines(_about(found))],
        ],
        "layers": _layers(found, numbers),
    }


def moved_row(found: vs.DiffReport, name: str, histograms: vs.StatsReport) -> dict[str, Any]:
    """Return what the page shows of how far a variable moved; `histograms` are those before."""
    if name not in found.moved:
        return {"moved": 0} if name in found.unchanged else {}
    movement = found.moved[name]
    row: dict[str, Any] = {"moved": number_of(movement.relative), "change": _change(movement)}
    if name in histograms and histograms[name].histogram is not None:
        row["before"] = bins_of(histograms[name])
    return row


def unlike(opened: Mapping[str, Any], before: Mapping[str, Any], title: str, other: str) -> dict[str, Any]:
    """Return what the page of a viewer shows of two checkpoints without reading values."""
    earlier = _title(other)
    both = [name for name in opened if name in before]
    forms = {name: [f"{source[name].dtype} {list(source[name].shape)}" for source in (before, opened)] for name in both}
    changed = [f"{name}: {first} -> {second}" for name, (first, second) in forms.items() if first != second]
    return {
        "title": earlier,
        "said": f"Compared with {one_line(other)}: {plural(len(both), 'variable')} in both. "
        "How far a variable moved is found when it is opened.",
        "lists": [
            [f"Only in {title}", _lines(name for name in opened if name not in before)],
            [f"Only in {earlier}", _lines(name for name in before if name not in opened)],
            ["Of another shape or type", _lines(changed)],
        ],
        "layers": [],
    }


def _title(path: str) -> str:
    return one_line(os.path.basename(os.path.abspath(path)))


def _said(found: vs.DiffReport) -> str:
    both = len(found.unchanged) + len(found.changed)
    return f"{plural(len(found.moved), 'variable')} of {both:,} that both have moved"


def _change(movement: vs.Movement) -> list[list[Any]]:
    rows: list[tuple[str, Any]] = [
        ("max |Δ|", movement.largest),
        ("‖Δ‖ / ‖before‖", movement.relative),
        ("changed", f"{100 * movement.share:.3g} %"),
        ("cosine", movement.cosine),
    ]
    return [[label, number_of(value)] for label, value in rows]


def _layers(found: vs.DiffReport, numbers: dict[str, int]) -> list[list[Any]]:
    """Return the blocks of variables, the one that moved most first, each with the variable in it that did."""
    layers = []
    for block, movement in found.blocks.items():
        first = next(
            name for name in found.moved if name == block or name.startswith(tuple(block + end for end in "/.-"))
        )
        layers.append([one_line(block, _LINE), number_of(movement.relative), numbers[first]])
    return layers


def _not_compared(found: vs.DiffReport) -> Iterable[str]:
    yield from (f"{name}: {what}" for name, what in found.changed.items() if name not in found.moved)
    yield from (f"{name}: {why}" for name, why in found.left_out.items())


def _about(found: vs.DiffReport) -> Iterable[str]:
    yield from (f"attribute {name}: {what}" for name, what in found.attributes.items())
    for variable, said in found.variable_attributes.items():
        yield from (f"attribute {name} of {variable}: {what}" for name, what in said.items())
    yield from (f"state {name}: {what}" for name, what in found.state.items())
    yield from (f"file {name}: {how}" for name, how in found.files.items())


def _lines(texts: Iterable[str]) -> list[str]:
    lines = [one_line(text, _LINE) for text in texts]
    return lines if len(lines) <= _LISTED else [*lines[:_LISTED], f"and {len(lines) - _LISTED:,} more"]
