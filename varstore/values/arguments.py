"""Check the arguments of the public functions: what the annotation of a parameter says, the value must be.

`checked` wraps a function. The table has a row for each annotation whose values can be told without knowing the
function: paths, flags, counts, texts; and the value of a `Literal` must be one of those that it lists. A wrong value is
refused with the name of its parameter, before anything is done. Annotations that are not in the table, such as those of
arrays and patterns, are checked where they are used.
"""

from __future__ import annotations

import ast
import functools
import operator
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from varstore.errors import UsageError, VarstoreError

__all__ = ["check_names", "checked", "checked_path", "described"]

Given = ParamSpec("Given")
Result = TypeVar("Result")
Check = Callable[[Any, str], Any]
"""Returns the value to use in place of the given one, or raises; the text is the name of the parameter."""

_STATE_DICT = "pass its state_dict(), or the object to save of its framework's module in varstore.adapters"

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def checked(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Return the function with a check of its arguments.

    Raises:
        UsageError: at a call, if a value is not what the annotation of its parameter says, or if the interpreter is
            ending and a module would have to be imported.
    """
    checks = _checks_of(function)
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]

    @functools.wraps(function)
    def call(*arguments: Given.args, **options: Given.kwargs) -> Result:
        given: list[Any] = list(arguments)
        named: dict[str, Any] = options
        for at, name in enumerate(positional[: len(given)]):
            if name in checks:
                given[at] = checks[name](given[at], name)
        for name, value in options.items():
            if name in checks:
                named[name] = checks[name](value, name)
        try:
            return function(*given, **named)
        except ImportError as error:
            if isinstance(error, VarstoreError) or not sys.is_finalizing():
                raise
            raise UsageError(
                "the interpreter is ending, and loads no more modules",
                hint="call it before the program ends, or in a function that is registered with atexit",
            ) from None

    return call


def described(value: object) -> str:
    """Return a wrong value as text: its type and, where it is short to say, the value."""
    kind = type(value).__name__
    return f"{value!r} ({kind})" if isinstance(value, str | bytes | int | float | None) else kind


def checked_path(value: Any, field: str) -> str:
    """Return a path as text, with the user's home directory in place of ``~``.

    Raises:
        UsageError: it is not a string or a ``PathLike`` of one, is empty, is a URL, or cannot be a path of the system.
    """
    try:
        path = os.fspath(value)
    except TypeError:
        raise _wrong(value, field, "a string or a pathlib.Path") from None
    if not isinstance(path, str):
        raise UsageError("a path must be text", field=field, found=repr(path), hint="use os.fsdecode(path)")
    if not path:
        raise UsageError("the path is empty", field=field)
    if "://" in path and (scheme := _URL.match(path)):
        raise UsageError(
            "a URL is not a path: varstore reads and writes directories of this machine",
            field=field,
            found=path,
            hint="leave the scheme out" if scheme[1] == "file" else "mount the store as a directory, or copy the files",
        )
    if "\0" in path:
        raise UsageError("a path cannot contain NUL", field=field, found=repr(path))
    try:
        path.isascii() or os.fsencode(path)
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start} of {path!r}"
        raise UsageError("a path must be valid Unicode", field=field, found=found) from None
    return os.path.expanduser(path) if path[0] == "~" else path


def check_names(variables: Mapping[str, Any], field: str) -> None:
    """Check that the keys of a mapping of variables are names.

    Raises:
        UsageError: a key is not a string.
    """
    for name in variables:
        if not isinstance(name, str):
            raise UsageError(
                "a variable's name must be a string",
                field=field,
                found=described(name),
                hint="nested state that has other keys is for save_state and load_state",
            )


def _wrong(value: object, field: str, expected: str, hint: str | None = None) -> UsageError:
    return UsageError("a wrong value", field=field, found=described(value), expected=expected, hint=hint)


def _path_or_mapping(value: Any, field: str) -> Any:
    return value if isinstance(value, Mapping) else _path_or_file(value, field)


def _path_or_file(value: Any, field: str) -> Any:
    is_path = isinstance(value, str | os.PathLike)
    return value if not is_path and (hasattr(value, "read") or hasattr(value, "write")) else checked_path(value, field)


def _flag(value: Any, field: str) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise _wrong(value, field, "True or False")


def _whole(value: Any, field: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise _wrong(value, field, "a whole number") from None


def _seconds(value: Any, field: str) -> float:
    if not isinstance(value, int | float | np.integer | np.floating) or not 0 <= value <= threading.TIMEOUT_MAX:
        raise _wrong(value, field, "a number of seconds")
    return float(value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, field, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(value, field, "valid Unicode") from None
    return value


def _progress(value: Any, field: str) -> Any:
    if value is None or value is True or value is False or callable(value):
        return value
    raise _wrong(value, field, "a function of (bytes done, bytes in all), True, or None")


def _mapping(value: Any, field: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, field, "a mapping", hint=_STATE_DICT if hasattr(value, "state_dict") else None)
    return value


def _bytes(value: Any, field: str) -> bytes:
    if not isinstance(value, bytes | bytearray):
        raise _wrong(value, field, "bytes")
    return bytes(value)


def _or_none(check: Check) -> Check:
    return lambda value, field: None if value is None else check(value, field)


_TABLE: dict[str, Check] = {
    "Path": checked_path,
    "str | os.PathLike[str]": checked_path,
    "str | os.PathLike[str] | BinaryIO": _path_or_file,
    "Path | Checkpoint": _path_or_mapping,
    "str | os.PathLike[str] | Checkpoint": _path_or_mapping,
    "Path | Checkpoint | ForeignCheckpoint": _path_or_mapping,
    "Path | Checkpoint | Mapping[str, Any]": _path_or_mapping,
    "bool": _flag,
    "int": _whole,
    "float": _seconds,
    "str": _text,
    "bytes": _bytes,
    "Progress": _progress,
    "Mapping[str, Any]": _mapping,
    "Mapping[str, str]": _mapping,
    "Mapping[str, Mapping[str, Any]]": _mapping,
}


def _checks_of(function: Callable[..., Any]) -> dict[str, Check]:
    """Return the checks of a function's parameters by name, those of a record of options included."""
    known = vars(sys.modules[function.__module__])
    checks: dict[str, Check | None] = {}
    for name, said in function.__annotations__.items():
        record = re.fullmatch(r"Unpack\[(\w+)\]", str(said))
        if record is not None:
            options = known[record[1]]
            checks |= {
                option: _check_for(of, _namespace(of, options)) for option, of in options.__annotations__.items()
            }
        elif name != "return":
            checks[name] = _check_for(said, known)
    return {name: check for name, check in checks.items() if check is not None}


def _namespace(said: Any, record: type) -> Mapping[str, Any]:
    """Return the names that the annotation of an option can use: those of the module that it is written in."""
    return vars(sys.modules[getattr(said, "__forward_module__", None) or record.__module__])


def _check_for(said: Any, known: Mapping[str, Any]) -> Check | None:
    text = str(getattr(said, "__forward_arg__", said))
    plain = text.removesuffix(" | None")
    if plain in _TABLE:
        return _TABLE[plain] if plain == text else _or_none(_TABLE[plain])
    choices = _choices(known.get(plain)) or _spelled_out(plain)
    if choices and plain != text:
        choices = (None, *choices)
    return partial(_one_of, choices) if choices else None


def _choices(said: Any) -> tuple[Any, ...]:
    """Return the values that a Literal lists, or a Literal and None; nothing for any other type."""
    if get_origin(said) is Literal:
        return get_args(said)
    parts = get_args(said) if get_origin(said) in (Union, UnionType) else ()
    is_listed = parts and all(part is NoneType or get_origin(part) is Literal for part in parts)
    found = [None if part is NoneType else choice for part in parts for choice in get_args(part) or (None,)]
    return tuple(sorted(found, key=lambda choice: choice is not None)) if is_listed else ()


def _spelled_out(text: str) -> tuple[str, ...]:
    """Return the words of an annotation like ``Literal['fast', 'small']``; nothing for any other."""
    found = re.fullmatch(r"Literal\[(['\"].*)\]", text)
    return () if found is None else ast.literal_eval(f"({found[1]},)")


def _one_of(choices: tuple[Any, ...], value: Any, field: str) -> Any:
    if not isinstance(value, str | None) or value not in choices:
        expected = " or ".join(map(repr, choices))
        raise UsageError("unknown mode", field=field, found=repr(value), expected=expected)
    return value
