"""Copies of a program of Paddle with other values: the files of raw variables are rewritten, the programs copied.

What is not replaced is copied byte for byte, descriptions of variables too. A layer that was saved with several methods
has a program and a file of variables for each, ``PREFIX.METHOD.json`` and so on, which share variables by their names.

The files of a copy appear together, ``PREFIX.pdiparams`` last. Their names are fixed, so no step could replace several
of them: of a copy that is there, only that file is replaced, and the others must be what they would become.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from varstore.errors import CheckpointExists, CheckpointNotFound, FormatError, UsageError, VariableMismatch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.paddle.program import PROGRAMS, Stream, companion, files_of, parameter_names, streams_of
from varstore.formats.state.flat import check_fits, fetch_plain, flat_arrays
from varstore.storage.appearing import replacing_whole
from varstore.storage.containment import inside
from varstore.storage.failures import translated
from varstore.values.lazy import LazyArray

__all__ = ["PARAMETERS", "FileContent", "write_copy", "write_together"]

PARAMETERS = ".pdiparams"
_BESIDE = (".info",)
_PIECE = 1 << 24


def write_copy(path: str, state: Any, model: str, names: Mapping[str, str], structured: Mapping[str, str]) -> None:
    """Write ``path`` and the files beside it as copies of those of `model`, with other values.

    Args:
        path: the new file, which ends in ``.pdiparams``; an existing one is replaced.
        state: names and arrays, with the shapes and types of those in the model: as `read` names them, or as Paddle
            does, or by names of which `names` knows what Paddle calls them.
        model: the original: its prefix, program or file of variables.
        names: Paddle's names, by names in the state.
        structured: Paddle's names, by those that `read` gives.

    Raises:
        UsageError: the model has no program, or the path is that of the model.
        VariableNotFound, VariableMismatch: the model does not have a variable, or not of this shape or type; or two
            names stand for one.
        CheckpointExists: a file beside `path` exists, and is not what it would become.
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
    beside: dict[str, FileContent] = {}
    for infix, source, variables in parts:
        beside[f"{new}{infix}{PARAMETERS}"] = partial(_variables_of, source, variables, arrays)
        for suffix in PROGRAMS:
            if (program := companion(source, suffix, instead=PARAMETERS)) is not None:
                beside[f"{new}{infix}{suffix}"] = partial(_range, program, 0, program.size)
        for suffix in _BESIDE:
            if (about := companion(source, suffix)) is not None:
                beside[f"{new}{infix}{PARAMETERS}{suffix}"] = partial(_range, about, 0, about.size)
    write_together(path, beside)


FileContent = Callable[[], Iterable[bytes | memoryview]]
"""Gives the bytes of a file piece by piece."""


def write_together(path: str, files: Mapping[str, FileContent]) -> None:
    """Write files by their paths, of which the one at `path` appears last, and is the only one that replaces another.

    Raises:
        CheckpointExists: another file exists, and is not what it would become.
        StorageError: the operating system refused.
    """
    with replacing_whole(path) as (file, whole):  # what a killed writer left is gone now
        missing = {place: of for place, of in files.items() if place != path and not _is_there(place, of)}
        for place, of in missing.items():
            with whole.part(place) as part:
                part.writelines(of())
        file.writelines(files[path]())


def _methods(prefix: str, main: Source) -> Iterator[tuple[str, Source]]:
    """Yield the files of variables of the other methods, each with what stands between the prefix and the suffix."""
    folder, stem = os.path.split(prefix)
    with translated(folder or ".", "reading failed"):
        names = {*os.listdir(folder or ".")}
    for name in sorted(names):
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


def _is_there(path: str, content: FileContent) -> bool:
    """Tell whether there is a file with this content.

    Raises:
        CheckpointExists: there is something else.
    """
    if not os.path.lexists(path):
        return False
    if not os.path.islink(path):
        with contextlib.suppress(FormatError, CheckpointNotFound):  # what is not a regular file, or changes meanwhile
            there, at = Source(path), 0
            for piece in content():
                if at + len(piece) > there.size or there.bytes(at, len(piece)) != piece:
                    break
                at += len(piece)
            else:
                if at == there.size:
                    return True
    raise CheckpointExists(
        "a file of another program, or of other values, is in the place of one that belongs to the copy",
        path=path,
        hint="remove the files of the program that is there, or choose another path",
    )


def _variables_of(
    source: Source, variables: Mapping[str, Stream], arrays: Mapping[str, LazyArray]
) -> Iterator[memoryview]:
    for name, stream in variables.items():
        yield from _range(source, stream.start, stream.values)
        if name in arrays:
            yield fetch_plain(name, arrays[name]).reshape(-1).view("u1").data
        else:
            yield from _range(source, stream.values, stream.end)


def _range(source: Source, start: int, end: int) -> Iterator[memoryview]:
    for at in range(start, end, _PIECE):
        yield source.read(at, min(_PIECE, end - at)).data
