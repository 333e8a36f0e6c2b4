"""Copies of a program of Paddle with other values: the files of raw variables are rewritten, the programs copied.

What is not replaced is copied byte for byte, descriptions of variables too. A layer that was saved with several methods
has a program and a file of variables for each, ``PREFIX.METHOD.json`` and so on, which share variables by their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from varstore.errors import FormatError, UsageError, VariableMismatch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.paddle.program import PROGRAMS, Stream, companion, files_of, parameter_names, streams_of
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.storage.appearing import replacing
from varstore.storage.containment import inside
from varstore.storage.failures import translated
from varstore.values.lazy import LazyArray

__all__ = ["PARAMETERS", "write_copy"]

PARAMETERS = ".pdiparams"
_BESIDE = (".info",)
_PIECE = 1 << 24


def write_copy(path: str, state: Any, model: str, names: Mapping[str, str], structured: Mapping[str, str]) -> None:
    """Write ``path`` and the files beside it as copies of those of `model`, with other values.

    Args:
        path: the new file, which ends in ``.pdiparams``; existing files are replaced.
        state: names and arrays, with the shapes and types of those in the model: as `read` names them, or as Paddle
            does, or by names of which `names` knows what Paddle calls them.
        model: the original: its prefix, program or file of variables.
        names: Paddle's names, by names in the state.
        structured: Paddle's names, by those that `read` gives.

    Raises:
        UsageError: the model has no program, or the path is that of the model.
        VariableNotFound, VariableMismatch: the model does not have a variable, or not of this shape or type; or two
            names stand for one.
        FormatError: a file of the model is damaged.
    """
    arrays: dict[str, LazyArray] = {}
    given: dict[str, str] = {}
    for name, array in flat_arrays(state, format="paddle").items():
        variable = names.get(name, structured.get(name, name))
        if variable in given:
            raise VariableMismatch(
                "two names stand for one variable of the model",
                path=path,
                variable=variable,
                found=f"{given[variable]!r} and {name!r}",
                hint="give it one value, under one of the names",
            )
        given[variable], arrays[variable] = name, array
    main = Source(files_of(model)[0])
    if not main.path.endswith(PARAMETERS):
        raise UsageError("this is not a file of a program's variables", path=main.path, expected=f"*{PARAMETERS}")
    old, new = main.path.removesuffix(PARAMETERS), path.removesuffix(PARAMETERS)
    if os.path.realpath(old) == os.path.realpath(new):
        raise UsageError("the copy and the model are the same", path=path, hint="write it to another path")
    parts = [(infix, source, _variables(source)) for infix, source in ((("", main), *_methods(old, main)))]
    known = {name: stream.array for _, _, variables in parts for name, stream in variables.items()}
    for name, array in arrays.items():
        check_fits(main.path, name, array, known)
    for infix, source, variables in parts:
        with replacing(f"{new}{infix}{PARAMETERS}") as file:
            _write_variables(file, source, variables, arrays)
        for suffix in PROGRAMS:
            if (program := companion(source, suffix, instead=PARAMETERS)) is not None:
                _copy(program, f"{new}{infix}{suffix}")
        for suffix in _BESIDE:
            if (beside := companion(source, suffix)) is not None:
                _copy(beside, f"{new}{infix}{PARAMETERS}{suffix}")


def _methods(prefix: str, main: Source) -> Iterator[tuple[str, Source]]:
    """Yield the files of variables of the other methods, each with what stands between the prefix and the suffix."""
    folder, stem = os.path.split(prefix)
    with translated(folder or ".", "reading failed"):
        names = sorted(os.listdir(folder or "."))
    for name in names:
        method = name.removeprefix(f"{stem}.").removesuffix(PARAMETERS)
        is_of_method = name == f"{stem}.{method}{PARAMETERS}" and method and "." not in method
        if is_of_method and any(f"{stem}.{method}{suffix}" in names for suffix in PROGRAMS):
            place = inside(folder or ".", name, stated_by=main.path)
            yield f".{method}", Source(place, shown=os.path.join(folder, name))


def _variables(source: Source) -> dict[str, Stream]:
    names = parameter_names(source)
    streams = streams_of(source, Budget(source.path, source.size))
    if names is None or len(names) != len(streams):
        raise FormatError(
            "the program that names these variables is not beside them"
            if names is None
            else "the number of variables is not that in the program beside the file",
            path=source.path,
            found=None if names is None else len(streams),
            expected=" or ".join(PROGRAMS) if names is None else len(names),
        )
    return dict(zip(names, streams, strict=True))


def _write_variables(
    file: BinaryIO, source: Source, variables: Mapping[str, Stream], arrays: Mapping[str, LazyArray]
) -> None:
    for name, stream in variables.items():
        _copy_range(file, source, stream.start, stream.values)
        if name in arrays:
            file.write(fetch_plain(name, arrays[name]).reshape(-1).view("u1").data)
        else:
            _copy_range(file, source, stream.values, stream.end)


def _copy(source: Source, path: str) -> None:
    with replacing(path) as file:
        _copy_range(file, source, 0, source.size)


def _copy_range(file: BinaryIO, source: Source, start: int, end: int) -> None:
    for at in range(start, end, _PIECE):
        file.write(source.read(at, min(_PIECE, end - at)).data)
