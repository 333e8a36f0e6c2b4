"""Loading into the optimizers of Paddle, which name their state by the names of parameters, and number it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import paddle

from varstore import live
from varstore.adapters.paddle.state import known_names, tensors_of, with_tensors
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import VariableMismatch
from varstore.formats.opened import ForeignCheckpoint
from varstore.model.options import LoadOptions
from varstore.model.report import LoadReport
from varstore.text.hints import shortened
from varstore.values.nodes import leaves

__all__ = ["load_into_optimizer", "moved_names", "set_state"]

_APART = ("LR_Scheduler", "master_weights")
"""What the state of an optimizer has besides its tensors."""
_LINES = 10
_LONGEST_NAME = 4096
"""Characters; to look for longer names in those of a file could take long."""


def load_into_optimizer(
    optimizer: paddle.optimizer.Optimizer,
    given: Mapping[str, Any],
    layer: paddle.nn.Layer | None,
    **load_options: Unpack[LoadOptions],
) -> LoadReport:
    """Load the state of an optimizer, with names that are changed by the layer that it trains, if it is given."""
    moved = {} if layer is None else moved_names(layer, known_names(given))
    beginnings = _Beginnings(optimizer, moved)

    def is_one(state: dict[str, Any]) -> bool:
        return any(key in _APART or beginnings.owner(key) for key in state)

    is_file = isinstance(given, Checkpoint | ForeignCheckpoint)
    is_state = not is_file and not any(isinstance(given[key], dict) for key in given if key not in _APART)
    state = given if is_state else live.optimizer_state(given, is_one, **load_options)
    return set_state(optimizer, state, moved, getattr(given, "path", None) or type(given).__name__)


def set_state(
    optimizer: paddle.optimizer.Optimizer, state: Mapping[str, Any], moved: Mapping[str, str], where: str
) -> LoadReport:
    """Give an optimizer a state in which the parameters that have moved get their new names, if it fits."""
    state = with_tensors(_renumbered(optimizer, _renamed(state, _Beginnings(optimizer, moved), moved)))
    tensors = {name: value for name, value in leaves(state) if isinstance(value, paddle.Tensor)}
    wrong = _misfits(optimizer, tensors)
    follows = isinstance(optimizer._learning_rate, paddle.optimizer.lr.LRScheduler)
    if follows and "LR_Scheduler" not in state:
        wrong.append("LR_Scheduler: not in the state")
    if wrong:
        raise VariableMismatch(
            f"the state does not fit this {type(optimizer).__name__} and its parameters:",
            rows=shortened(wrong, _LINES),
            path=where,
            hint="if only the names of parameters differ, pass layer=, and a checkpoint that save of this module made",
        )
    optimizer.set_state_dict(state)
    unused = ("LR_Scheduler",) if "LR_Scheduler" in state and not follows else ()
    return LoadReport(source=where, target=type(optimizer).__name__, loaded=tuple(tensors), unused=unused)


class _Beginnings:
    """The names of an optimizer's parameters, and those that they had before: names in its state begin with them."""

    def __init__(self, optimizer: paddle.optimizer.Optimizer, moved: Iterable[str] = ()) -> None:
        groups = optimizer._parameter_list or []
        parts = (item["params"] if isinstance(item, dict) else [item] for item in groups)
        self._names = {*(parameter.name for parameters in parts for parameter in parameters), *moved}
        self._longest = min(max(map(len, self._names), default=0), _LONGEST_NAME)

    def owner(self, key: object) -> str:
        """Return the longest of them that a name begins with, up to a ``_`` or its end; empty text if there is none."""
        text = f"{key}_" if isinstance(key, str) else ""
        end = text.rfind("_", 0, self._longest + 1)
        while end >= 0 and text[:end] not in self._names:
            end = text.rfind("_", 0, end)
        return text[: max(end, 0)]


def moved_names(layer: paddle.nn.Layer, known: Mapping[str, str]) -> dict[str, str]:
    """Return the new names of the layer's parameters by those with which they were saved."""
    tensors = tensors_of(layer)
    depths = {name.count("/") for name in tensors}
    saved: dict[str, set[str]] = {}
    for path, old in known.items():
        for depth in depths:  # what a name may be the end of, after a slash
            saved.setdefault("/".join(path.rsplit("/", depth + 1)[-depth - 1 :]), set()).add(old)
    found = ((saved.get(name, set()), tensor.name) for name, tensor in tensors.items())
    return {next(iter(old)): new for old, new in found if len(old) == 1}


def _renamed(state: Mapping[str, Any], beginnings: _Beginnings, moved: Mapping[str, str]) -> dict[str, Any]:
    """Return an optimizer's state with other names of parameters at the beginnings of its keys."""
    renamed = {}
    for key, value in state.items():
        old = beginnings.owner(key)
        name = moved[old] + key.removeprefix(old) if old in moved else key
        renamed[name] = _renamed(value, beginnings, moved) if key == "master_weights" else value
    return renamed


def _renumbered(optimizer: paddle.optimizer.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the numbers that Paddle gives, or will give, to the names of its tensors.

    Those of the first optimizer of a parameter end with ``_0``, those of one that is made later with ``_1``.
    """
    counts = paddle.utils.unique_name.generate.__globals__["generator"].ids
    made = (name.rpartition("_") for name in optimizer.state_dict()) if optimizer._accumulators else ()
    numbers = {beginning: number for beginning, _, number in made}
    renumbered = {}
    for key, value in state.items():
        beginning, _, number = key.rpartition("_")
        new = numbers.get(beginning, number) if optimizer._accumulators else counts.get(beginning, 0)
        renumbered[f"{beginning}_{new}" if number.isdigit() else key] = value
    return renumbered


def _misfits(optimizer: paddle.optimizer.Optimizer, tensors: Mapping[str, paddle.Tensor]) -> list[str]:
    """Compare the tensors of a state with those of an optimizer, or with its parameters if it has not made a step."""
    made = optimizer.state_dict() if optimizer._accumulators else {}  # otherwise, it is what was loaded before
    own = {name: value for name, value in leaves(made) if isinstance(value, paddle.Tensor)}
    beginnings = _Beginnings(optimizer)
    wrong = [f"{name}: not in the state" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        if not beginnings.owner(name.removeprefix("master_weights/")) or (own and name not in own):
            wrong.append(f"{name}: the optimizer does not have it")
        elif own and list(tensor.shape) != list(own[name].shape):
            wrong.append(f"{name}: {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
    return wrong
