"""Run ONNX models that `varstore.bundle` saved, with onnxruntime, or load them with onnx. Requires one of the two.

    from varstore.adapters import onnx

    session = onnx.session("run/step-9")
    (scores,) = session.run(None, {"x": images})

A graph is a program. Before anything runs it, its bytes are compared with their digests, and each reference to a file
must be exactly that to a variable of the checkpoint. That tells damage, not malice: run graphs of people whom you
trust.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from varstore.bundles.export import entries_of, entry_in
from varstore.bundles.onnx import FORMAT, checked_model
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.variable import Variable
from varstore.errors import MissingDependency, UnsafeContent, UsageError, VarstoreError
from varstore.storage import syscalls
from varstore.text.hints import plural
from varstore.values.arguments import checked

try:
    import onnxruntime
except ImportError:
    import onnx

if TYPE_CHECKING:
    import onnx

__all__ = ["CheckReport", "Ran", "check", "load_model", "session"]


@checked
def load_model(path: str | os.PathLike[str] | Checkpoint, entry: str | None = None) -> onnx.ModelProto:
    """Return a graph of a checkpoint as a ModelProto, with the values of its variables, compared with their digests.

    `onnx.load` refuses files that have several names, as those of checkpoints that share variables do.

    Args:
        path: the checkpoint.
        entry: the name of the graph. Default: "forward", or the only one.

    Raises:
        UsageError: there is no such graph.
        UnsafeContent: it takes values from what is not the file of a variable.
        DigestMismatch, SizeMismatch, StorageError: see `varstore.load`.
        MissingDependency: onnx is not installed.

    Example:
        >>> from varstore.adapters import onnx
        >>> weights = {"w": np.ones((16, 16), np.float32)}
        >>> model = (  # y = x @ w, as torch.onnx.export(...).model_proto.SerializeToString() gives it
        ...     bytes.fromhex("08083ad9080a110a01780a017712017922064d61744d756c2a8c080810081010014201774a8008")
        ...     + weights["w"].tobytes()
        ...     + bytes.fromhex("5a180a017812130a110801120d0a07120562617463680a0208106218"
        ...                     "0a017912130a110801120d0a07120562617463680a02081012016742021011")
        ... )
        >>> checkpoint = vs.bundle("linear", weights, graphs={"forward": model})
        >>> onnx.load_model("linear").graph.initializer[0].name
        'w'
    """
    library = _imported("onnx")
    content, variables = _checked(path, entry)[1:]
    model = library.ModelProto.FromString(content)
    for tensor in model.graph.initializer:
        said = {item.key: item.value for item in tensor.external_data}
        if said:
            tensor.raw_data = variables[said["location"]].numpy().tobytes()
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return model


@checked
def session(
    path: str | os.PathLike[str] | Checkpoint, entry: str | None = None, *, trust: bool = False, **options: Any
) -> onnxruntime.InferenceSession:
    """Return a session of onnxruntime that runs a graph of a checkpoint, with values from the files of its variables.

    The files are not read as a whole: `varstore.verify` compares them with their digests. No custom operators are
    registered, and a graph that asks for what another file compiled is refused.

    Args:
        path: the checkpoint.
        entry: the name of the graph. Default: "forward", or the only one.
        trust: also run the graph of a checkpoint whose folder belongs to another user.
        options: those of `onnxruntime.InferenceSession`, such as `providers` and `sess_options`.

    Raises:
        UsageError: there is no such graph.
        UnsafeContent: the folder belongs to another user, or the graph takes values from what is not the file of a
            variable.
        DigestMismatch, SizeMismatch, StorageError: see `varstore.AttachedFile.read`.
        MissingDependency: onnxruntime is not installed.

    Example:
        >>> from varstore.adapters import onnx
        >>> weights = {"w": np.ones((16, 16), np.float32)}
        >>> model = (  # y = x @ w, as torch.onnx.export(...).model_proto.SerializeToString() gives it
        ...     bytes.fromhex("08083ad9080a110a01780a017712017922064d61744d756c2a8c080810081010014201774a8008")
        ...     + weights["w"].tobytes()
        ...     + bytes.fromhex("5a180a017812130a110801120d0a07120562617463680a0208106218"
        ...                     "0a017912130a110801120d0a07120562617463680a02081012016742021011")
        ... )
        >>> checkpoint = vs.bundle("linear", weights, graphs={"forward": model})
        >>> (y,) = onnx.session("linear").run(None, {"x": np.ones((1, 16), np.float32)})
        >>> y[0, :3]
        array([16., 16., 16.], dtype=float32)
    """
    library = _imported("onnxruntime")
    checkpoint, content, variables = _checked(path, entry)
    owner = os.stat(checkpoint.location.absolute).st_uid
    if not trust and syscalls.CAN_SAVE and owner != syscalls.user():
        raise UnsafeContent(
            "the checkpoint belongs to another user, and a graph is a program",
            path=checkpoint.path,
            found=f"user {owner}",
            hint="if you trust that user, pass trust=True",
        )
    for variable in variables.values():
        variable.check_files()
    given = options.pop("sess_options", None)
    settings = library.SessionOptions() if given is None else given
    settings.add_session_config_entry(_FOLDER, checkpoint.location.absolute)
    return library.InferenceSession(content, settings, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What one graph did: its seconds, its outputs as text, the largest difference, and what went wrong."""

    entry: str
    seconds: float = 0.0
    outputs: tuple[str, ...] = ()
    difference: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.entry}: {self.problem}"
        compared = "" if self.difference is None else f"; largest difference {self.difference:.3g}"
        return f"{self.entry}: {self.seconds * 1000:.1f} ms -> {', '.join(self.outputs)}{compared}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What the graphs of a checkpoint did. The report is true if all of them ran."""

    path: str
    graphs: tuple[Ran, ...]

    @property
    def ok(self) -> bool:
        """Whether every graph ran."""
        return not any(ran.problem for ran in self.graphs)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        failed = sum(bool(ran.problem) for ran in self.graphs)
        head = f"{failed} of {plural(len(self.graphs), 'graph')} did not run" if failed else "every graph ran"
        return "\n".join([f"{self.path}: {head}", *(f"  {ran}" for ran in self.graphs)])


@checked
def check(
    path: str | os.PathLike[str] | Checkpoint,
    entry: str | None = None,
    *,
    against: str | os.PathLike[str] | Checkpoint | None = None,
    trust: bool = False,
) -> CheckReport:
    """Run each ONNX graph of a checkpoint once, on random inputs, and return what they gave.

    Extents that a graph leaves open are 1. Integers are 0 or 1.

    Args:
        path: the checkpoint.
        entry: only this graph.
        against: a checkpoint whose graphs of the same names get the same inputs; the largest differences are reported.
        trust: as for `session`.

    Raises:
        UsageError: there is no graph, or none of this name.
        MissingDependency: onnxruntime is not installed.
        UnsafeContent, StorageError: see `session`.

    Example:
        >>> from varstore.adapters import onnx
        >>> weights = {"w": np.ones((16, 16), np.float32)}
        >>> model = (  # y = x @ w, as torch.onnx.export(...).model_proto.SerializeToString() gives it
        ...     bytes.fromhex("08083ad9080a110a01780a017712017922064d61744d756c2a8c080810081010014201774a8008")
        ...     + weights["w"].tobytes()
        ...     + bytes.fromhex("5a180a017812130a110801120d0a07120562617463680a0208106218"
        ...                     "0a017912130a110801120d0a07120562617463680a02081012016742021011")
        ... )
        >>> checkpoint = vs.bundle("linear", weights, graphs={"forward": model})
        >>> bool(onnx.check("linear"))
        True
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    other = against if against is None or isinstance(against, Checkpoint) else open_checkpoint(against)
    first = entry_in(checkpoint, entry) if entry is not None or not entries_of(checkpoint) else None
    chosen = entries_of(checkpoint) if first is None else {str(entry): first}
    ran = []
    for name, file in chosen.items():
        if file.attributes.get("format") != FORMAT:
            continue
        places = [place for place in (checkpoint, other) if place is not None]
        ran.append(_ran(name, file, places, trust=trust))
    if not ran:
        raise UsageError("this checkpoint does not have an ONNX graph", path=checkpoint.path)
    return CheckReport(path=checkpoint.path, graphs=tuple(ran))


def _ran(name: str, file: AttachedFile, places: list[Checkpoint], *, trust: bool) -> Ran:
    generator = np.random.default_rng(0)
    try:
        sessions = [session(place, name, trust=trust) for place in places]
        inputs = {port["name"]: _random(generator, port) for port in file.attributes["inputs"]}
        start = time.perf_counter()
        results = sessions[0].run(None, inputs)
        seconds = time.perf_counter() - start
        others = [session.run(None, inputs) for session in sessions[1:]]
        differences = [_difference(a, b) for a, b in zip(results, others[0], strict=True)] if others else []
    except VarstoreError:
        raise
    except Exception as error:  # of onnxruntime, whose errors have no common base
        return Ran(entry=name, problem=f"{type(error).__name__}: {error}")
    names = [output.name for output in sessions[0].get_outputs()]
    outputs = tuple(f"{name} {_described(value)}" for name, value in zip(names, results, strict=True))
    return Ran(entry=name, seconds=seconds, outputs=outputs, difference=max(differences, default=None))


def _random(generator: np.random.Generator, port: dict[str, Any]) -> np.ndarray:
    shape = [extent if isinstance(extent, int) and extent >= 0 else 1 for extent in port["shape"] or ()]
    dtype = np.dtype(port["type"])
    if dtype.kind in "biu":
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _difference(a: Any, b: Any) -> float:
    values = [np.asarray(value, np.complex128 if np.iscomplexobj(value) else np.float64) for value in (a, b)]
    return float(np.max(np.abs(values[0] - values[1]), initial=0.0))


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


_FOLDER = "session.model_external_initializers_file_folder_path"


def _checked(
    path: str | os.PathLike[str] | Checkpoint, entry: str | None
) -> tuple[Checkpoint, bytes, dict[str, Variable]]:
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    file: AttachedFile = entry_in(checkpoint, entry)
    if file.attributes.get("format") != FORMAT:
        raise UsageError("this graph is not a model of ONNX", path=file.name, found=repr(file.attributes.get("format")))
    return checkpoint, *checked_model(checkpoint, file)


def _imported(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingDependency(
            f"this needs {name}", found=str(error), hint=f"install it: pip install {name}"
        ) from error
