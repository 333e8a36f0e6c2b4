"""What the adapters share: the state of live objects, and where in a checkpoint the state of an optimizer is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Any, Unpack

from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import UsageError
from varstore.formats.opened import ForeignCheckpoint, read_state
from varstore.model.options import LoadOptions
from varstore.training.state import restore
from varstore.training.tensors import Framework

__all__ = ["optimizer_state", "refuse_options", "state_of"]

_DEFAULTS = {
    "use_structured_name": True,
    "strict": True,
    "assign": False,
    "on_mismatch": "error",
    "cast": False,
    "on_tied": "error",
}
"""Those of the options of `load_into` whose default is not None."""


def state_of(state: Any, state_dict: Callable[[Any], Any] = methodcaller("state_dict")) -> Any:
    """Return nested state in which every object with a method ``state_dict`` is replaced by its state dict."""
    if callable(getattr(state, "state_dict", None)) and not isinstance(state, type):
        return _without_factories(state_dict(state))
    if type(state) is dict:
        return {key: state_of(item, state_dict) for key, item in state.items()}
    return [state_of(item, state_dict) for item in state] if type(state) is list else state


def _without_factories(state: Any) -> Any:
    """Return a state dict with a dict in place of each defaultdict, as some optimizers have: its factory is code."""
    if type(state) in (dict, defaultdict):
        return {key: _without_factories(item) for key, item in state.items()}
    return state


def refuse_options(**given: Any) -> None:
    """Refuse options of `load_into` that an optimizer does not have: all that are not their defaults."""
    wrong = [name for name, value in given.items() if value is not _DEFAULTS.get(name) and value != _DEFAULTS.get(name)]
    if wrong:
        raise UsageError(
            "the state of an optimizer can only be loaded whole", field=wrong[0], hint=f"leave out {', '.join(wrong)}"
        )


def optimizer_state(
    given: Mapping[str, Any],
    is_one: Callable[[dict[str, Any]], bool],
    *,
    framework: Framework | None = None,
    **load_options: Unpack[LoadOptions],
) -> dict[str, Any]:
    """Return the only optimizer's state in a checkpoint, in a file of another system or in nested state.

    Args:
        given: the checkpoint, the file, or the state; an optimizer's state is this itself, or one of its items.
        is_one: a function that tells whether a dict is an optimizer's state.
        framework: what the arrays of a file of another system become.
        load_options: how a checkpoint is read.

    Raises:
        UsageError: there is none, or there are several.
    """
    tree: Any = given.tree if isinstance(given, Checkpoint | ForeignCheckpoint) else given
    if isinstance(given, Checkpoint) and not tree:  # plain variables
        tree = {name: {"$": "array", "name": name} for name in given}
    candidates = [tree, *(tree.values() if isinstance(tree, Mapping) else ())]
    found = [item for item in candidates if isinstance(item, dict) and is_one(item)]
    if len(found) != 1:
        raise UsageError(
            "not the state of one optimizer",
            path=getattr(given, "path", None) or type(given).__name__,
            found=f"{len(found)} of them",
            hint="pass the right one: load_into(optimizer, load(path)['optimizer'])",
        )
    state: dict[str, Any] = found[0]
    if isinstance(given, Checkpoint):
        state = restore(given, state, map_location="cpu", **load_options)
    elif isinstance(given, ForeignCheckpoint):
        state = read_state(state, framework=framework)
    return state
