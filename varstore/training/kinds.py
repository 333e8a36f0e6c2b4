"""Values of a state beside arrays, numbers, text and plain containers: how the tree spells them, and what they become.

A value, such as a path or a date, is spelt as a few plain items. A container, such as a deque, holds nodes. A record is
an object of a class that the tree only names: it comes back as a `SimpleNamespace`, or as an object of the class that
the caller gives for the name. Of that class nothing is called: the object is made by `object.__new__`, and its
attributes are put into its `__dict__` or its slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import operator
import os
import pathlib
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from varstore.errors import UsageError
from varstore.layout.keys import are_far_apart
from varstore.training.tensors import DEVICE, framework_named
from varstore.values.arguments import described
from varstore.values.nodes import BARE, Unbuilt, dict_like

__all__ = [
    "CONTAINERS",
    "PAIRED",
    "VALUES",
    "Types",
    "checked_types",
    "container",
    "members",
    "plain",
    "spelt",
    "tag_of",
    "unsaved",
]

Types: TypeAlias = Mapping[str, type]
"""Classes by the names that a tree has for them, such as ``"project.config.Config"``."""

_DTYPE = re.compile(r"[a-z][a-z0-9_]*")
_BITS = re.compile(r"[0-9]{1,20}")
"""What the name of several members has for bits that are not of a member: ``"A|8"``."""
_MICROSECOND = datetime.timedelta(microseconds=1)


# --- values ----------------------------------------------------------------------------------------------------------


def spelt(value: Any, place: str) -> tuple[str, list[Any]] | None:
    """Return the kind of a value and the plain items that spell it; None for what is not such a value.

    Raises:
        UsageError: it cannot be spelt; `place` is where it is.
    """
    kind = type(value)
    known = _SPELT.get(kind) or _SPELT_OF_TORCH.get(f"{kind.__module__}.{kind.__qualname__}")
    if known is None:
        return None
    name, spell = known
    try:
        return name, spell(value)
    except ValueError as error:
        raise UsageError(f"{kind.__name__} cannot be saved as data", field=place, hint=str(error)) from None


def _zone(value: datetime.datetime | datetime.time) -> list[Any]:
    zone = value.tzinfo
    if zone is not None and type(zone) is not datetime.timezone:
        raise ValueError("give it the time zone datetime.timezone.utc")
    offset = None if zone is None else zone.utcoffset(None) // _MICROSECOND
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, offset]


def _zoned(kind: Any) -> Callable[[list[Any]], Any]:
    def read(items: list[Any]) -> Any:
        text, fold, offset = items
        zone = None if offset is None else datetime.timezone(offset * _MICROSECOND)
        return kind.fromisoformat(text).replace(fold=fold, tzinfo=zone)

    return read


def _device(value: Any) -> list[Any]:
    if not DEVICE.fullmatch(str(value)) and str(value) != "meta":
        raise ValueError("save its name, str(device)")
    return [str(value)]


def _device_of(items: list[Any]) -> Any:
    [name] = items
    if not DEVICE.fullmatch(name) and name != "meta":
        raise ValueError(f"{name!r} is not a device")
    return framework_named("torch").device(name)


def _dtype_of(items: list[Any]) -> Any:
    [name] = items
    torch = framework_named("torch")
    dtype = vars(torch).get(name) if _DTYPE.fullmatch(name) else None  # getattr may import a submodule
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a type of torch")
    return dtype


def _size_of(items: list[Any]) -> Any:
    if not all(type(item) is int for item in items):
        raise TypeError("a torch.Size of other things than integers")
    return framework_named("torch").Size(items)


_SPELT: dict[type, tuple[str, Callable[[Any], list[Any]]]] = {
    pathlib.PosixPath: ("Path", lambda value: [os.fspath(value)]),
    pathlib.WindowsPath: ("Path", lambda value: [os.fspath(value)]),
    pathlib.PurePosixPath: ("PurePosixPath", lambda value: [os.fspath(value)]),
    pathlib.PureWindowsPath: ("PureWindowsPath", lambda value: [os.fspath(value)]),
    datetime.datetime: ("datetime", _zone),
    datetime.time: ("time", _zone),
    datetime.date: ("date", lambda value: [value.isoformat()]),
    datetime.timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    np.str_: ("numpy.str_", lambda value: [str(value)]),
}
_SPELT_OF_TORCH: dict[str, tuple[str, Callable[[Any], list[Any]]]] = {
    "torch.Size": ("torch.Size", lambda value: list(map(int, value))),
    "torch.dtype": ("torch.dtype", lambda value: [str(value).removeprefix("torch.")]),
    "torch.device": ("torch.device", _device),
}
VALUES: dict[str, Callable[[list[Any]], Any]] = {
    "Path": lambda items: pathlib.Path(*_texts(items)),
    "PurePosixPath": lambda items: pathlib.PurePosixPath(*_texts(items)),
    "PureWindowsPath": lambda items: pathlib.PureWindowsPath(*_texts(items)),
    "datetime": _zoned(datetime.datetime),
    "time": _zoned(datetime.time),
    "date": lambda items: datetime.date.fromisoformat(*items),
    "timedelta": lambda items: datetime.timedelta(*items),
    "numpy.str_": lambda items: np.str_(*_texts(items)),
    "torch.Size": _size_of,
    "torch.dtype": _dtype_of,
    "torch.device": _device_of,
}
"""What reads each kind of value from its items; KeyError, TypeError or ValueError if they are wrong."""


def _texts(items: list[Any]) -> list[str]:
    if len(items) != 1 or not isinstance(items[0], str):
        raise TypeError("not one text")
    return items


# --- containers and records ------------------------------------------------------------------------------------------

_FACTORIES = {
    kind.__name__: kind
    for kind in (list, dict, set, frozenset, tuple, int, float, complex, bool, str, bytes, OrderedDict, Counter, deque)
}
PAIRED = ("defaultdict", "mapping", "record")
"""The kinds whose items are pairs of a key and a value."""
CONTAINERS = (*PAIRED, "deque", "enum")


def tag_of(value: Any, place: str) -> dict[str, Any] | None:
    """Return what the tree says of a container or record but its items; None for what is neither.

    Raises:
        UsageError: it cannot be saved as data; `place` is where it is.
    """
    kind = type(value)
    named = {"type": f"{kind.__module__}.{kind.__qualname__}"}
    if kind is deque:
        return {"$": "deque", "maxlen": value.maxlen}
    if kind is defaultdict:
        return {"$": "defaultdict", "factory": _factory(value.default_factory, place)}
    if isinstance(value, enum.Enum):
        return {"$": "enum", **named}
    if isinstance(value, dict):
        factory = _name_of_factory(getattr(value, "default_factory", None)) if isinstance(value, defaultdict) else None
        return {"$": "mapping", **named} | ({} if factory is None else {"factory": factory})
    is_record = kind in (argparse.Namespace, SimpleNamespace) or dataclasses.is_dataclass(kind)
    return {"$": "record", **named} if is_record and not hasattr(kind, "state_dict") else None


def _name_of_factory(factory: Any) -> str | None:
    """Return the name of the factory of a defaultdict, None if it is not one of the plain types."""
    return next((name for name, kind in _FACTORIES.items() if kind is factory), None)


def _factory(factory: Any, place: str) -> str | None:
    name = _name_of_factory(factory)
    if factory is not None and name is None:
        raise UsageError(
            "a defaultdict whose factory is code cannot be saved as data", field=place, hint="save dict(...) of it"
        )
    return name


def members(value: Any) -> Iterable[Any]:
    """Return what is in a container or record: pairs of keys and values, or items."""
    if isinstance(value, enum.Enum):
        return [value._name_, value._value_]
    if isinstance(value, dict):
        return dict.items(value)
    if isinstance(value, deque):
        return value
    return list(vars(value).items() if not dataclasses.is_dataclass(value) else _fields(value))


def unsaved(value: Any) -> list[str]:
    """Return the attributes that `members` does not have: those of dicts, and of dataclasses beside their fields."""
    lost: list[str] = []
    if isinstance(value, dict):
        fields = set()
        if isinstance(value, defaultdict) and value.default_factory is not None:
            lost = [] if _name_of_factory(value.default_factory) else ["default_factory"]
    elif dataclasses.is_dataclass(value) and not isinstance(value, enum.Enum):
        fields = {field.name for field in dataclasses.fields(value)}
    else:
        return []
    extra = getattr(value, "__dict__", {}).keys() - fields
    return sorted(
        [*lost, *(name for name in extra if not isinstance(getattr(type(value), name, None), cached_property))]
    )


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            yield field.name, getattr(value, field.name)


def container(node: Mapping[str, Any], items: list[Any], types: Types) -> Any:
    """Return the container or record that a node describes, to be built when its items are read.

    Raises:
        UsageError: an object of the class in `types` cannot be made.
        LookupError, TypeError, ValueError: the node is not one of those that `tag_of` and `members` make.
    """
    kind = node["$"]
    if kind == "deque":
        maxlen = node["maxlen"]
        if maxlen is not None and (type(maxlen) is not int or maxlen < len(items)):
            raise ValueError("a deque that is longer than its maxlen")
        return Unbuilt(dict(enumerate(items)), lambda rest: deque(rest.values(), maxlen), is_row=True)
    if kind == "enum":
        return _enum(node["type"], items, types)
    if not are_far_apart(key for key, _ in items):
        raise ValueError("keys that were chosen to have the same hashes")
    pairs = dict(items)
    if kind == "defaultdict":
        factory = None if node["factory"] is None else _FACTORIES[node["factory"]]
        return Unbuilt(pairs, lambda rest: defaultdict(factory, rest))
    name = node["type"]
    cls = types.get(name)
    if not isinstance(name, str) or (kind == "record" and not all(isinstance(key, str) for key in pairs)):
        raise TypeError("a record whose name or attributes are not text")
    if kind == "mapping":
        factory = _FACTORIES[node["factory"]] if "factory" in node else None
        return Unbuilt(pairs, dict if cls is None else lambda rest: _mapping(cls, name, rest, factory))
    return Unbuilt(pairs, _namespace if cls is None else lambda rest: _record(cls, name, rest))


def checked_types(types: Any) -> Types:
    """Return the classes that a caller gives by name.

    Raises:
        UsageError: they are not classes by name.
    """
    given = {} if types is None else types
    if not isinstance(given, Mapping) or not all(isinstance(one, type) for one in given.values()):
        raise UsageError("not classes by name", field="types", found=described(types), expected="a dict of classes")
    return given


def _namespace(attributes: Mapping[str, Any]) -> SimpleNamespace:
    made = SimpleNamespace()
    vars(made).update(attributes)
    return made


def _enum(name: str, items: list[Any], types: Types) -> Any:
    member, value = items
    cls = types.get(name)
    if cls is None:
        return Unbuilt({"name": member, "value": value}, _namespace)
    known = vars(cls).get("_member_map_", {}) if issubclass(cls, enum.Enum) else {}
    found = known[member] if member in known else _composite(cls, known, member, value)
    if found is None:
        raise _misfit(cls, name, f"it does not have a member {member!r}")
    return found


def _composite(cls: type, known: Mapping[str, Any], member: Any, value: Any) -> Any:
    """Return several members of a Flag as one, by their names, or by the value if it has none; None if that cannot be.

    Only what the standard library defines is called, and nothing that the class itself does.
    """
    if not issubclass(cls, enum.Flag) or vars(cls).get("_member_type_") not in (object, int):
        return None
    names = member.split("|") if isinstance(member, str) else []
    parts = [known[one]._value_ if one in known else int(one) if _BITS.fullmatch(one) else None for one in names]
    whole = value if member is None else functools.reduce(operator.or_, parts) if parts and None not in parts else None
    if type(whole) is not int:
        return None
    members = cls._value2member_map_
    base = next(one for one in cls.__mro__ if one.__module__ == "enum" and "_missing_" in vars(one))
    try:
        made = vars(base)["_missing_"].__func__(cls, whole) if whole not in members else members[whole]
    except (ValueError, TypeError):
        return None
    return made if isinstance(made, cls) and made._value_ == whole else None


def _mapping(cls: type, name: str, items: Mapping[Any, Any], factory: Callable[[], Any] | None) -> Any:
    base: Any = next((one for one in cls.__mro__ if one in (OrderedDict, defaultdict, dict)), None)
    if base is None:
        raise _misfit(cls, name, "it is not a dict")
    made = base.__new__(cls)
    if base is defaultdict:
        vars(defaultdict)["default_factory"].__set__(made, factory)
    for key, value in items.items():
        base.__setitem__(made, key, value)
    return made


def _record(cls: type, name: str, attributes: Mapping[str, Any]) -> Any:
    try:
        made: Any = object.__new__(cls)
    except TypeError as error:
        raise _misfit(cls, name, str(error)) from None
    slots = {
        key: member
        for one in reversed(cls.__mro__)
        for key, member in vars(one).items()
        if isinstance(member, MemberDescriptorType)
    }
    rest = {key: value for key, value in attributes.items() if key not in slots}
    for key, value in attributes.items():
        if key in slots:
            slots[key].__set__(made, value)
    if rest:
        try:
            held = object.__getattribute__(made, "__dict__")
        except AttributeError:
            raise _misfit(cls, name, f"it does not have a place for {next(iter(rest))!r}") from None
        held.update(rest)
    return made


def _misfit(cls: type, name: str, why: str) -> UsageError:
    return UsageError(
        f"{name} cannot come back as an object of this class: {why}",
        field="types",
        found=f"{cls.__module__}.{cls.__qualname__}",
        hint="leave it out of types= to get a types.SimpleNamespace or a dict",
    )


# --- for other formats -----------------------------------------------------------------------------------------------

_PLAINER: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath, np.str_), str
    ),
    **dict.fromkeys((datetime.datetime, datetime.date, datetime.time), lambda value: value.isoformat()),
    datetime.timedelta: datetime.timedelta.total_seconds,
    bytearray: bytes,
    deque: list,
    defaultdict: dict,
    SimpleNamespace: lambda value: dict(vars(value)),
}
_PLAINER_OF_TORCH: dict[str, Callable[[Any], Any]] = {"torch.Size": tuple, "torch.dtype": str, "torch.device": str}


def plain(state: Any, changed: dict[str, str], path: tuple[str, ...] = ()) -> Any:
    """Return a state with numbers, text and plain containers in place of the kinds above, as other formats hold them.

    `changed` gets what became of each, by name, as in ``"deque -> list"``.
    """
    kind = type(state)
    way = _PLAINER.get(kind) or _PLAINER_OF_TORCH.get(f"{kind.__module__}.{kind.__qualname__}")
    if way is not None:
        state = way(state)
        changed["/".join(path) or BARE] = f"{kind.__name__} -> {type(state).__name__}"
    if isinstance(state, dict):
        pairs = [(plain(key, {}), plain(item, changed, (*path, str(key)))) for key, item in state.items()]
        return dict_like(state, pairs)
    if isinstance(state, list | tuple):
        items = [plain(item, changed, (*path, str(at))) for at, item in enumerate(state)]
        return type(state)(*items) if hasattr(state, "_fields") else type(state)(items)
    return state
