"""The scenarios: calls of public functions on three variables, two of them tied.

Three variables are enough to cover every step of a save: one is written like large variables (more than 1 MiB), one is
0-d and written like small ones. One thread does the work, so that the n-th call is always the same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

import varstore as vs
from tools.faults.readback import Contents, contents_of

__all__ = ["ATTRIBUTES", "SCENARIOS", "TARGET", "Scenario"]

TARGET: Final = "checkpoint"
_BASE: Final = "base"
ATTRIBUTES: Final = {"epoch": 3}

_Arrays = Mapping[str, np.ndarray]

_WEIGHT = np.arange(270_000, dtype=np.float32).reshape(3, 90_000)
_TIED: Final[_Arrays] = {"encoder/weight": _WEIGHT, "head/weight": _WEIGHT}
NEW: Final[_Arrays] = {**_TIED, "step": np.array(7)}
"""What is saved."""
EARLIER: Final[_Arrays] = {**_TIED, "step": np.array(6)}
"""The base; everything except the step is linked to it."""
OLD: Final[_Arrays] = {"encoder/weight": np.ones((2, 3), np.float32), "gone/bias": np.arange(4), "step": np.array(5)}
"""What is overwritten: one variable differs, one is missing in the new checkpoint."""
NEXT: Final[_Arrays] = {"step": np.array(8)}
"""What is saved afterwards, to check that saving still works."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One call, whose target is `TARGET` in a home directory."""

    name: str
    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    new: Contents
    """The content of the target after a successful call."""
    act_again: Callable[[Path], object]
    """What is called afterwards, in any case."""
    afterwards: Contents
    old_is_sound: bool = True
    """Whether the old checkpoint verifies."""


def _save(
    variables: _Arrays,
    home: Path,
    *,
    name: str = TARGET,
    base: str | None = None,
    overwrite: bool = False,
    durable: bool = False,
) -> None:
    vs.save(
        home / name,
        variables,
        attributes=ATTRIBUTES,
        base=None if base is None else home / base,
        overwrite=overwrite,
        durable=durable,
        threads=1,
    )


def _save_nothing(_: Path) -> None:
    """Prepare a home directory for a new save."""


def _change_by_hand(home: Path) -> None:
    _save(EARLIER, home)
    changed = home / TARGET / "step" / "changed"
    changed.write_bytes(NEW["step"].tobytes())
    os.replace(changed, changed.with_name("out"))


def _seal(home: Path) -> None:
    vs.seal(home / TARGET)


def _saving(
    name: str,
    prepare: Callable[[Path], object],
    *,
    durable: bool,
    base: str | None = None,
    overwrite: bool = False,
) -> Scenario:
    return Scenario(
        name=f"{name}, durable" if durable else name,
        prepare=prepare,
        act=partial(_save, NEW, base=base, overwrite=overwrite, durable=durable),
        new=contents_of(NEW),
        act_again=partial(_save, NEXT, overwrite=True),
        afterwards=contents_of(NEXT),
    )


def _savings(*, durable: bool) -> tuple[Scenario, ...]:
    return (
        _saving("new", _save_nothing, durable=durable),
        _saving("overwrite", partial(_save, OLD), overwrite=True, durable=durable),
        _saving("base", partial(_save, EARLIER, name=_BASE), base=_BASE, durable=durable),
        _saving("overwrite base", partial(_save, EARLIER), base=TARGET, overwrite=True, durable=durable),
    )


SCENARIOS: Final = (
    *_savings(durable=False),
    *_savings(durable=True),
    Scenario(
        name="seal",
        prepare=_change_by_hand,
        act=_seal,
        new=contents_of(NEW),
        act_again=_seal,
        afterwards=contents_of(NEW),
        old_is_sound=False,
    ),
)
