"""Exported programs of PyTorch in a bundle: archives without the bytes of the weights that are variables."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from varstore.bundles.known import Known, OnDifference, Prepared
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint
from varstore.formats.binary.source import Held, Source
from varstore.formats.state.flat import flat_arrays
from varstore.formats.torch.bound import is_apart, open_program, without, write_whole
from varstore.formats.torch.rewrite import PROGRAM
from varstore.layout.graphs import bindings_of

__all__ = ["FORMAT", "PROGRAM", "export", "is_program", "prepare", "serialized"]

FORMAT = "torch"


def is_program(model: Any) -> bool:
    """Tell whether this is what `torch.export.export` returns."""
    kind = type(model)
    return kind.__name__ == "ExportedProgram" and kind.__module__.partition(".")[0] == FORMAT


def serialized(program: Any) -> bytes:
    """Return the bytes of an exported program."""
    file = io.BytesIO()
    sys.modules[FORMAT].export.save(program, file)
    return file.getvalue()


def prepare(entry: str, name: str, source: Source, known: Known, on_difference: OnDifference) -> Prepared:
    """Return a program to save, bound to the variables that its weights are.

    Raises:
        VariableMismatch: a weight is not the variable of its name.
        FormatError: it is not a program, or of a version before 2.9.
    """
    program = open_program(source)
    bound = known.bound(
        entry,
        program.weights,
        on_difference,
        path=None if isinstance(source.path, Held) else source.path,
        hint="export the module again, with the values that it has now, or pass on_difference='inline' to leave the "
        "values in the program, or 'add' to save them as variables of their own",
        can_leave=is_apart,
    )
    bindings = {key: binding for key, binding in bound.bindings.items() if is_apart(program.weights[key])}
    copies = {known.names[key]: known.digest(key).hex() for key in bound.bindings if key not in bindings}
    about = {"format": FORMAT, "inputs": program.inputs, "outputs": program.outputs}
    return Prepared(name, without(program, bindings), about, bindings, bound.added, {**bound.folded, **copies})


def export(checkpoint: Checkpoint, file: AttachedFile, target: str) -> list[str]:
    """Write a program with the values of its variables as one file.

    Raises:
        DigestMismatch: a value or the program is not what was saved.
        UnsafeContent, VariableMismatch: see `write_whole`.
        CheckpointExists, StorageError: it cannot be written.
    """
    source = Source(Held.named(os.path.join(checkpoint.path, file.name), file.read()))
    values = {name: checkpoint[one.variable] for name, one in bindings_of(file.entry).items()}
    write_whole(target, source, flat_arrays(values, format=FORMAT), name=file.name)
    return [target]
