"""The public functions that load, from checkpoints and from every other path that `varstore.read` opens.

The folders below know checkpoints only. Here a path is looked at first: what is not a checkpoint directory is opened by
the reader of its format, and its arrays take the place of a checkpoint's variables.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np

from varstore.disk.progress import Progress, reporting
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import UsageError
from varstore.formats.opened import ForeignCheckpoint, read_state
from varstore.formats.verbs import open_source
from varstore.interfaces.mindspore import chosen_names, load_param_into_net
from varstore.model import into, store
from varstore.model.match import Missing, OnMismatch, OnTied
from varstore.model.options import Path
from varstore.model.report import LoadReport
from varstore.training import state
from varstore.training.tensors import Framework, MapLocation
from varstore.values.arguments import checked
from varstore.values.select import Patterns, Rename

__all__ = ["load", "load_checkpoint", "load_into", "load_state"]

_ADAPTERS = {
    ("torch.nn", "Module"): "varstore.adapters.torch",
    ("torch.optim", "Optimizer"): "varstore.adapters.torch",
    ("paddle.nn", "Layer"): "varstore.adapters.paddle",
    ("paddle.optimizer", "Optimizer"): "varstore.adapters.paddle",
}
"""Classes of frameworks whose instances `load_into` fills, and the modules that do it."""


@checked
def load(
    path: Path | Checkpoint | ForeignCheckpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    mmap: bool = False,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> dict[str, np.ndarray]:
    """Read the variables of a checkpoint, or the arrays of another system's file, into new arrays, in parallel.

    Tied variables, which shared memory when they were saved, are one array again. If a save replaces the checkpoint
    while it is read, reading starts again with the new one.

    Args:
        path: a checkpoint's directory, an open `Checkpoint`, or any path that `varstore.read` opens.
        include: a glob pattern or several, on whole names; only variables that match are read.
        exclude: a glob pattern or several; variables that match are not read.
        rename: how names change: a dict of prefixes, regular expressions, or a function. The guide
            `varstore.model` shows them.
        mmap: map the files of a checkpoint read-only instead of reading them. Only their sizes are checked.
        verify: compare every byte that is read with the digests. `varstore.verify` also compares every ``meta``.
        threads: default one per processor, at most eight.
        progress: a function that is called with (bytes done, total bytes), or True for a progress bar.

    Returns:
        Arrays by name, in the order in which the variables were saved. They are writeable unless `mmap` is set.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint, ManifestError: the checkpoint cannot be opened.
        VariableNotFound: a pattern of `include` matches no variable.
        VariableMismatch: `rename` gives two variables one name.
        DigestMismatch, SizeMismatch, ManifestError: the files are not what was saved.
        UnsafeContent, FormatError, MissingDependency: see `varstore.read`.

    Example:
        >>> lenet = {"conv1/weight": np.zeros((6, 1, 5, 5), np.float32), "fc/weight": np.ones((10, 84))}
        >>> checkpoint = vs.save("lenet", lenet)
        >>> arrays = vs.load("lenet", include="conv*", rename={"conv1": "backbone/conv1"})
        >>> {name: array.shape for name, array in arrays.items()}
        {'backbone/conv1/weight': (6, 1, 5, 5)}
    """
    source = open_source(path)
    if not isinstance(source, ForeignCheckpoint):
        return store.load(
            source,
            include=include,
            exclude=exclude,
            rename=rename,
            mmap=mmap,
            verify=verify,
            threads=threads,
            progress=progress,
        )
    if mmap:
        raise UsageError(
            "only a checkpoint's files can be mapped",
            path=source.path,
            field="mmap",
            hint="leave out mmap=True, or convert the file to a checkpoint first",
        )
    chosen = source.select(include=include, exclude=exclude, rename=rename)
    nbytes = sum({array.identity: array.nbytes for array in chosen.values()}.values())
    with reporting(progress, nbytes, f"loading {source.path}") as advance:
        arrays: dict[str, np.ndarray] = read_state(chosen, advance=advance)
    return arrays


@checked
def load_into(
    targets: MutableMapping[str, np.ndarray] | Mapping[str, np.ndarray] | Any,
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    strict: bool | None = None,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    missing: Missing = None,
    on_tied: OnTied = "error",
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Fill existing arrays, or a module or optimizer of torch or Paddle, with variables of the same names, in place.

    Names, shapes, types, file sizes, and the values for arrays that share memory are compared before the first array
    changes. A digest can be compared only after its bytes have been read into the array: after `DigestMismatch`, the
    arrays hold a mixture.

    Args:
        targets: writeable arrays by name, in any layout; or a module or an optimizer of torch, or a layer or an
            optimizer of Paddle, which the adapter's own `load_into` fills.
        source: a checkpoint, any path that `varstore.read` opens, or a mapping of names to arrays or to variables of
            checkpoints.
        include: as for `load`, on the source's names.
        exclude: as for `load`, on the source's names.
        rename: as for `load`; it turns the source's names into the targets' names.
        strict: raise an error if the targets or the source have names that the other side does not have. Default: True
            for a module or a layer, and False for arrays.
        on_mismatch: what to do where shapes or types differ: "error"; "skip" leaves the target as it is and reports
            it; "overlap" copies the corner that both shapes share, for a vocabulary that grew.
        cast: convert between types of the same kind, such as float32 and bfloat16.
        missing: a pattern of names or several, as for `load`: the targets that need not be in the source, and then
            keep their values. An error is raised for all others. With "error", all targets must be in the source. By
            default, `strict` decides.
        on_tied: what to do if the source has different values for targets that share memory, such as one array under
            two names: "error"; "first" and "last" take the values of the one that comes first or last in `targets`.
            Equal values are always loaded.
        verify: as for `load`.
        threads: as for `load`.
        progress: as for `load`.

    Returns:
        A report of what was loaded, what was missing in the source, and what was unexpected in it.

    Raises:
        VariableMismatch: shapes or types differ, names do with `strict` or `missing`, nothing would be loaded, or there
            are different values for targets that share memory. The message lists all that is wrong, and nothing has
            changed.
        UsageError: a target is not a writeable array.
        DigestMismatch, SizeMismatch, ManifestError: the files are not what was saved.

    Example:
        >>> checkpoint = vs.save("lenet", {"conv1/bias": np.ones(6, np.float32), "fc/weight": np.ones((10, 84))})
        >>> model = {"conv1/bias": np.zeros(6, np.float32), "fc/weight": np.zeros((12, 84)), "head/bias": np.zeros(3)}
        >>> report = vs.load_into(model, "lenet", on_mismatch="overlap")
        >>> print(report)
        lenet -> targets: 2 of 3 loaded
        loaded          1  conv1/bias
        loaded          1  fc/weight
        missing         1  head/bias  (not in the source: keeps its values)
        overlapped      1  fc/weight  (10, 84) -> (12, 84), copied (10, 84)
        >>> int(model["fc/weight"].sum())
        840
    """
    fill = _adapter_of(targets) or into.load_into
    strictness = {} if strict is None else {"strict": strict}
    report: LoadReport = fill(
        targets,
        open_source(source),
        include=include,
        exclude=exclude,
        rename=rename,
        on_mismatch=on_mismatch,
        cast=cast,
        missing=missing,
        on_tied=on_tied,
        verify=verify,
        threads=threads,
        progress=progress,
        **strictness,
    )
    return report


def _adapter_of(targets: Any) -> Callable[..., LoadReport] | None:
    """Return the `load_into` for an object of a framework, which has been imported if there is such an object."""
    for (module, name), adapter in _ADAPTERS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(targets, kind):
            function: Callable[..., LoadReport] = importlib.import_module(adapter).load_into
            return function
    return None


@checked
def load_state(
    path: Path | Checkpoint | ForeignCheckpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    map_location: MapLocation = None,
    framework: Framework | None = None,
    types: Mapping[str, type] | None = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load the state that `save_state` saved, or that a file of another system holds, as it was.

    Arrays come back as numpy's, torch's or jax's, as they were. Those of a converted file of torch come back as tensors
    where torch is installed, and as numpy's elsewhere. A checkpoint that `varstore.save` made gives a dict of arrays by
    name.

    Of a checkpoint that was opened with ``allow_incomplete=True``, the rest of the state comes back, and a warning is
    logged that names what is lost: dicts do not have those entries, and lists have None in their place.

    Args:
        path: a checkpoint's directory, an open `Checkpoint`, or any path that `varstore.read` opens; such a file gives
            numpy arrays unless `framework` says otherwise.
        include: patterns of what to load, as for `varstore.load`. The name of a value is the keys and indices that
            lead to it, joined by ``/``, as in ``"model/*"``. A list has None in the place of what is left out.
        exclude: patterns of what to leave out.
        rename: as for `varstore.load`. What gets a new name moves to the keys that the name says, from the top:
            ``rename={"model/": ""}`` moves what is in ``"model"`` up.
        map_location: where torch's tensors go, as for ``torch.load``: a device, its name, a dict of device names, or a
            function of (tensor on the CPU, name of its device) that returns the tensor to use, or None for the device
            that it was on. Default: the device that each tensor was on.
        framework: "numpy" or "torch", to get all arrays as numpy's or as tensors. Default: as they were.
        types: classes by name, for records: dataclasses, members of an Enum and argparse's namespaces, which come back
            as a ``SimpleNamespace`` otherwise, and subclasses of dict, which come back as dicts. The name is that with
            which the class was saved, as in ``types={"project.Config": Config}``. Its ``__init__`` is not called.
        verify: as for `varstore.load`.
        threads: as for `varstore.load`. Tensors that go to a device are read one at a time.
        progress: as for `varstore.load`.

    Raises:
        VariableNotFound, VariableMismatch: see `varstore.load`.
        MissingDependency: the state holds arrays of a framework that is not installed.
        UsageError: a device is not available, `framework` is unknown, or jax would convert an array to a narrower type.
        ManifestError: the tree in the manifest does not match the variables.
        CheckpointNotFound, IncompleteCheckpoint, DigestMismatch, SizeMismatch: see `varstore.load`.

    Example:
        >>> checkpoint = vs.save_state("run-3", {"layers": [np.zeros(2), np.ones(2)], "step": 3})
        >>> vs.load_state("run-3")
        {'layers': [array([0., 0.]), array([1., 1.])], 'step': 3}
    """
    source = open_source(path)
    if isinstance(source, ForeignCheckpoint):
        return source.state(
            include=include, exclude=exclude, rename=rename, framework=framework, map_location=map_location
        )
    return state.load_state(
        source,
        include=include,
        exclude=exclude,
        rename=rename,
        map_location=map_location,
        framework=framework,
        types=types,
        verify=verify,
        threads=threads,
        progress=progress,
    )


@checked
def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: str | Iterable[str] | None = None,
    specify_prefix: str | Iterable[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Load the variables of a checkpoint, and copy them into a network if one is given.

    Args:
        ckpt_file_name: a checkpoint's directory, or any path that `varstore.read` opens, such as a ``.ckpt`` of
            MindSpore. Where there is no file of this name, a directory of the name without ``.ckpt`` is taken.
        net: as for `load_param_into_net`.
        strict_load: as for `load_param_into_net`.
        filter_prefix: leave out names that begin with this, or with one of these.
        specify_prefix: load only names that begin with this, or with one of these.
        choice_func: a function that returns whether a name is loaded; it has no effect if a prefix is given.

    Returns:
        Arrays by name.

    Raises:
        UsageError: the prefixes, or `choice_func`, leave nothing to load.

    Example:
        >>> checkpoint = vs.save("lenet", {"conv1.bias": np.zeros(6), "fc.bias": np.ones(3)})
        >>> vs.load_checkpoint("lenet", specify_prefix="fc.")
        {'fc.bias': array([1., 1., 1.])}
    """
    path = os.fspath(ckpt_file_name)
    if not os.path.lexists(path) and os.path.isdir(path.removesuffix(".ckpt")):
        path = path.removesuffix(".ckpt")
    source = open_source(path)

    def load_from(opened: Checkpoint | ForeignCheckpoint) -> dict[str, np.ndarray]:
        chosen = set(
            chosen_names(
                opened,
                path=opened.path,
                filter_prefix=filter_prefix,
                specify_prefix=specify_prefix,
                choice_func=choice_func,
            )
        )
        return load(opened, rename=lambda name: name if name in chosen else None)

    parameters: dict[str, np.ndarray]
    if isinstance(source, ForeignCheckpoint):
        parameters = load_from(source)
    else:
        parameters = retry_if_replaced(load_from, source)
    if net is not None:
        load_param_into_net(net, parameters, strict_load)
    return parameters
