"""Keep model variables on disk, one folder per variable: atomic, checked, linked, readable by hand."""

from __future__ import annotations

import ast as _ast
import sys as _sys
from importlib import import_module as _import_module
from typing import Any as _Any

import varstore.model.store as _at_once  # what every program uses; the rest comes at its first use
from varstore import errors as errors


def _face() -> tuple[list[str], dict[str, tuple[str, str]]]:
    """Return ``__all__``, and the module and name of each public thing, from the stub that type checkers read."""
    stub: bytes = __spec__.loader.get_data(__file__ + "i")  # type: ignore[union-attr]
    listed: list[str] = []
    sources: dict[str, tuple[str, str]] = {}
    for node in _ast.parse(stub).body:
        if isinstance(node, _ast.ImportFrom):
            sources |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, _ast.Assign) and isinstance(node.value, _ast.Name):
            sources[_ast.unparse(node.targets[0])] = sources.pop(node.value.id)
        elif isinstance(node, _ast.Assign):
            listed = _ast.literal_eval(node.value)
    return listed, sources


__all__, _SOURCES = _face()
for _name, (_module, _inner) in _SOURCES.items():
    if _module == _at_once.__name__:
        globals()[_name] = getattr(_at_once, _inner)  # so that it can be used while the interpreter ends

_OF_TRAINING = ("data", "global_function", "layers", "nn", "optimizer", "scope", "train")  # of OneFlow's scripts


def __getattr__(name: str) -> _Any:
    if name not in _SOURCES:
        why = ": it keeps variables and does not train" if name in _OF_TRAINING else ""
        raise AttributeError(f"module 'varstore' has no attribute {name!r}{why}")
    module, inner = _SOURCES[name]
    try:
        value = globals()[name] = getattr(_import_module(module), inner)
    except ImportError:
        if _sys.is_finalizing():
            raise errors.UsageError("the interpreter is ending, and loads no more modules", field=name) from None
        raise
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
