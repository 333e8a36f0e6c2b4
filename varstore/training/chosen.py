"""Choose and rename the leaves of nested state by their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from varstore.errors import UsageError
from varstore.values.lazy import LazyArray
from varstore.values.nodes import BARE, Names, Unbuilt, dict_like
from varstore.values.select import Patterns, Rename, select

__all__ = ["Choice", "choose"]

_NOTHING = object()


class Choice(TypedDict):
    """What is chosen of a state, and how names change; see `varstore.load_state`."""

    include: Patterns | None
    exclude: Patterns | None
    rename: Rename | None


def choose(
    state: Any,
    *,
    include: Patterns | None,
    exclude: Patterns | None,
    rename: Rename | None,
    path: str,
    name_of: Callable[[Any], str | None] | None = None,
) -> Any:
    """Return nested state without the leaves that are not chosen, and with renamed ones where their new names say.

    A leaf is everything but a dict, list or tuple with something in it. Its name is the keys and indices that lead to
    it, joined by ``/``, or what `name_of` returns for it. A dict loses what is not chosen, and a list or tuple has None
    in its place. A leaf that gets a new name moves: the new name is split at ``/`` into keys of dicts, from the top.

    Raises:
        VariableNotFound, VariableMismatch, UsageError: see `varstore.load`; or a new name leads into a leaf.
    """
    if include is None and exclude is None and rename is None:
        return state
    names: list[str] = []

    def note(name: str, _leaf: Any) -> Any:
        names.append(name)
        return _NOTHING

    _rebuilt(state, (), name_of, _told_apart(note))
    chosen = select(names, include=include, exclude=exclude, rename=rename, path=path)
    targets = {source: target for target, source in chosen.items()}
    moved: dict[str, Any] = {}

    def keep(name: str, leaf: Any) -> Any:
        target = targets.get(name)
        if target is not None and target != name:
            moved[target] = leaf
        return leaf if target == name else _NOTHING

    rest = _rebuilt(state, (), name_of, _told_apart(keep))
    if not moved:
        return {} if rest is _NOTHING else rest
    root = rest if isinstance(rest, dict) else {}
    for target, leaf in moved.items():
        _put(root, target.split("/"), leaf, path)
    return root


def _told_apart(keep: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Return `keep` with the names that the arrays of an opened file have, where their joined keys meet."""
    names = Names()
    return lambda name, leaf: keep(names.own(name) if isinstance(leaf, LazyArray) else name, leaf)


def _rebuilt(
    node: Any, parts: tuple[str, ...], name_of: Callable[[Any], str | None] | None, keep: Callable[[str, Any], Any]
) -> Any:
    """Return a copy of the node; `keep` returns what comes in the place of a leaf, or that nothing does."""
    if not isinstance(node, dict | list | tuple | Unbuilt) or not node:
        given = None if name_of is None else name_of(node)
        return keep(given or "/".join(parts) or BARE, node)
    if isinstance(node, dict):
        items = {key: _rebuilt(item, (*parts, _part(key)), name_of, keep) for key, item in node.items()}
        left = [(key, item) for key, item in items.items() if item is not _NOTHING]
        return dict_like(node, left) if left else _NOTHING
    if isinstance(node, Unbuilt):
        items = {key: _rebuilt(item, (*parts, _part(key)), name_of, keep) for key, item in node.items.items()}
        rest = {key: item for key, item in items.items() if item is not _NOTHING}
        if node.is_row and rest:
            rest = {key: rest.get(key) for key in items}
        return Unbuilt(rest, node.build, is_row=node.is_row) if rest else _NOTHING
    rows = [_rebuilt(item, (*parts, str(index)), name_of, keep) for index, item in enumerate(node)]
    if all(row is _NOTHING for row in rows):
        return _NOTHING
    rows = [None if row is _NOTHING else row for row in rows]
    return type(node)(*rows) if hasattr(node, "_fields") else type(node)(rows)


def _part(key: Any) -> str:
    return key if type(key) is str else repr(key)


def _put(root: dict[Any, Any], parts: list[str], leaf: Any, path: str) -> None:
    node: Any = root
    for part in parts[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict) or parts[-1] in node:
        raise UsageError(
            "a new name leads to where another value is",
            path=path,
            field="rename",
            found=repr("/".join(parts)),
            hint="leave one of them out with exclude=, or choose another name",
        )
    node[parts[-1]] = leaf
