"""Programs of Paddle in a bundle: opaque bytes, with the names of the parameters that they take from variables.

A program does not have values: they lie in a ``.pdiparams`` file beside it, in the order of their names. Exporting
writes that file from the variables. A layer that was saved with several methods has a program for each,
``PREFIX.METHOD.json``, and each program gets a file of values of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from varstore.bundles.known import Known, Prepared, mismatch
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import VariableNotFound
from varstore.formats.binary.source import Source
from varstore.formats.paddle.program import PROGRAMS, companion, names_in, ports_in, stream_head
from varstore.formats.paddle.rewrite import PARAMETERS, FileContent, write_together
from varstore.formats.paddle.states import read
from varstore.formats.state.flat import fetch_plain, flat_arrays
from varstore.layout.graphs import Binding, bindings_of
from varstore.text.hints import listed
from varstore.values.lazy import LazyArray

__all__ = ["FORMAT", "PROGRAMS", "export", "prepare"]

FORMAT = "paddle"
_INFO = ".info"
_SHOWN = 5


def prepare(entry: str, source: Source, known: Known) -> Prepared:
    """Return a program to save, bound to variables by Paddle's names of them.

    A parameter that is not among the variables is taken from the ``.pdiparams`` file beside the program.

    Raises:
        VariableNotFound: a parameter is nowhere.
        VariableMismatch: a variable does not have the shape and type of the parameter in that file.
        FormatError: it is not a program, or has more than 256 MiB.
    """
    stem, suffix = os.path.splitext(os.path.basename(source.path))
    names = names_in(source)
    parameters = companion(source, PARAMETERS, instead=suffix)
    beside: Mapping[str, LazyArray] = {}
    structured: dict[str, str] = {}
    if parameters is not None:
        opened = read(parameters.path)
        structured = {own: name for name, own in opened.attributes.get("parameter_names", {}).items()}
        beside = {own: opened[name] for own, name in structured.items()}
    known = known.also({**structured, **_parameter_names(known.variables)})
    bindings: dict[str, Binding] = {}
    added: dict[str, Any] = {}
    differing: dict[str, str] = {}
    missing = [name for name in names if name not in known and name not in beside]
    if missing:
        raise VariableNotFound(
            "the program has parameters that are not among the variables",
            path=source.path,
            field=f"graphs[{entry!r}]",
            found=listed(list(map(repr, missing)), _SHOWN),
            hint=f"pass rename= with Paddle's names, or bring {stem}{PARAMETERS} along",
        )
    for name in names:
        if name not in known or (name in known.own and name in beside and known.difference(name, beside[name])):
            own = f"{entry}/{name}" if name in known else name
            added[own] = beside[name]
            bindings[name] = Binding(own, beside[name].dtype.name, beside[name].shape, own=True)
            continue
        if name in beside and (what := known.form_difference(name, beside[name])):
            differing[name] = what
        bindings[name] = known.binding(name, is_copied=False)
    if differing:
        raise mismatch(
            source.path, entry, differing, "export the layer again, or save the variables that it was made of"
        )
    files = {f"{stem}{PARAMETERS}{_INFO}": info.path} if (info := _info(parameters)) is not None else {}
    inputs, outputs = ports_in(source)
    about = {"format": FORMAT, "inputs": inputs, "outputs": outputs, "beside": list(files)}
    return Prepared(f"{stem}{suffix}", source.path, about, bindings, added, {}, files)


def _info(parameters: Source | None) -> Source | None:
    """Return the file in which Paddle 2 keeps structured names."""
    return None if parameters is None else companion(parameters, _INFO)


def _parameter_names(variables: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of variables by those that Paddle has for them, where a file or a live tensor says them."""
    said = getattr(variables, "attributes", {})
    names = said.get("parameter_names") if isinstance(said, Mapping) else None
    found = {own: name for name, own in names.items()} if isinstance(names, Mapping) else {}
    for name, value in variables.items():
        own = getattr(value, "name", None)
        if type(value).__module__.partition(".")[0] == FORMAT and isinstance(own, str):
            found.setdefault(own, name)
    return found


def export(checkpoint: Checkpoint, file: AttachedFile, target: str) -> list[str]:
    """Write a program, its parameters, and those of its other methods, as `paddle.jit.save` does.

    Raises:
        CheckpointExists: a file beside ``TARGET.pdiparams`` exists and is another one.
        DigestMismatch: a value or a program is not what was saved.
        StorageError: it cannot be written.
    """
    prefix = os.path.splitext(target)[0] if target.endswith((*PROGRAMS, PARAMETERS)) else target
    stem, suffix = os.path.splitext(file.name)
    others = {
        infix: other
        for other in checkpoint.files.values()
        if other.attributes.get("format") == FORMAT
        and (infix := other.name.removeprefix(stem).removesuffix(suffix)).startswith(".")
        and other.name == f"{stem}{infix}{suffix}"
    }
    files: dict[str, FileContent] = {}
    for infix, program in {"": file, **others}.items():
        place = f"{prefix}{infix}{PARAMETERS}"
        files[f"{prefix}{infix}{suffix}"] = partial(_whole, program)
        files |= {f"{place}{_INFO}": partial(_whole, checkpoint.files[name]) for name in program.attributes["beside"]}
        files[place] = partial(_parameters, checkpoint, program)
    write_together(f"{prefix}{PARAMETERS}", files)
    return list(files)


def _whole(file: AttachedFile) -> list[bytes]:
    return [file.read()]


def _parameters(checkpoint: Checkpoint, file: AttachedFile) -> Iterator[bytes | memoryview]:
    for _, one in sorted(bindings_of(file.entry).items()):
        (array,) = flat_arrays({one.variable: checkpoint[one.variable]}, format=FORMAT).values()
        yield stream_head(array)
        yield fetch_plain(one.variable, array).reshape(-1).view("u1").data
