"""The face as a table of facts, one line per fact: names, signatures, members, errors, commands, exit codes.

``tests/data/face.json`` is the table as it was agreed; `test_face.py` compares the present one with it. A change that
is meant is recorded by ``python tests/support/face.py --write`` and seen by whoever reads the commit.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from click.testing import CliRunner

import varstore as vs
from varstore import adapters, errors
from varstore.cli import main
from varstore.values.methods import NumpyMethods

__all__ = ["BEYOND_STAR", "RECORDED", "differences", "facts", "facts_of"]

RECORDED = Path(__file__).resolve().parents[1] / "data" / "face.json"
"""What was agreed."""
WRITE = "python tests/support/face.py --write"

BEYOND_STAR = ("bool", "float", "open")
"""Public names that ``import *`` leaves out, because they are Python's own."""

NOT_CALLED = {
    "AttachedFile",
    "Checkpoint",
    "Converted",
    "DiffReport",
    "ForeignCheckpoint",
    "History",
    "LazyArray",
    "LinksReport",
    "LoadReport",
    "Movement",
    "PendingSave",
    "Retention",
    "SalvageReport",
    "Saved",
    "SessionVariable",
    "Statistics",
    "StatsReport",
    "Variable",
    "VerifyReport",
}
"""Classes whose instances the library makes and nobody else: how they are made is not of the face."""

PROTOCOL = {
    *("__array__", "__bool__", "__call__", "__contains__", "__enter__", "__exit__", "__getitem__"),
    *("__iter__", "__len__", "__or__", "__str__", "_repr_html_"),
}
"""Methods that Python and notebooks call by these names."""

NUMPYS = {name for name, value in vars(NumpyMethods).items() if "numpy.ndarray." in (value.__doc__ or "")}
"""Methods that read the values and are numpy's own."""

Facts = dict[str, str]


def facts(folder: Path) -> Facts:
    """Return the present face; what must be made to be looked at is made in an empty folder."""
    table: Facts = {}
    for name in (*vs.__all__, *BEYOND_STAR):
        table |= facts_of(name, getattr(vs, name))
    for value in _instances(folder / "instances"):
        table |= facts_of(type(value).__name__, type(value)) | _attributes(type(value).__name__, value)
    for kind in (getattr(errors, name) for name in errors.__all__):
        table |= facts_of(f"errors.{kind.__name__}", kind)
    table |= _attributes("errors.VarstoreError", errors.VarstoreError())
    for module in pkgutil.iter_modules(adapters.__path__):
        for name, value in _skeleton(f"varstore.adapters.{module.name}").items():
            table |= facts_of(f"adapters.{module.name}.{name}", value)
    table |= _commands() | _exit_statuses(folder / "cli")
    return dict(sorted(table.items()))


def differences(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Return a line for each fact that is gone, changed or new, those that may break programs first."""
    gone = [f"gone: {fact}, which was {recorded[fact]!r}" for fact in recorded if fact not in present]
    changed = [
        f"changed: {fact}, from {recorded[fact]!r} to {present[fact]!r}"
        for fact in recorded
        if fact in present and recorded[fact] != present[fact]
    ]
    new = [f"new: {fact}, which is {present[fact]!r}" for fact in present if fact not in recorded]
    return gone + changed + new


# --- names, signatures, members ----------------------------------------------------------------------------------


def facts_of(name: str, value: Any) -> Facts:
    """Return what the face says of one thing under this name."""
    if isinstance(value, types.ModuleType):
        return {name: "module"}
    if value is vs.VarstoreError and "." not in name:
        return {name: "errors.VarstoreError"}
    if inspect.isclass(value):
        return _class(name, value)
    if inspect.isroutine(value):
        return {name: "function"} | _signature(name, value)
    if isinstance(value, np.dtype | str):
        return {name: f"dtype {value.name}" if isinstance(value, np.dtype) else type(value).__name__}
    return {name: "namespace"} | _members(name, type(value))


def _class(name: str, kind: type) -> Facts:
    table = {name: " < ".join(["class", *(base.__name__ for base in kind.__mro__[1:-1] if _is_named(base))])}
    if kind.__name__ not in NOT_CALLED and not _is_above(_owner(kind, "__init__"), kind):
        table |= _signature(name, kind)
    return table | _members(name, kind)


def _is_named(kind: type) -> bool:
    """Tell whether a program can name a class: Python's own are named, and those of the face."""
    return kind.__module__.partition(".")[0] != "varstore" or kind in _named


def _is_above(owner: type, kind: type) -> bool:
    """Tell whether what `owner` defines is told of another class of the face already."""
    return owner is not kind and owner in _named


def _owner(kind: type, member: str) -> type:
    return next((base for base in kind.__mro__ if member in vars(base)), object)


def _members(name: str, kind: type) -> Facts:
    table: Facts = {}
    for member in sorted(dir(kind)):
        owner = _owner(kind, member)
        if owner.__module__ == "builtins" or _is_above(owner, kind):
            continue
        if member.startswith("_") and member not in PROTOCOL:
            continue
        value = inspect.getattr_static(kind, member)
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        path = f"{name}.{member}"
        if member in PROTOCOL:
            table[path] = "method"
        elif owner is NumpyMethods and member in NUMPYS:
            table[path] = "as numpy's"
        elif inspect.isroutine(value):
            table |= {path: "method"} | _signature(path, value)
        elif not inspect.isclass(value):
            table[path] = "attribute"
    return table


def _attributes(name: str, value: Any) -> Facts:
    """Return the attributes that only an instance has."""
    return {f"{name}.{member}": "attribute" for member in getattr(value, "__dict__", {}) if member[0] != "_"}


def _signature(name: str, value: Callable[..., Any]) -> Facts:
    signature = inspect.signature(value)
    table = {f"{name}()": f"-> {_annotation(signature.return_annotation)}"}
    for index, parameter in enumerate((p for p in signature.parameters.values() if p.name != "self"), 1):
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        place = {
            parameter.POSITIONAL_ONLY: f"positional only {index}",
            parameter.POSITIONAL_OR_KEYWORD: f"positional {index}",
            parameter.KEYWORD_ONLY: "keyword",
        }.get(parameter.kind, "all others")
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        table[f"{name}({stars}{parameter.name})"] = f"{place}: {_annotation(parameter.annotation)}{default}"
    return table


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Signature.empty:
        return "unknown"
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _instances(folder: Path) -> Iterator[Any]:
    """Yield what calls return and ``varstore.__all__`` does not name, and what has attributes beyond its class's."""
    values = {"a": np.zeros(2, np.float32)}
    session = vs.Session()
    with session:
        yield session
        yield vs.get_variable("a", (2,))
    yield vs.CheckpointConfig()
    manager = vs.CheckpointManager(folder / "run")
    yield manager.save(1, values)
    yield manager.latest()
    yield manager.prune()
    yield vs.convert(folder / "run" / "step-1", folder / "a.npz")
    opened = vs.read(folder / "a.npz")
    yield opened
    yield opened.lazy("a")


_named = {
    value for module in (vs, errors) for name in module.__all__ if inspect.isclass(value := getattr(module, name))
}


# --- adapters ----------------------------------------------------------------------------------------------------


def _skeleton(module: str) -> dict[str, Any]:
    """Return the public functions and classes of a module without their bodies: no framework has to be there."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return _skeleton_of(module, Path(spec.origin))


def _skeleton_of(module: str, path: Path) -> dict[str, Any]:
    tree = ast.parse(path.read_text())
    kept = [_bare(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    kept += [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    future = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = {"__name__": module}
    exec(compile(ast.Module([*future, *kept], []), str(path), "exec"), names)
    for node in tree.body:  # what a package takes from its own files
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module}."):
            names = _skeleton_of(str(node.module), path.with_name(f"{str(node.module).rpartition('.')[2]}.py")) | names
    return {name: names[name] for name in names["__all__"] if name in names}  # the files of a package have constants


def _bare(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.ClassDef):
        node.bases, node.keywords, node.decorator_list = [], [], []
        node.body = [_bare(item) for item in node.body if isinstance(item, ast.FunctionDef)] or [ast.Pass()]
    elif isinstance(node, ast.FunctionDef):
        kept = {"property", "classmethod", "staticmethod"}
        node.decorator_list = [item for item in node.decorator_list if ast.unparse(item) in kept]
        node.body = [ast.Pass()]
    return ast.fix_missing_locations(node)


# --- the command line --------------------------------------------------------------------------------------------


def _commands() -> Facts:
    context = click.Context(main)
    table = {f"varstore {option}": kind for option, kind in map(_parameter, main.params)}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        table[f"varstore {name}"] = "command"
        table |= {f"varstore {name} {parameter}": kind for parameter, kind in map(_parameter, command.params)}
    return table


def _parameter(parameter: click.Parameter) -> tuple[str, str]:
    repeated = ", repeated" if parameter.multiple or parameter.nargs == -1 else ""
    if isinstance(parameter, click.Option):
        return ", ".join(parameter.opts), ("flag" if parameter.is_flag else "option") + repeated
    return (parameter.name or "").upper(), ("argument" if parameter.required else "optional argument") + repeated


def _exit_statuses(folder: Path) -> Facts:
    statuses = {f"exit status: {words}": str(_run(*arguments)) for words, arguments in _occasions(folder)}
    kinds = [*(getattr(errors, name) for name in errors.__all__), OSError, KeyboardInterrupt]
    for kind in kinds:
        with mock.patch.object(vs, "seal", side_effect=kind("as a test wants it")):
            statuses[f"exit status: {kind.__name__}"] = str(_run("seal", "whole"))
    statuses["exit status: a closed pipe"] = str(_run_into_a_closed_pipe("ls", folder / "whole"))
    return statuses


def _occasions(folder: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield occasions and the command lines that meet them."""
    values = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2, np.int64)}
    whole = vs.save(folder / "whole", values).path
    same = vs.save(folder / "same", values).path
    other = vs.save(folder / "other", {**values, "b": np.ones(2, np.int64)}).path
    unfinished, damaged, torn = (vs.save(folder / name, values).path for name in ("unfinished", "damaged", "torn"))
    os.unlink(f"{unfinished}/snapshot_done")
    os.unlink(f"{unfinished}/b/out")
    _overwrite(f"{damaged}/a/out", bytes(16))
    _overwrite(f"{torn}/manifest", b"varstore")
    absent = folder / "absent"
    yield "ls of a checkpoint", ("ls", whole)
    yield "ls of nothing", ("ls", absent)
    yield "ls of what is unfinished", ("ls", unfinished)
    yield "ls --allow-incomplete of what is unfinished", ("ls", "--allow-incomplete", unfinished)
    yield "ls of a torn manifest", ("ls", torn)
    yield "ls with a pattern that matches nothing", ("ls", whole, "c*")
    yield "show of a variable", ("show", whole, "a")
    yield "show of a variable that is not there", ("show", whole, "c")
    yield "show of a checkpoint without a name", ("show", whole)
    yield "verify of what is whole", ("verify", whole)
    yield "verify of what is damaged", ("verify", damaged)
    yield "verify of nothing", ("verify", absent)
    yield "verify of what is damaged and of nothing", ("verify", damaged, absent)
    yield "diff of equals", ("diff", whole, same)
    yield "diff of others", ("diff", whole, other)
    yield "diff with nothing", ("diff", whole, absent)
    yield "seal of what is damaged", ("seal", damaged)
    yield "clean of nothing", ("clean", absent)
    yield "clean of a folder", ("clean", folder)
    yield "check of no storage", ("check_storage", absent)
    yield "links of nothing", ("links", absent)
    yield "links of a checkpoint", ("links", whole)
    yield "convert", ("convert", whole, folder / "new.npz")
    yield "convert to a taken folder", ("convert", folder / "new.npz", whole)
    yield "convert to a suffix that is not known", ("convert", whole, folder / "new.unknown")
    yield "convert to a type that does not float", ("convert", whole, folder / "int.npz", "--dtype", "int8")
    yield "no such command", ("list", whole)
    yield "no such option", ("ls", "--colour", whole)
    yield "an argument too few", ("diff", whole)
    yield "--version", ("--version",)
    yield "--help", ("ls", "--help")


def _overwrite(path: str, data: bytes) -> None:
    os.chmod(path, 0o644)
    Path(path).write_bytes(data)


def _run(*arguments: Any) -> int:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="varstore").exit_code


def _run_into_a_closed_pipe(*arguments: Any) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "varstore", *map(str, arguments)]
    try:
        return subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL, timeout=120).returncode
    finally:
        os.close(writer)


def _main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        sys.stderr.write(f"usage: {WRITE}\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        present = facts(Path(folder))
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    changes = differences(recorded, present)
    sys.stdout.write("".join(f"{line}\n" for line in changes))
    if arguments:
        RECORDED.write_text(json.dumps(present, indent=0, ensure_ascii=False) + "\n")
        return 0
    return 1 if changes else 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
