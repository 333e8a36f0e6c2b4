"""TorchScript's modules: the tensors among their attributes, by the names that a state dict gives them.

An archive of `torch.jit.save` holds the pickle of a module, whose classes are code in the same archive. The code is
never read, and the classes stay inert.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/serialization/export_module.cpp
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from varstore.errors import FormatError
from varstore.formats.pickles.machine import Instance, Machine
from varstore.formats.pickles.names import show
from varstore.formats.pickles.tree import DEEPEST, claim
from varstore.values.lazy import LazyArray
from varstore.values.nodes import Names

__all__ = ["constants", "script_state"]

_NAME = 200


def script_state(module: Any, machine: Machine) -> OrderedDict[str, LazyArray]:
    """Return the tensors of a module in a TorchScript archive: parameters, buffers and attributes.

    Raises:
        FormatError: it is not a module, or is nested deeper than 100.
        UnsafeContent: its tensors are out of proportion to the file.
    """
    if type(module) is not Instance:
        raise FormatError("not a TorchScript program", path=machine.path, found=show(module), expected="a module")
    claim(module, set())
    names = Names()
    return OrderedDict((names.own(name), tensor) for name, tensor in _tensors(module, "", machine, 0))


def constants(values: Any) -> OrderedDict[str, LazyArray]:
    """Return the tensors among the constants of the code, by the names that the code has for them.

    A module that was frozen has its parameters there, except those of the attributes that were to be preserved.
    """
    claim(values, set())
    items = enumerate(values) if isinstance(values, tuple) else ()
    return OrderedDict((f"c{index}", value) for index, value in items if isinstance(value, LazyArray))


def _tensors(value: Any, name: str, machine: Machine, depth: int) -> Iterator[tuple[str, LazyArray]]:
    """Yield the tensors in a value; `name` ends with a dot unless it is the name of a tensor."""
    machine.charge(_NAME + 4 * len(name))
    if depth > DEEPEST:
        machine.fail(f"modules are nested deeper than {DEEPEST}")
    if type(value) is Instance:
        value = value.state
    if isinstance(value, LazyArray):
        yield name.removesuffix("."), value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (LazyArray, Instance, dict, list, tuple)) and isinstance(key, (str, int)):
                yield from _tensors(item, f"{name}{key}.", machine, depth + 1)
