"""Read pickles without running code.

A pickle is a program for a small stack machine. Python's own machine can import any module and call any function.
This one cannot: names in the file are looked up only in the table of the format, nothing is imported, no attributes are
accessed, and only the constructors in the table are called, which turn data into data. A name that is not in the table
becomes an inert `Global`. With `unknown="error"`, calling it raises `UnsafeContent`; so does leaving it unclaimed, that
is, without any code of the format that has accounted for it. With `unknown="opaque"`, calling it makes an `Instance`,
which only keeps the arguments and the state that the object would have got. Nothing can run either way. A name that has
no use but to run code is refused in both modes.

Memory and time are bounded by the size of the file, so that a small file cannot exhaust the machine. Long strings stay
in the file, as a `Span`. Keys of dicts are plain values, whose hash takes constant time, and are refused if they were
chosen to collide. Containers, and all that constructors copy, are paid for from the budget of the file with
`Machine.charge`.

Source: the opcodes are described in the standard library's pickletools,
https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import codecs
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import numpy as np

from varstore.errors import FormatError, UnsafeContent, UsageError, VarstoreError
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Mapped
from varstore.formats.pickles.code import runs_code
from varstore.formats.pickles.names import (
    SPAN_FROM,
    Constructor,
    Global,
    OldString,
    Span,
    Table,
    shorten,
    show,
)
from varstore.formats.pickles.tape import Tape
from varstore.layout.keys import FEW, KEYED, KeyTable, are_far_apart, packed

__all__ = ["ITEM", "NODE", "Instance", "Machine", "Record", "Unknown"]

Unknown = Literal["error", "opaque"]
"""What becomes of names that are not in the table."""

NODE, ITEM = 400, 16
"""The bytes of memory that a container and an item of it take, in the pickle and again in the tree made of it."""
_PAIR = 200
_SET = 700
_MARK = 100
_COLLIDE = "has keys that were chosen to have the same hashes"

_AS_BYTES = "bytes"
_ASCII = bytes(range(128))
_LONGEST_INT = 1024
_KEY_LIMIT = 1 << 61
_HINT = "varstore does not run code from files; if you trust its author, load the file with its own framework"

_ENCODING_HINT = "pass its encoding to read or convert, such as encoding='latin-1', or 'bytes' to leave it so"
_NESTED_HINT = (
    f"{_HINT}, and save it again with pickle protocol 4, which names such a class without a call: "
    "torch.save(…, pickle_protocol=4)"
)
_BUILTIN = ("builtins", "__builtin__")


class Record:
    """A value under construction to which the pickle can give a state; formats derive their tensors from it."""

    __slots__ = ()

    def build(self, machine: Machine, state: Any) -> None:
        """Apply the argument of the opcode BUILD."""
        machine.fail("an object that does not take a state is given one", found=show(state))


class Instance(Record):
    """An object of an unknown class: its name, and what it would have been made of, inert."""

    __slots__ = ("arguments", "items", "keywords", "offset", "state", "type")

    def __init__(self, type: Global | None, offset: int, arguments: tuple[Any, ...] = (), keywords: Any = None) -> None:
        self.type = type
        self.offset = offset
        self.arguments = arguments
        self.keywords = keywords
        self.state: Any = None
        self.items: list[Any] | dict[Any, Any] | None = None

    def __str__(self) -> str:
        return f"an object of {self.type}"

    def build(self, _machine: Machine, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def filled(self, machine: Machine, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
        """Return the list or dict of the items that the pickle gives to the object."""
        if self.items is None and machine.is_lenient:
            machine.charge(NODE)
            self.items = kind()
        return self.items if type(self.items) is kind else self


class Machine(Tape):
    """Run the pickle at `start`; afterwards, `stop` is the byte after it, `foreign` the names not in the table.

    `persistent` returns the values of persistent ids. `encoding` is that of a str of Python 2, if the caller may choose
    it, or "bytes" to keep it as bytes; the values of an array need none, because they are never decoded. With
    `modules`, objects of unknown classes that are created without arguments become `Instance`, and the caller accounts
    for each of them; so do all others with `unknown="opaque"`, which need not be accounted for.
    """

    def __init__(
        self,
        data: Mapped,
        *,
        path: str,
        table: Table,
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
        modules: bool = False,
        unknown: Unknown = "error",
        encoding: str | None = None,
        start: int = 0,
    ) -> None:
        super().__init__(data, path, start)
        self._encoding = "utf-8" if encoding is None else _checked_encoding(encoding)
        self._can_choose = encoding is not None
        self._version = 0
        self.foreign: list[Global] = []
        self._table = table
        self._persistent = persistent
        self._modules = modules
        self.is_lenient = unknown == "opaque"
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: list[Any] = []
        self._far_memo: dict[bytes, Any] = {}
        self._tables: dict[int, tuple[Any, KeyTable]] = {}
        self.budget = budget
        self.charge = budget.charge
        """Pays for bytes of memory from the budget of the file, or raises UnsafeContent."""

    def run(self) -> Any:
        """Return the object that the pickle describes.

        Raises:
            UnsafeContent: it asks for a call, an object or an extension that is not in the table.
            FormatError: it is truncated or damaged, or not a pickle.
        """
        data, end = self.data, len(self.data)
        if self.stop >= end:
            self.fail("the file ends where a pickle should begin")
        try:
            while True:
                self.at = self.stop
                if self.at >= end:
                    self.fail("the pickle ends early: it does not have a STOP")
                code = data[self.at]
                self.stop += 1
                if code == 0x2E:
                    if self._below or len(self._stack) != 1:
                        self.fail("the pickle ends with an unbalanced stack")
                    return self._stack[0]
                operation = _OPERATIONS.get(code)
                if operation is None:
                    self.fail("not a pickle, or a damaged one", found=f"byte 0x{code:02x} as an opcode")
                operation(self)
        except VarstoreError:
            raise
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
            raise FormatError(
                "the pickle is damaged", path=self.path, field=f"byte {self.at}", found=shorten(str(error))
            ) from error

    def refuse(self, deed: str, *, offset: int | None = None, hint: str = _HINT) -> NoReturn:
        """Raise UnsafeContent, saying what the pickle would have done."""
        byte = self.at if offset is None else offset
        raise UnsafeContent(f"this pickle {deed}", path=self.path, field=f"byte {byte}", hint=hint)

    def instance(self, kind: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Instance | None:
        """Return an inert object for one of an unknown class, or None if there must not be one."""
        is_known = type(kind) is not Global or not (kind.entry is None or (self.is_lenient and type(kind.entry) is str))
        if is_known or not (self.is_lenient or (self._modules and arguments == () and not keywords)):
            return None
        if self.is_lenient and runs_code(kind.module, kind.name):
            return None
        self.charge(NODE)
        kind.made += 1
        return Instance(kind, self.at, arguments, keywords or None)

    def refuse_unclaimed(self) -> None:
        """Raise UnsafeContent if the pickle uses an unknown name that no code has accounted for."""
        for unknown in self.foreign:
            if not unknown.claimed and not (self.is_lenient and not runs_code(unknown.module, unknown.name)):
                self.refuse(f"would import {unknown}", offset=unknown.offset)

    def unknown(self) -> tuple[tuple[str, str, int], ...]:
        """Return the unknown names that no code has accounted for, and how many objects each stands for."""
        counts: dict[tuple[str, str], int] = {}
        for name in self.foreign:
            if not name.claimed:
                key = (name.module, name.name)
                counts[key] = counts.get(key, 0) + max(name.made, 1)
        return tuple((*key, count) for key, count in counts.items())

    def plain(self, value: Any) -> Any:
        """Return the content of a `Span` or `OldString`, and any other value unchanged."""
        try:
            if type(value) is OldString:
                return value.raw.decode(value.encoding)
            if type(value) is not Span:
                return value
            self.charge(2 * value.size)
            return value.value(self.data)
        except UnicodeError as error:
            if type(value) is not Span or value.old:
                self.fail(
                    f"a string of Python 2 is not text in {self._encoding}",
                    found=shorten(str(error)),
                    hint=_ENCODING_HINT if self._can_choose else None,
                )
            self.fail("a string in the pickle is not text", found=shorten(str(error)))

    def key(self, value: Any) -> Any:
        """Return a value as a key of a dict or member of a set, if hashing it takes constant time."""
        value = self.plain(value)
        kind = type(value)
        if kind in KEYED or isinstance(value, _HASHED_BY_IDENTITY):
            return value
        if kind is int and -_KEY_LIMIT < value < _KEY_LIMIT:
            return value
        if kind is tuple and len(value) <= 64 and not any(type(item) is tuple for item in value):
            self.charge(NODE + ITEM * len(value))
            value = tuple([self.key(item) for item in value])
        elif kind is not float and not isinstance(value, _NUMBERS):
            self.fail("not a possible key", found=show(value), expected="a string, a number or a tuple of them")
        return value

    def check_keys(self, keys: list[Any], *, is_set: bool = False) -> None:
        """Raise UnsafeContent if the keys of a new dict or set were chosen to collide."""
        if len(keys) > FEW and not are_far_apart(keys, is_set=is_set):
            self.refuse(_COLLIDE)

    def _check_more_keys(self, target: Any, keys: list[Any]) -> None:
        """Check the keys that a dict or set is about to get beside those that it has."""
        if len(target) + len(keys) <= FEW:
            return
        chosen = [key for key in keys if type(key) not in KEYED]
        if not chosen:
            return
        known = self._tables.get(id(target))
        if known is None or known[0] is not target:
            known = self._tables[id(target)] = target, KeyTable(is_set=type(target) is set)
            chosen = [*(key for key in target if type(key) not in KEYED), *chosen]
        else:
            chosen = [key for key in chosen if key not in target]
        self.charge(_PAIR * len(chosen))
        if not all(map(known[1].admits, chosen)):
            self.refuse(_COLLIDE)

    # --- stack ---

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_new(self, container: Any, nbytes: int = NODE) -> None:
        self.charge(nbytes)
        self._stack.append(container)

    def _mark(self) -> None:
        self.charge(_MARK)
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            self.fail("the pickle takes more from its stack than is on it")
        self.charge(NODE)
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _put(self, index: int) -> None:
        """Remember the top of the stack; programs number what they remember, so that the numbers need no map."""
        value = self._stack[-1]
        if index == len(self._memo):
            self._memo.append(value)
        elif 0 <= index < len(self._memo):
            self._memo[index] = value
        else:
            self._far_memo[packed(index)] = value

    def _get(self, index: int) -> None:
        if 0 <= index < len(self._memo):
            self._push(self._memo[index])
        else:
            self._push(self._far_memo[packed(index)])

    def _memoize(self) -> None:
        self._put(len(self._memo) + len(self._far_memo))

    # --- scalars and containers ---

    def _long(self, size: int) -> None:
        if size > _LONGEST_INT:
            self.fail("the integer is too long", found=f"{size} bytes")
        self._push(self.number(size, signed=True))

    def _string(self, size: int, text: str | None) -> None:
        start = self.skip(size)
        span = Span(start, size, text)
        self._push(span if size >= SPAN_FROM else span.value(self.data))

    def _old_string(self, size: int) -> None:
        start = self.skip(size)
        if size < SPAN_FROM:
            self._push_old(self.data[start : start + size])
        elif self._encoding == _AS_BYTES:
            self._push(Span(start, size))
        else:
            self._push(Span(start, size, self._encoding, old=True))

    def _push_old(self, raw: bytes) -> None:
        """Push a str of Python 2; only ASCII is text whatever it is for."""
        if self._encoding == _AS_BYTES:
            self._push(raw)
        else:
            self._push(raw.decode() if raw.isascii() else OldString(raw, self._encoding))

    def _set_items(self, items: list[Any]) -> None:
        target = self._target(dict)
        if type(target) not in (dict, OrderedDict):
            self.refuse(f"would set items of {show(target)}")
        if len(items) % 2:
            self.fail("a dict has a key without a value")
        self.charge(_PAIR * (len(items) // 2))
        keys = [self.key(key) for key in items[::2]]
        self._check_more_keys(target, keys)
        target.update(zip(keys, items[1::2], strict=True))

    def _set_item(self) -> None:
        value = self._stack.pop()
        self._set_items([self._stack.pop(), value])

    def _dict(self) -> None:
        items = self._to_mark()
        self._push_new({})
        self._set_items(items)

    def _target(self, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
        """Return what gets items: the top of the stack, or the items of an object of an unknown class."""
        target = self._stack[-1]
        return target.filled(self, kind) if type(target) is Instance else target

    def _append(self, items: list[Any]) -> None:
        target = self._target(list)
        if type(target) is not list:
            self.refuse(f"would append to {show(target)}")
        target.extend(items)

    def _add_items(self) -> None:
        items = self._to_mark()
        target = self._stack[-1]
        if type(target) is not set:
            self.refuse(f"would add to {show(target)}")
        self.charge(_PAIR * len(items))
        keys = [self.key(item) for item in items]
        self._check_more_keys(target, keys)
        target.update(keys)

    def _frozen(self) -> None:
        items = self._to_mark()
        self.charge(_SET + _PAIR * len(items))
        keys = [self.key(item) for item in items]
        self.check_keys(keys, is_set=True)
        self._push(frozenset(keys))

    # --- names and calls ---

    def _global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            self.fail("a name in the pickle is not text", found=f"{show(module)}, {show(name)}")
        found = Global(module, name, self._table.get((module, name)), self.at)
        if found.entry is None:
            self.charge(NODE)
            self.foreign.append(found)
        return found

    def _global_of_lines(self) -> Global:
        module = self.line().decode()
        return self._global(module, self.line().decode())

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._push(self._global(self._stack.pop(), name))

    def call(self, function: Any, arguments: Any) -> Any:
        """Call a constructor of the table; what is not in it is not called, and becomes an `Instance`."""
        if type(arguments) is not tuple:
            self.fail("the arguments of a call are not a tuple", found=show(arguments))
        entry = function.entry if type(function) is Global else None
        if type(entry) is Constructor and entry.call is not None:
            return entry.call(self, *arguments)
        made = self.instance(function, arguments) if self.is_lenient else None
        return made or self._refuse_call(function, arguments)

    def _refuse_call(self, function: Any, arguments: tuple[Any, ...]) -> NoReturn:
        deed = f"would call {show(function)}{show(arguments, most=4)}"
        if not _gets_what_is_nested(function, arguments):
            self.refuse(deed)
        is_old = self._version < 4
        what = "a class or a method that is within a class" if is_old else "a method of a class"
        self.refuse(f"{deed}, to get {what}", hint=_NESTED_HINT if is_old else _HINT)

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._push(self.call(self._stack.pop(), arguments))

    def _instance(self) -> None:
        function = self._global_of_lines()
        self._push(self.call(function, tuple(self._to_mark())))

    def _object(self) -> None:
        function, *arguments = self._to_mark()
        self._push(self.call(function, tuple(arguments)))

    def _new_object(self, keywords: Any = None) -> None:
        arguments = self._stack.pop()
        kind = self._stack.pop()
        if type(arguments) is not tuple:
            self.fail("the arguments of an object are not a tuple", found=show(arguments))
        entry = kind.entry if type(kind) is Global else None
        if type(entry) is Constructor and entry.new is not None and not keywords:
            self._push(entry.new(self, *arguments))
        else:
            self._push(self.created(kind, arguments, keywords))

    def created(self, kind: Any, arguments: tuple[Any, ...] = (), keywords: Any = None) -> Instance:
        """Return an inert object for one of an unknown class, or raise UnsafeContent."""
        made = self.instance(kind, arguments, keywords)
        return made or self.refuse(f"would create an object by {show(kind)}{show(arguments, most=4)}")

    def _new_object_with_keywords(self) -> None:
        self._new_object(self._stack.pop())

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Record):
            target.build(self, state)
        elif type(target) is not OrderedDict:  # its attributes, such as torch's _metadata, are not data
            self.refuse(f"would set the state of {show(target)} to {show(state)}")

    def _persist(self, identity: Any) -> None:
        if self._persistent is None:
            self.refuse(f"asks for the external object {show(identity)}")
        self._push(self._persistent(identity))

    def _extension(self, size: int) -> None:
        self.refuse(f"would call the extension registered as number {self.number(size)}")

    def _buffer(self) -> None:
        self.fail("the pickle needs buffers that are stored outside it")

    def _protocol(self) -> None:
        version = self.byte()
        self._version = version
        if version > 5:
            self.fail("the pickle protocol is unknown", found=version, expected="at most 5")

    def _frame(self) -> None:
        size = self.number(8)
        if size > len(self.data) - self.stop:
            self.fail("the pickle ends early", found=f"a frame of {size} bytes")


def _gets_what_is_nested(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Tell whether a call is the way to name a method of a class, and before protocol 4 also a class within a class."""
    is_getattr = type(function) is Global and function.name == "getattr" and function.module in _BUILTIN
    return is_getattr and len(arguments) == 2 and type(arguments[0]) is Global and type(arguments[1]) is str


def _int(m: Machine) -> None:
    text = m.number_text()
    m._push(text == b"01" if text in (b"00", b"01") else int(text))


def _quoted(m: Machine) -> None:
    line = m.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        m.fail("a string in the pickle does not have quotes")
    m._push_old(codecs.escape_decode(line[1:-1])[0])


def _checked_encoding(encoding: str) -> str:
    if encoding == _AS_BYTES:
        return encoding
    try:
        if _ASCII.decode(encoding) == _ASCII.decode():
            return encoding
    except (LookupError, UnicodeError, ValueError):
        pass
    raise UsageError(
        "not an encoding of text that extends ASCII",
        field="encoding",
        found=repr(encoding),
        expected="such as 'utf-8', 'latin-1' or 'gbk', or 'bytes'",
    )


_HASHED_BY_IDENTITY = (Record, Global)
_NUMBERS = (np.integer, np.floating, np.bool_, np.character)

_OPERATIONS: dict[int, Callable[[Machine], None]] = {
    ord("("): Machine._mark,
    ord("0"): Machine._pop,
    ord("1"): lambda m: m._to_mark().clear(),
    ord("2"): lambda m: m._push(m._stack[-1]),
    ord("F"): lambda m: m._push(float(m.number_text())),
    ord("G"): lambda m: m._push(struct.unpack(">d", m.take(8))[0]),
    ord("I"): _int,
    ord("J"): lambda m: m._push(m.number(4, signed=True)),
    ord("K"): lambda m: m._push(m.byte()),
    ord("L"): lambda m: m._push(int(m.number_text().rstrip(b"L"))),
    ord("M"): lambda m: m._push(m.number(2)),
    0x8A: lambda m: m._long(m.byte()),
    0x8B: lambda m: m._long(m.number(4)),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("S"): _quoted,
    ord("T"): lambda m: m._old_string(m.number(4)),
    ord("U"): lambda m: m._old_string(m.byte()),
    ord("V"): lambda m: m._push(m.line().decode("raw-unicode-escape")),
    ord("X"): lambda m: m._string(m.number(4), "utf-8"),
    0x8C: lambda m: m._string(m.byte(), "utf-8"),
    0x8D: lambda m: m._string(m.number(8), "utf-8"),
    ord("B"): lambda m: m._string(m.number(4), None),
    ord("C"): lambda m: m._string(m.byte(), None),
    0x8E: lambda m: m._string(m.number(8), None),
    0x96: lambda m: m._string(m.number(8), None),
    ord("]"): lambda m: m._push_new([]),
    ord("l"): lambda m: m._push_new(m._to_mark()),
    ord("a"): lambda m: m._append([m._stack.pop()]),
    ord("e"): lambda m: m._append(m._to_mark()),
    ord("}"): lambda m: m._push_new({}),
    ord("d"): Machine._dict,
    ord("s"): Machine._set_item,
    ord("u"): lambda m: m._set_items(m._to_mark()),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push_new(tuple(m._to_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    0x8F: lambda m: m._push_new(set(), _SET),
    0x90: Machine._add_items,
    0x91: Machine._frozen,
    ord("g"): lambda m: m._get(int(m.number_text())),
    ord("h"): lambda m: m._get(m.byte()),
    ord("j"): lambda m: m._get(m.number(4)),
    ord("p"): lambda m: m._put(int(m.number_text())),
    ord("q"): lambda m: m._put(m.byte()),
    ord("r"): lambda m: m._put(m.number(4)),
    0x94: Machine._memoize,
    ord("c"): lambda m: m._push(m._global_of_lines()),
    0x93: Machine._stack_global,
    ord("R"): Machine._reduce,
    ord("i"): Machine._instance,
    ord("o"): Machine._object,
    0x81: Machine._new_object,
    0x92: Machine._new_object_with_keywords,
    ord("b"): Machine._build,
    ord("P"): lambda m: m._persist(m.line().decode()),
    ord("Q"): lambda m: m._persist(m._stack.pop()),
    0x82: lambda m: m._extension(1),
    0x83: lambda m: m._extension(2),
    0x84: lambda m: m._extension(4),
    0x80: Machine._protocol,
    0x95: Machine._frame,
    0x97: Machine._buffer,
    0x98: Machine._buffer,
}
