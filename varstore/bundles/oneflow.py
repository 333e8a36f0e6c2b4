"""Programs of OneFlow in a bundle: ``model.mlir``, opaque, beside the folders of the variables that it names."""

from __future__ import annotations

import os

from varstore.bundles.known import Known, Prepared, mismatch
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import FormatError, InvalidName, VariableNotFound
from varstore.formats.binary.source import Source
from varstore.formats.oneflow import write_tensor
from varstore.formats.state.flat import flat_arrays
from varstore.layout.graphs import Binding, bindings_of
from varstore.layout.mlir import MOST, PROGRAM, ports_of, variables_of
from varstore.layout.names import MARKER, folder_of
from varstore.storage.appearing import new_folder
from varstore.text.hints import listed

__all__ = ["FORMAT", "SUFFIX", "export", "prepare"]

FORMAT = "oneflow"
SUFFIX = ".mlir"
_SHOWN = 5


def prepare(entry: str, source: Source, known: Known) -> Prepared:
    """Return a program to save, bound to the variables that it names.

    Raises:
        VariableNotFound: it names a variable that is not there.
        VariableMismatch: it expects another shape or type.
        FormatError: it is not a program of OneFlow, or has more than 256 MiB.
    """
    if source.size > MOST:
        raise FormatError("the program is too large", path=source.path, found=f"{source.size} bytes")
    program = source.bytes(0, source.size)
    metas = variables_of(program, path=source.path)
    if missing := [name for name in metas if name not in known]:
        raise VariableNotFound(
            "the program names variables that are not there",
            path=source.path,
            field=f"graphs[{entry!r}]",
            found=listed(list(map(repr, missing)), _SHOWN),
            hint="pass rename= with the names that the program has for them",
        )
    bindings: dict[str, Binding] = {}
    differing: dict[str, str] = {}
    for name, meta in metas.items():
        binding = known.binding(name, is_copied=False)
        dtype = meta.data_type.dtype
        if binding.shape != meta.shape or dtype is None or binding.type != dtype.name:
            kind = meta.data_type.name if dtype is None else dtype.name
            found = f"{binding.type} {list(binding.shape)} in the variables"
            differing[name] = f"{kind} {list(meta.shape)} in the graph, {found}"
        bindings[name] = binding
    if differing:
        raise mismatch(source.path, entry, differing, "save the graph again, or the variables that it was made of")
    about = {"format": FORMAT, **ports_of(program)}
    return Prepared(os.path.basename(source.path), source.path, about, bindings, {}, {})


def export(checkpoint: Checkpoint, file: AttachedFile, target: str) -> list[str]:
    """Write a folder for OneFlow: the program, a folder for each variable that it names, and the marker.

    Raises:
        CheckpointExists: there is something at the path.
        InvalidName: OneFlow would not find a variable.
        DigestMismatch: a value or the program is not what was saved.
    """
    bindings = bindings_of(file.entry)
    for name in bindings:
        if "/" in name or folder_of(name) != name:
            raise InvalidName("OneFlow would not find the folder of this variable", path=file.name, variable=name)
    with new_folder(target) as folder:
        for name, one in bindings.items():
            (array,) = flat_arrays({name: checkpoint[one.variable]}, format=FORMAT).values()
            write_tensor(os.path.join(folder, name), array)
        with open(os.path.join(folder, PROGRAM), "xb") as program:
            program.write(file.read())
        with open(os.path.join(folder, MARKER), "xb"):
            pass
    return [target]
