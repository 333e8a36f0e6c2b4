"""Choose variables by name, and rename them.

The parts of a name are separated by ``/``, ``.`` and ``-`` (OneFlow writes ``conv1-weight``); ``_`` belongs to a part
(``running_mean``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.text.hints import listed, nearest

__all__ = ["Patterns", "Rename", "SEPARATOR", "matcher", "patterns_of", "select"]

Patterns: TypeAlias = str | Iterable[str]
Rename: TypeAlias = Mapping[str, str | None] | Iterable[tuple[str | re.Pattern[str], str]] | Callable[[str], str | None]

SEPARATOR = re.compile(r"[/.\-]")
"""Separates the parts of a name."""

_WILDCARD = re.compile(r"[*?]|\[.*?\]")


def select(
    names: Iterable[str],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    path: str | None = None,
    all_apply: bool = False,
) -> dict[str, str]:
    """Return a dict of target names to source names for the chosen variables, in the order of the source.

    `include` and `exclude` are glob patterns, one or several. They are matched, case-sensitively, against the whole
    name in the source, before renaming; ``*`` also matches separators. A name always matches itself, even if it
    contains brackets. Every pattern of `include` must match at least one name; those of `exclude` need not.

    `rename` is one of three:

    - A dict of prefixes to replacements. The longest prefix that ends at a boundary is replaced, literally. A
      boundary is the end of the name, the place before ``/``, ``.`` or ``-``, or the end of a prefix whose last
      character is not a letter or digit (``"module."``, ``"layer_"``). The replacement ``""`` also removes the
      separator that follows; the replacement None drops the variable. The prefix ``""`` matches every name that no
      other prefix matches.
    - A list of (regex, replacement). All are applied in order with ``re.sub``, each to the result of the one before.
    - A function that takes a name and returns the new name, or None to drop the variable.

    `path` is the source of the names, for messages. With `all_apply`, every pattern of `exclude` must match, and every
    way to rename must change a name.

    Raises:
        VariableNotFound: a pattern of `include` matches no name, or with `all_apply` another one; the message lists the
            nearest names.
        VariableMismatch: two variables would get the same name; the message contains both.
        UsageError: a pattern, regex, replacement or new name is invalid.
    """
    chosen = _chosen(list(names), include, exclude, path, all_apply=all_apply)
    if rename is None:
        return {name: name for name in chosen}
    unused: dict[str, None] = {}
    renamed = _renamer(rename, unused)
    selected: dict[str, str] = {}
    for source in chosen:
        target = renamed(source)
        if target is None:
            continue
        if not isinstance(target, str) or not target:
            raise UsageError(
                "renaming must return a non-empty name, or None to drop the variable",
                path=path,
                variable=source,
                field="rename",
                found=_described(target),
            )
        if target in selected:
            raise VariableMismatch(
                f"two variables would be loaded as {target!r}",
                path=path,
                field="rename",
                found=f"{selected[target]!r} and {source!r}",
                hint="leave one of them out with exclude=, or rename it to something else",
            )
        selected[target] = source
    if all_apply and unused:
        way = next(iter(unused))
        raise VariableNotFound(
            f"no variable is renamed by {way!r}", path=path, field="rename", hint=_hint_for_pattern(f"{way}*", chosen)
        )
    return selected


def _chosen(
    names: list[str], include: Patterns | None, exclude: Patterns | None, path: str | None, *, all_apply: bool
) -> list[str]:
    if include is not None:
        wanted = patterns_of("include", include)
        is_wanted = matcher(wanted)
        everything, names = names, [name for name in names if is_wanted(name)]
        _check_patterns("include", wanted, names, everything, path)
    if exclude is not None:
        unwanted = patterns_of("exclude", exclude)
        is_unwanted = matcher(unwanted)
        if all_apply:
            _check_patterns("exclude", unwanted, [name for name in names if is_unwanted(name)], names, path)
        names = [name for name in names if not is_unwanted(name)]
    return names


def _check_patterns(
    field: str, patterns: tuple[str, ...], matched: list[str], everything: list[str], path: str | None
) -> None:
    found = set(matched)
    for pattern in patterns:
        if pattern not in found and not any(map(matcher((pattern,)), matched)):
            raise VariableNotFound(
                f"no variable matches the pattern {pattern!r}",
                path=path,
                field=field,
                hint=_hint_for_pattern(pattern, everything),
            )


def patterns_of(field: str, given: object) -> tuple[str, ...]:
    """Return the patterns that a caller gave, one or several.

    Raises:
        UsageError: one is not a string.
    """
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) and not isinstance(given, bytes) else (given,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(
                "not a pattern", field=field, found=_described(pattern), expected="a glob string or a list of them"
            )
    return patterns


def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches one of the patterns, as in `select`."""
    exact = frozenset(patterns)
    globs = [fnmatch.translate(pattern) for pattern in patterns if _WILDCARD.search(pattern)]
    if not globs:
        return exact.__contains__
    match = re.compile("|".join(globs)).match
    return lambda name: name in exact or match(name) is not None


def _hint_for_pattern(pattern: str, names: list[str]) -> str:
    literal, *wild = _WILDCARD.split(pattern)
    heads = {name[: cut.end()]: None for name in names for cut in SEPARATOR.finditer(name)}
    near = [repr(head + "*") for head in nearest(literal, heads)] if wild else list(map(repr, nearest(pattern, names)))
    if near:
        return f"the nearest are {', '.join(near)}"
    return f"the names are {listed(list(map(repr, names)))}" if names else "there are no variables"


def _renamer(rename: object, unused: dict[str, None]) -> Callable[[str], object]:
    """Return the function that renames; `unused` gets the prefixes or regexes, and loses each when it applies."""
    if isinstance(rename, Mapping):
        return _by_prefix(rename, unused)
    if callable(rename):
        return rename
    if isinstance(rename, Iterable) and not isinstance(rename, (str, bytes)):
        return _by_regex([_substitution(item) for item in rename], unused)
    raise UsageError(
        "not a way to rename",
        field="rename",
        found=_described(rename),
        expected="a dict of prefixes, a list of (regex, replacement), or a function",
    )


def _by_prefix(prefixes: Mapping[object, object], unused: dict[str, None]) -> Callable[[str], str | None]:
    table: dict[str, str | None] = {}
    for prefix, replacement in prefixes.items():
        if not isinstance(prefix, str) or not (replacement is None or isinstance(replacement, str)):
            raise UsageError(
                "not a prefix and its replacement",
                field="rename",
                found=f"{prefix!r}: {replacement!r}",
                expected="two strings, or None as the replacement to drop what has the prefix",
            )
        table[prefix] = replacement
    unused.update(dict.fromkeys(table))
    lengths = sorted({len(prefix) for prefix in table}, reverse=True)

    def renamed(name: str) -> str | None:
        for length in lengths:
            prefix, rest = name[:length], name[length:]
            if len(prefix) < length or prefix not in table:
                continue
            ends_part = not prefix or not prefix[-1].isalnum()
            if not (ends_part or not rest or SEPARATOR.match(rest)):
                continue
            unused.pop(prefix, None)
            replacement = table[prefix]
            if replacement == "" and not ends_part:
                return rest[1:]
            return None if replacement is None else replacement + rest
        return name

    return renamed


def _by_regex(substitutions: list[tuple[re.Pattern[str], str]], unused: dict[str, None]) -> Callable[[str], str]:
    unused.update((pattern.pattern, None) for pattern, _ in substitutions)

    def renamed(name: str) -> str:
        for pattern, replacement in substitutions:
            name, count = pattern.subn(replacement, name)
            if count:
                unused.pop(pattern.pattern, None)
        return name

    return renamed


def _substitution(item: Any) -> tuple[re.Pattern[str], str]:
    try:
        regex, replacement = item
        pattern = re.compile(regex)
        pattern.sub(replacement, "")  # raises for a wrong group in the replacement even if no name matches
        if isinstance(replacement, str):
            return pattern, replacement
        problem = "the replacement is not a string"
    except (TypeError, ValueError, IndexError, re.error) as error:
        problem = str(error)
    raise UsageError(
        f"not a regular expression and its replacement ({problem})",
        field="rename",
        found=_described(item),
        expected="(regex, replacement)",
    )


def _described(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
