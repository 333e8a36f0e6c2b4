"""Write the graphs of a checkpoint as files that other programs run, each with its values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from varstore.bundles import oneflow, onnx, paddle, torch
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.errors import UsageError
from varstore.layout.graphs import GRAPH
from varstore.model.options import Path
from varstore.text.hints import listed
from varstore.values.arguments import checked

__all__ = ["entries_of", "entry_in", "export"]

_FORMATS: dict[Any, Callable[[Checkpoint, AttachedFile, str], list[str]]] = {
    onnx.FORMAT: onnx.export,
    paddle.FORMAT: paddle.export,
    oneflow.FORMAT: oneflow.export,
    torch.FORMAT: torch.export,
}


@checked
def export(path: str | os.PathLike[str] | Checkpoint, target: Path, *, entry: str | None = None) -> tuple[str, ...]:
    """Write a graph of a checkpoint with its values, as the system that made it does; return the paths of the files.

    An ONNX model becomes one file, and so does a program of `torch.export`. An ONNX model of more than 2 GiB gets a
    second file, ``TARGET.data``. A program of Paddle becomes ``TARGET.json`` (or ``.pdmodel``) and
    ``TARGET.pdiparams``, with a pair of files for each other method of its layer. A graph of OneFlow becomes a folder.
    All values are compared with their digests. The file at ``TARGET``, or ``TARGET.pdiparams``, is replaced; other
    files are not.

    Args:
        path: a checkpoint with graphs, which `varstore.bundle` saved.
        target: the path; for Paddle, the prefix of its files.
        entry: the name of the graph in `bundle`. Default: "forward", or the only one.

    Raises:
        UsageError: there is no graph, or none of this name.
        UnsafeContent: a graph takes values from what is not the file of a variable.
        DigestMismatch, SizeMismatch: the checkpoint is damaged.
        CheckpointExists, StorageError: the files cannot be written.

    Example:
        >>> weights = {"w": np.ones((16, 16), np.float32)}
        >>> model = (  # y = x @ w, as torch.onnx.export(...).model_proto.SerializeToString() gives it
        ...     bytes.fromhex("08083ad9080a110a01780a017712017922064d61744d756c2a8c080810081010014201774a8008")
        ...     + weights["w"].tobytes()
        ...     + bytes.fromhex("5a180a017812130a110801120d0a07120562617463680a0208106218"
        ...                     "0a017912130a110801120d0a07120562617463680a02081012016742021011")
        ... )
        >>> checkpoint = vs.bundle("linear", weights, graphs={"forward": model})
        >>> vs.export("linear", "linear.onnx")
        ('linear.onnx',)
        >>> vs.read("linear.onnx")["w"].sum()
        np.float32(256.0)
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    file = entry_in(checkpoint, entry)
    write = _FORMATS.get(file.attributes.get("format"))
    if write is None:
        raise UsageError(
            "the format of this graph is unknown",
            path=file.name,
            found=repr(file.attributes.get("format")),
            expected=listed(sorted(map(repr, _FORMATS))),
        )
    return tuple(write(checkpoint, file, os.fspath(target)))


def entries_of(checkpoint: Checkpoint) -> dict[str, AttachedFile]:
    """Return the graphs of a checkpoint by the names of their entries."""
    files = [file for file in checkpoint.files.values() if file.kind == GRAPH]
    return {str(file.attributes.get("entry", file.name)): file for file in files}


def entry_in(checkpoint: Checkpoint, entry: str | None) -> AttachedFile:
    """Return one graph: that of an entry, or "forward", or the only one.

    Raises:
        UsageError: there is no graph, or none of this name, or it is not said which one.
    """
    entries = entries_of(checkpoint)
    if not entries:
        raise UsageError(
            "this checkpoint does not have a graph",
            path=checkpoint.path,
            hint="varstore.bundle saves it with variables",
        )
    wanted = entry if entry is not None or len(entries) > 1 else next(iter(entries))
    found = entries.get("forward" if wanted is None else wanted)
    if found is None:
        raise UsageError(
            "there is no such entry" if entry is not None else "there are several entries",
            path=checkpoint.path,
            field="entry",
            found=None if entry is None else repr(entry),
            expected=" or ".join(map(repr, entries)),
        )
    return found
