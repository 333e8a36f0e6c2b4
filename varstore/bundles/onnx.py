"""ONNX models in a bundle: their initializers that are variables lie in the files of these."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from varstore.bundles.known import Known, OnDifference, Prepared, digest_of
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint
from varstore.disk.read.variable import Variable
from varstore.errors import UnsafeContent, UsageError
from varstore.formats.binary.source import Held, Source
from varstore.formats.onnx.bound import OnnxGraph, can_be_external, initializers, open_graph, outside, rewritten
from varstore.formats.onnx.model import write_inline
from varstore.layout.graphs import Binding, bindings_of
from varstore.layout.names import folder_of
from varstore.values.lazy import LazyArray

__all__ = ["checked_model", "export", "is_model", "prepare", "renewed", "serialized"]

FORMAT = "onnx"
SUFFIX = ".onnx"
_CONTEXT = "EPContext"
"""An operator that runs what another file holds."""


def is_model(model: Any) -> bool:
    """Tell whether this is a ModelProto, or what `torch.onnx.export` returns."""
    return hasattr(model, "SerializeToString") or hasattr(model, "model_proto")


def serialized(model: Any, entry: str) -> bytes:
    """Return the bytes of a ModelProto.

    Raises:
        UsageError: they are more than a message can have.
    """
    proto = getattr(model, "model_proto", model)
    try:
        data: bytes = proto.SerializeToString()
    except ValueError as error:
        raise UsageError(
            "this model is too large for one message",
            field=f"graphs[{entry!r}]",
            found=str(error),
            hint="save it with onnx.save(..., save_as_external_data=True), and pass the path",
        ) from error
    return data


def prepare(entry: str, name: str, source: Source, known: Known, on_difference: OnDifference) -> Prepared:
    """Return a graph to save: initializers that are variables become external data, where they can be.

    Raises:
        VariableMismatch: an initializer is not the variable of its name.
        UsageError: the model has values in files, and is not a file itself; or it is too large.
        FormatError: it is not an ONNX model.
    """
    in_memory = isinstance(source.path, Held)
    if in_memory and any(record.is_external for record in initializers(source)):
        raise UsageError(
            "the model has values in other files, which are not known without its path",
            field=f"graphs[{entry!r}]",
            hint="pass the path of the model",
        )
    graph = open_graph(source)
    bound = known.bound(
        entry,
        graph.arrays,
        on_difference,
        path=None if in_memory else source.path,
        hint="the exporter of PyTorch folds layers such as BatchNorm into others: export with optimize=False, or pass "
        "on_difference='inline' to leave the values in the graph, or 'add' to save them as variables of their own",
        can_leave=can_be_external,
    )
    places = _places(bound.bindings)
    content = rewritten(graph, places)
    _check_outside(Held.named(source.path, content), set(places.values()))
    about = {"format": FORMAT, "inputs": graph.inputs, "outputs": graph.outputs}
    return Prepared(name, content, about, bound.bindings, bound.added, bound.folded)


def _places(bindings: Mapping[str, Binding]) -> dict[str, str]:
    """Return where those initializers lie that are not in the graph, relative to it."""
    return {name: f"{folder_of(one.variable)}/out" for name, one in bindings.items() if not one.digest}


def _check_outside(held: Held, places: set[str]) -> None:
    for record in outside(Source(held)).tensors:
        if record.external.get("location") not in places:
            raise UsageError(
                "a tensor in a part of the model has values in another file",
                path=str(held),
                variable=record.name,
                hint="load the model with onnx.load, and pass what it returns",
            )


def checked_model(checkpoint: Checkpoint, file: AttachedFile) -> tuple[bytes, dict[str, Variable]]:
    """Return a graph, compared with its digests, and the variables that lie at the places that it refers to.

    Raises:
        UnsafeContent: it refers to a place that is not a variable's, or to a part of one; or it runs what another file
            holds.
        FormatError: it is not an ONNX model.
        DigestMismatch, SizeMismatch, StorageError: see `AttachedFile.read`.
    """
    content = file.read()
    source = Source(Held.named(file.name, content))
    found = outside(source)
    if _CONTEXT in found.operators:
        raise UnsafeContent("the graph runs what another file holds", path=file.name, found=_CONTEXT)
    places = {f"{variable.entry.folder}/out": variable for variable in checkpoint.values()}
    used: dict[str, Variable] = {}
    for record in found.tensors:
        said = record.external
        variable = places.get(said.get("location", ""))
        if variable is None or said.keys() != {"location", "offset", "length"}:
            raise _refused(file, record.name, said)
        if said["offset"] != "0" or said["length"] != str(variable.entry.nbytes):
            raise _refused(file, record.name, said)
        used[said["location"]] = variable
    if len(found.tensors) != sum(record.is_external for record in initializers(source)):
        raise UnsafeContent(
            "a tensor that is not an initializer of the main graph has values in a file", path=file.name
        )
    return content, used


def _refused(file: AttachedFile, name: str, said: Mapping[str, str]) -> UnsafeContent:
    return UnsafeContent(
        "the graph takes values from what is not exactly the file of a variable",
        path=file.name,
        variable=name,
        found=str(said)[:200],
        expected="FOLDER/out of a variable, offset 0, and its length",
    )


def export(checkpoint: Checkpoint, file: AttachedFile, target: str) -> list[str]:
    """Write the graph with the values of its variables as one file; return the paths of what was written.

    A model that would have more than 2 GiB gets a file ``target.data`` beside it.

    Raises:
        DigestMismatch: a value is not what was saved.
        UnsafeContent: see `checked_model`.
        CheckpointExists, StorageError: it cannot be written.
    """
    content, _ = checked_model(checkpoint, file)
    source = Source(Held.named(os.path.join(checkpoint.path, file.name), content))
    bindings = {name: one for name, one in bindings_of(file.entry).items() if not one.digest}
    write_inline(target, {name: checkpoint[one.variable] for name, one in bindings.items()}, source)
    beside = f"{target}.data"
    return [target, beside] if os.path.lexists(beside) else [target]


def renewed(file: AttachedFile, known: Known) -> tuple[bytes, dict[str, Binding]] | None:
    """Return a graph with the present values of the variables that it has copies of; None if they are the same."""
    bindings = bindings_of(file.entry)
    copies = {name: one for name, one in bindings.items() if one.digest and one.variable in known}
    changed = [name for name, one in copies.items() if known.digest(one.variable).hex() != one.digest]
    values = {name: known.values(copies[name].variable) for name in changed}
    if not values:
        return None
    graph = open_graph(Source(Held.named(file.path, file.read())))
    _check_forms(file, graph, values)
    new = {name: bindings[name]._replace(digest=digest_of(array).hex()) for name, array in values.items()}
    return rewritten(graph, _places(bindings), values), {**bindings, **new}


def _check_forms(file: AttachedFile, graph: OnnxGraph, values: Mapping[str, np.ndarray]) -> None:
    """Check that the graph has these initializers, as its entry says."""
    for name, array in values.items():
        own: LazyArray | None = graph.arrays.get(name)
        if own is None or (own.shape, own.dtype) != (array.shape, array.dtype.newbyteorder("=")):
            raise UnsafeContent("the graph is not what its entry says", path=file.name, variable=name)
