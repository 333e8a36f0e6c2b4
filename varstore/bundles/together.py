"""Save graphs with their variables, and the graphs of an earlier checkpoint with new variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Unpack

from varstore.bundles import oneflow, onnx, paddle, torch
from varstore.bundles.known import Known, OnDifference, Prepared
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import UsageError
from varstore.formats.binary.source import Held, Source
from varstore.formats.binary.zip import is_zip
from varstore.layout.graphs import GRAPH, bindings_of, check_folded
from varstore.model.options import Path, SaveOptions, check_options
from varstore.model.store import save
from varstore.values.arguments import check_names, checked, checked_path, described
from varstore.values.attached import FileContent, GivenFile
from varstore.values.select import Rename

__all__ = ["bundle", "graphs_of"]

_KEPT_WHOLE = (".mge", ".mindir")
"""The suffixes of MegEngine's and MindSpore's graphs."""


class Taken(NamedTuple):
    """Graphs as files to save, the variables that they bring with them, and all that they use."""

    files: dict[str, FileContent]
    added: dict[str, Any]
    used: set[str]


@checked
def bundle(
    path: Path,
    variables: Mapping[str, Any],
    *,
    graphs: Mapping[str, Any] | Checkpoint,
    rename: Rename | None = None,
    on_difference: OnDifference = "error",
    include_only_used: bool = False,
    **save_options: Unpack[SaveOptions],
) -> Checkpoint:
    """Save variables with the graphs that use them: a checkpoint that runs.

    Each graph becomes an attached file that takes its weights from the files of the variables. So a value is on disk
    once, however many graphs use it, and a later checkpoint with the same graph shares all that did not change.

    An initializer of an ONNX model is bound to the variable of its name if shape, type and bytes agree. It then lies in
    the variable's file. Those of less than 1 KiB, types of less than a byte, and integers of at most one dimension,
    which may be the operands of shapes, stay in the graph as copies, and so do those that are not variables. So are
    the weights of a program of `torch.export`, of any size and type, which is kept without their bytes. A program of
    Paddle or OneFlow is kept as it is, with the names of what it takes from variables; what the ``.pdiparams`` file
    beside it has and `variables` do not becomes a variable.

    Args:
        path: as for `varstore.save`.
        variables: names and arrays, or a checkpoint, whose files are linked.
        graphs: for each entry, such as "forward", a model of ONNX (a path, bytes, or the ModelProto), a program of
            `torch.export` (a path that ends in ``.pt2``, bytes, or the ExportedProgram), or the path of a program of
            Paddle (``.json``, ``.pdmodel``) or OneFlow (``.mlir``). A path keeps its file name; others become
            ``ENTRY.onnx`` or ``ENTRY.pt2``. Or an earlier checkpoint, whose graphs are linked, and get the values of
            these variables.
        rename: from the names of the variables to those in the graphs, as for `varstore.load`.
        on_difference: what becomes of a value in a graph that is not that of the variable of its name: "error" refuses
            it; "inline" leaves it in the graph; "add" saves it as a variable of its own, ``ENTRY/NAME``. The exporter
            of PyTorch makes such values when it folds a layer into another.
        include_only_used: leave out variables that no graph uses.
        save_options: those of `varstore.save`; `files` are saved beside the graphs. With ``links=False``, `onnx.load`
            opens the graphs itself.

    Raises:
        VariableMismatch: values of a graph are not those of the variables.
        VariableNotFound: a program names a variable that is not there.
        FormatError: a file is not a model; see `varstore.read`.
        UsageError: two graphs have one name, none of the variables is used, or a graph keeps its values.
        InvalidName, UnsupportedDtype, CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> weights = {"w": np.ones((16, 16), np.float32)}
        >>> model = (  # y = x @ w, as torch.onnx.export(...).model_proto.SerializeToString() gives it
        ...     bytes.fromhex("08083ad9080a110a01780a017712017922064d61744d756c2a8c080810081010014201774a8008")
        ...     + weights["w"].tobytes()
        ...     + bytes.fromhex("5a180a017812130a110801120d0a07120562617463680a0208106218"
        ...                     "0a017912130a110801120d0a07120562617463680a02081012016742021011")
        ... )
        >>> first = vs.bundle("first", weights, graphs={"forward": model})
        >>> first.files["forward.onnx"].nbytes
        144
        >>> second = vs.bundle("second", {"w": weights["w"] * 2}, graphs=first)  # the same graph, and new values
        >>> vs.read("second/forward.onnx")["w"][0, :3]
        array([2., 2., 2.], dtype=float32)
    """
    check_options(save_options, SaveOptions, "bundle()")
    check_names(variables, "variables")
    if isinstance(graphs, Checkpoint):
        taken = graphs_of(graphs, variables)
    else:
        taken = _made(graphs, Known.of(variables, rename), on_difference)
    files = {} if (given := save_options.get("files")) is None else given
    if not isinstance(files, Mapping):
        raise UsageError("must be a mapping of names to bytes or paths", field="files", found=described(files))
    if both := [name for name in taken.files if name in files]:
        raise UsageError("a file has the name of a graph", field=f"files[{both[0]!r}]", hint="give it another name")
    save_options["files"] = {**files, **taken.files}
    chosen = _chosen(variables, taken, save_options, only_used=include_only_used)
    return save(path, chosen, **save_options)


def _made(graphs: Mapping[str, Any], known: Known, on_difference: OnDifference) -> Taken:
    if not isinstance(graphs, Mapping) or not all(isinstance(entry, str) for entry in graphs):
        raise UsageError("must be a mapping of names to models", field="graphs", found=described(graphs))
    if not graphs:
        raise UsageError("there is no graph", field="graphs", hint="save variables alone with varstore.save")
    made: dict[str, Prepared] = {}
    for entry, model in graphs.items():
        graph = _prepared(entry, model, known, on_difference)
        if graph.name in made:
            raise UsageError(
                "two graphs have the same file name",
                field=f"graphs[{entry!r}]",
                found=repr(graph.name),
                hint="rename one of the files",
            )
        made[graph.name] = graph._replace(about={"entry": entry, **graph.about})
        known = known.with_added(graph.added)
    if not any(graph.bindings for graph in made.values()):
        raise UsageError(
            "no graph uses any of the variables",
            field="graphs",
            hint="pass rename= to give the variables the names that the graphs have for them",
        )
    return Taken(
        files={
            **{name: path for graph in made.values() for name, path in graph.beside.items()},
            **{name: graph.file() for name, graph in made.items()},
        },
        added={name: value for graph in made.values() for name, value in graph.added.items()},
        used={binding.variable for graph in made.values() for binding in graph.bindings.values()},
    )


def _prepared(entry: str, model: Any, known: Known, on_difference: OnDifference) -> Prepared:
    field = f"graphs[{entry!r}]"
    if isinstance(model, str | os.PathLike):
        place = checked_path(model, field)
        if place.endswith(paddle.PROGRAMS):
            return paddle.prepare(entry, Source(place), known)
        if place.endswith(oneflow.SUFFIX):
            return oneflow.prepare(entry, Source(place), known)
        if place.endswith(_KEPT_WHOLE):
            raise UsageError(
                "a graph of this system keeps its values, and cannot be bound to variables",
                path=place,
                field=field,
                hint="keep it with varstore.save(..., files=), and write copies of it with varstore.write(..., model=)",
            )
        if place.endswith(torch.PROGRAM) or is_zip(Source(place)):
            return torch.prepare(entry, os.path.basename(place), Source(place), known, on_difference)
        return onnx.prepare(entry, os.path.basename(place), Source(place), known, on_difference)
    if onnx.is_model(model):
        model = onnx.serialized(model, entry)
    elif torch.is_program(model):
        model = torch.serialized(model)
    if not isinstance(model, bytes | bytearray | memoryview):
        raise UsageError(
            "not a graph",
            field=field,
            found=described(model),
            expected="a path, bytes, a ModelProto or an ExportedProgram",
        )
    source = Source(Held.named(field, bytes(model)))
    if is_zip(source):
        return torch.prepare(entry, f"{entry}{torch.PROGRAM}", source, known, on_difference)
    return onnx.prepare(entry, f"{entry}{onnx.SUFFIX}", source, known, on_difference)


def _chosen(variables: Mapping[str, Any], taken: Taken, options: SaveOptions, *, only_used: bool) -> Mapping[str, Any]:
    """Return the variables to save; `options` get what a checkpoint among them says beside its values."""
    if both := [name for name in taken.added if name in variables]:
        raise UsageError(
            "the checkpoint has a variable of the name for a value of a graph",
            variable=both[0],
            hint="rename the variable, or pass on_difference='inline'",
        )
    chosen = {name: value for name, value in variables.items() if not only_used or name in taken.used}
    if not taken.added and len(chosen) == len(variables):
        return variables
    if isinstance(variables, Checkpoint):
        options.setdefault("attributes", variables.attributes)
    return {**chosen, **taken.added}


def graphs_of(source: Path | Checkpoint, variables: Mapping[str, Any]) -> Taken:
    """Return the graphs of a checkpoint for new values of its variables.

    A graph is linked, and so are variables that exist only for it. One that has copies of variables which changed is
    written again, with the new values.

    Raises:
        UsageError: the checkpoint does not have a graph.
        VariableNotFound, VariableMismatch: a bound variable is not among the new ones, or changed its shape or type.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    with nullcontext(checkpoint) if checkpoint is source else checkpoint:
        return _taken(checkpoint, variables)


def _taken(checkpoint: Checkpoint, variables: Mapping[str, Any]) -> Taken:
    graphs = {name: file for name, file in checkpoint.files.items() if file.kind == GRAPH}
    if not graphs:
        raise UsageError("this checkpoint does not have a graph", path=checkpoint.path, field="graphs_from")
    own = [one.variable for file in graphs.values() for one in bindings_of(file.entry).values() if one.own]
    added = {name: checkpoint[name] for name in own if name not in variables}
    known = Known.of({**variables, **added}, None)
    files = {name: _renewed(file, known) for name, file in graphs.items()}
    beside = {name for file in graphs.values() for name in file.attributes.get("beside", ())}
    files |= {name: checkpoint.files[name] for name in beside if name in checkpoint.files}
    used = {one.variable for file in graphs.values() for one in bindings_of(file.entry).values()}
    return Taken(files=files, added=added, used=used)


def _renewed(file: AttachedFile, known: Known) -> FileContent:
    known.check(file)
    folded = [name for name in file.attributes.get("folded", {}) if name in known]
    check_folded(file.entry, {name: known.digest(name) for name in folded})
    if file.attributes.get("format") != onnx.FORMAT or (new := onnx.renewed(file, known)) is None:
        return file
    content, bindings = new
    said = {name: binding.as_json() for name, binding in bindings.items()}
    return GivenFile(content, GRAPH, {**file.attributes, "bindings": said})
