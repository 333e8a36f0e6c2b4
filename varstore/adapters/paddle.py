"""PaddlePaddle: save and load layers, optimizers and nested state, load into existing ones, and a callback for `fit`.

Names are those of ``state_dict``. Besides them, parameters have names of Paddle's own, such as ``linear_0.w_0``: they
are kept in the attribute ``parameter_names``, because the state of an optimizer is named by them. Nothing is pickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Unpack

import numpy as np
import paddle

from varstore import live
from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint, retry_if_replaced
from varstore.errors import UnsupportedDtype, UsageError, VariableMismatch
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.loading import load_state
from varstore.model.into import fill_targets, from_source
from varstore.model.match import Missing, OnMismatch, OnTied
from varstore.model.moves import LateTarget, Place
from varstore.model.options import LoadOptions, Path, StateOptions
from varstore.model.refusal import Demands
from varstore.model.report import LoadReport
from varstore.text.hints import shortened
from varstore.training.manager import CheckpointManager
from varstore.training.state import save_state
from varstore.values.arguments import checked
from varstore.values.arrays import as_source
from varstore.values.nodes import leaves, replaced
from varstore.values.select import Patterns, Rename, select

__all__ = ["VarstoreCallback", "load", "load_into", "save", "state_of"]

_NAMES = "parameter_names"
_APART = ("LR_Scheduler", "master_weights")
"""What the state of an optimizer has besides its tensors."""
_PARTS = {"model", "optimizer", "done"}
"""What the callback saves, beside the scaler where there is one."""
_LINES = 10
_LONGEST_NAME = 4096
"""Characters; to look for longer names in those of a file could take long."""


@checked
def save(path: Path, state: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a layer, an optimizer, a state dict, or nested state that contains them.

    Every object with a method ``state_dict`` is saved as its state dict. The layer that `paddle.jit.load` returns has
    names like ``param_0``; the names in its program are kept as those of its parameters.

    Args:
        path: a path that does not exist, or an empty directory; see `varstore.save`.
        state: for example ``{"model": layer, "optimizer": optimizer, "epoch": 3}``.
        save_options: the options of `varstore.save`.

    Raises:
        UnsupportedDtype: a tensor is without values, or has a type that the format cannot store.
        UsageError: something is not data; see `varstore.save_state`.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import save
        >>> save("before", {"model": paddle.nn.Linear(2, 3), "epoch": 3}).names
        ('model/weight', 'model/bias')
    """
    attributes = {_NAMES: names} if (names := dict(_parameter_names(state))) else {}
    save_options["attributes"] = {**attributes, **(save_options.get("attributes") or {})}
    return save_state(path, state_of(state), **save_options)


def state_of(state: Any) -> Any:
    """Return nested state in which every object with a method ``state_dict`` is replaced by its state dict.

    The result can be passed to `varstore.save_state` and `varstore.CheckpointManager`.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import state_of
        >>> list(state_of({"model": paddle.nn.Linear(2, 3), "epoch": 3})["model"])
        ['weight', 'bias']
    """
    return live.state_of(state, _state_dict)


def _state_dict(item: Any) -> Any:
    """Return the state dict of an object; that of an optimizer of Paddle 2 leaves out what was loaded until a step."""
    state = item.state_dict()
    is_waiting = isinstance(item, paddle.optimizer.Optimizer) and not item._accumulators
    return {**item._accumulators_holder, **state} if is_waiting else state


def _parameter_names(state: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names in a checkpoint of tensors with other names in Paddle, and these names."""
    if isinstance(state, paddle.nn.Layer):
        program = _names_in_program(state)
        for name, tensor in _tensors_of(state).items():
            yield prefix + name, program.get(name, tensor.name)
    elif type(state) in (dict, list):
        for key, item in state.items() if type(state) is dict else enumerate(state):
            yield from _parameter_names(item, f"{prefix}{key}/")
    else:
        for name, tensor in leaves(state_of(state)):
            if isinstance(tensor, paddle.Tensor) and name.rpartition("/")[2] != tensor.name:
                yield prefix + name, tensor.name


def _names_in_program(layer: paddle.nn.Layer) -> dict[str, str]:
    """Return the names in its program of the tensors of a layer that `paddle.jit.load` returned."""
    loaded: dict[str, str] = {}  # a program of Paddle 2 gets new names as it is loaded
    for holder in getattr(layer, "_program_holder_dict", {}).values():
        loaded |= holder._suffix_varname_dict
    return {own: loaded.get(name, name) for name, own in getattr(layer, "_persistable_var_name_dict", {}).items()}


def _tensors_of(layer: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    return dict(layer.state_dict(use_hook=False))


@checked
def load(
    path: Path | Checkpoint | ForeignCheckpoint,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> Any:
    """Load the state that `save` saved, with Paddle's tensors for all arrays, for ``set_state_dict``.

    Tensors get the names that they had in Paddle. So the state of an optimizer has its master weights again.

    Args:
        path: a checkpoint, its path, or any path that `varstore.read` opens, such as a ``.pdparams``.
        include, exclude, rename: what of it to load, and where to put it; see `varstore.load_state`.
        verify, threads, progress: see `varstore.load`.

    Raises:
        UnsupportedDtype: Paddle does not have the type of an array.
        CheckpointNotFound, IncompleteCheckpoint, DigestMismatch, SizeMismatch: see `varstore.load`.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import load, save
        >>> layer = paddle.nn.Linear(2, 3)
        >>> checkpoint = save("before", {"model": layer, "epoch": 3})
        >>> layer.set_state_dict(load("before")["model"])
        ([], [])
    """
    source = open_source(path)
    choice: dict[str, Any] = {"include": include, "exclude": exclude, "rename": rename}
    options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}

    def load_from(opened: Checkpoint | ForeignCheckpoint) -> Any:
        return _with_tensors(load_state(opened, **choice, framework="numpy", **options))

    return load_from(source) if isinstance(source, ForeignCheckpoint) else retry_if_replaced(load_from, source)


def _with_tensors(state: Any) -> Any:
    """Return nested state with Paddle's tensors for arrays; master weights are named as their accumulators say."""
    state = replaced(state, lambda leaf: _tensor(leaf) if isinstance(leaf, np.ndarray) else leaf)
    for item in (state, *(state.values() if isinstance(state, dict) else ())):
        weights = item.get("master_weights") if isinstance(item, dict) else None
        for parameter, weight in weights.items() if isinstance(weights, dict) else ():
            name = re.compile(rf"{re.escape(parameter)}_fp32_master_\d+")
            found = next(filter(None, (name.match(key) for key in item if isinstance(key, str))), None)
            weight.name = found[0] if found else f"{parameter}_fp32_master_0"
    return state


def _tensor(array: np.ndarray) -> paddle.Tensor:
    """Return an array as a tensor of the same type.

    Raises:
        UnsupportedDtype: Paddle does not have the type.
    """
    dtype = array.dtype.newbyteorder("=")
    try:
        if dtype.name == "bfloat16":
            return paddle.to_tensor(array.view(np.uint16))  # which Paddle takes for bfloat16
        if dtype.type.__module__ != "numpy":
            return paddle.to_tensor(array.astype(np.float32)).astype(dtype.name)
        if dtype != np.uint16:
            tensor = paddle.to_tensor(array)
            if as_source(tensor, variable="").dtype == dtype:
                return tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unsupported(array) from error
    raise _unsupported(array)


def _unsupported(array: np.ndarray) -> UnsupportedDtype:
    return UnsupportedDtype(
        "Paddle does not have this type", found=f"dtype {array.dtype}", hint="varstore.load_state gives numpy arrays"
    )


@checked
def load_into(
    target: paddle.nn.Layer | paddle.optimizer.Optimizer,
    source: Path | Checkpoint | Mapping[str, Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    use_structured_name: bool = True,
    layer: paddle.nn.Layer | None = None,
    strict: bool = True,
    on_mismatch: OnMismatch = "error",
    cast: bool = False,
    missing: Missing = None,
    on_tied: OnTied = "error",
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = None,
) -> LoadReport:
    """Load the parameters and buffers of a layer, or the state of an optimizer.

    Names, shapes and types are compared before anything changes. A parameter that a layer has under two names stays
    one. The state of an optimizer is loaded whole: it is the source itself, or the only such state in the source. It is
    an error if it is not that of the optimizer's parameters, which Paddle finds out at the next step.

    Args:
        target: a layer or an optimizer.
        source: a checkpoint, any path that `varstore.read` opens, such as a ``.pdparams``, or a state dict.
        include, exclude, rename: choose and rename variables of the source; see `varstore.load`. For a layer in nested
            state, use ``include="model/*", rename={"model/": ""}``.
        use_structured_name: False takes the names of parameters, such as ``linear_0.w_0``, in place of those of
            ``state_dict``, as Paddle's ``set_state_dict`` does: for the parameters of a program.
        layer: for an optimizer, the layer that it trains. If parameters had other names when they were saved, as where
            a notebook makes a layer again, the names in the state are changed by it.
        strict: raise if the layer or the source has names that the other does not have.
        on_mismatch, cast, verify, threads, progress: see `varstore.load_into`.
        missing: patterns of names that the source need not have, as in ``missing="head.*"``; see `varstore.load_into`.
            With ``strict=False, missing="error"``, only the source may have other names.
        on_tied: see `varstore.load_into`; tied parameters come in the order of the layer.

    Raises:
        VariableMismatch: names do not fit with `strict` and `missing`, shapes or types differ, the values for tied
            parameters do, or nothing would be loaded. All that is wrong is listed, and nothing has changed.
        UsageError: the target is neither a layer nor an optimizer, or the source does not have one optimizer state.
        DigestMismatch, SizeMismatch: the values are not those that were saved.
        CheckpointNotFound, IncompleteCheckpoint: there is no checkpoint, or only an incomplete one.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import load_into, save
        >>> model = paddle.nn.Linear(2, 3)
        >>> checkpoint = save("before", {"model": model, "epoch": 3})
        >>> load_into(model, "before", include="model/*", rename={"model/": ""}).loaded
        ('weight', 'bias')
    """
    is_optimizer = isinstance(target, paddle.optimizer.Optimizer)
    if not is_optimizer and not isinstance(target, paddle.nn.Layer):
        raise UsageError(
            "not a layer or an optimizer",
            found=type(target).__name__,
            hint="for other objects, load the state and pass it to their method set_state_dict or load_state_dict",
        )
    if is_optimizer:
        live.refuse_choice(include, exclude, rename)

    def load_from(given: Mapping[str, Any]) -> LoadReport:
        if is_optimizer:
            options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
            return _load_into_optimizer(target, given, layer, **options)

        def selected_by(other: Rename | None) -> Mapping[str, str]:
            way = rename if other is None else other
            chosen = select(tuple(given), include=include, exclude=exclude, rename=way)
            if use_structured_name:
                return chosen
            known = _known_names(given)
            return {known.get(origin, name): origin for name, origin in chosen.items()}

        return fill_targets(
            {name if use_structured_name else tensor.name: _target(name, tensor) for name, tensor in own.items()},
            given,
            selected_by,
            Demands(strict=strict, missing=missing, on_mismatch=on_mismatch, cast=cast),
            on_tied=on_tied,
            verify=verify,
            threads=threads,
            progress=progress,
            target=type(target).__name__,
        )

    own = {} if is_optimizer else _tensors_of(target)
    return from_source(open_source(source), load_from)


def _known_names(given: Mapping[str, Any]) -> Mapping[str, str]:
    known = getattr(given, "attributes", {}).get(_NAMES, {})
    return {path: name for path, name in known.items() if isinstance(name, str)} if isinstance(known, dict) else {}


def _target(name: str, tensor: paddle.Tensor) -> LateTarget:
    held = as_source(tensor, variable=name)
    strides = np.empty(held.shape, held.dtype).strides
    return LateTarget(
        place=Place(("paddle", id(tensor)), 0, held.shape, strides, held.dtype),
        present=lambda: np.array(as_source(tensor, variable=name)),
        hand_over=lambda values: tensor.set_value(_tensor(values)),
    )


def _load_into_optimizer(
    optimizer: paddle.optimizer.Optimizer,
    given: Mapping[str, Any],
    layer: paddle.nn.Layer | None,
    **load_options: Unpack[LoadOptions],
) -> LoadReport:
    moved = {} if layer is None else _moved_names(layer, _known_names(given))
    beginnings = _Beginnings(optimizer, moved)

    def is_one(state: dict[str, Any]) -> bool:
        return any(key in _APART or beginnings.owner(key) for key in state)

    is_file = isinstance(given, Checkpoint | ForeignCheckpoint)
    is_state = not is_file and not any(isinstance(given[key], dict) for key in given if key not in _APART)
    state = given if is_state else live.optimizer_state(given, is_one, **load_options)
    return _set_state(optimizer, state, moved, getattr(given, "path", None) or type(given).__name__)


def _set_state(
    optimizer: paddle.optimizer.Optimizer, state: Mapping[str, Any], moved: Mapping[str, str], where: str
) -> LoadReport:
    """Give an optimizer a state in which the parameters that have moved get their new names, if it fits."""
    state = _with_tensors(_renumbered(optimizer, _renamed(state, _Beginnings(optimizer, moved), moved)))
    tensors = {name: value for name, value in leaves(state) if isinstance(value, paddle.Tensor)}
    wrong = _misfits(optimizer, tensors)
    follows = isinstance(optimizer._learning_rate, paddle.optimizer.lr.LRScheduler)
    if follows and "LR_Scheduler" not in state:
        wrong.append("LR_Scheduler: not in the state")
    if wrong:
        raise VariableMismatch(
            f"the state does not fit this {type(optimizer).__name__} and its parameters:",
            rows=shortened(wrong, _LINES),
            path=where,
            hint="if only the names of parameters differ, pass layer=, and a checkpoint that save of this module made",
        )
    optimizer.set_state_dict(state)
    unused = ("LR_Scheduler",) if "LR_Scheduler" in state and not follows else ()
    return LoadReport(source=where, target=type(optimizer).__name__, loaded=tuple(tensors), unused=unused)


class _Beginnings:
    """The names of an optimizer's parameters, and those that they had before: names in its state begin with them."""

    def __init__(self, optimizer: paddle.optimizer.Optimizer, moved: Iterable[str] = ()) -> None:
        groups = optimizer._parameter_list or []
        parts = (item["params"] if isinstance(item, dict) else [item] for item in groups)
        self._names = {*(parameter.name for parameters in parts for parameter in parameters), *moved}
        self._longest = min(max(map(len, self._names), default=0), _LONGEST_NAME)

    def owner(self, key: object) -> str:
        """Return the longest of them that a name begins with, up to a ``_`` or its end; empty text if there is none."""
        text = f"{key}_" if isinstance(key, str) else ""
        end = text.rfind("_", 0, self._longest + 1)
        while end >= 0 and text[:end] not in self._names:
            end = text.rfind("_", 0, end)
        return text[: max(end, 0)]


def _moved_names(layer: paddle.nn.Layer, known: Mapping[str, str]) -> dict[str, str]:
    """Return the new names of the layer's parameters by those with which they were saved."""
    tensors = _tensors_of(layer)
    depths = {name.count("/") for name in tensors}
    saved: dict[str, set[str]] = {}
    for path, old in known.items():
        for depth in depths:  # what a name may be the end of, after a slash
            saved.setdefault("/".join(path.rsplit("/", depth + 1)[-depth - 1 :]), set()).add(old)
    found = ((saved.get(name, set()), tensor.name) for name, tensor in tensors.items())
    return {next(iter(old)): new for old, new in found if len(old) == 1}


def _renamed(state: Mapping[str, Any], beginnings: _Beginnings, moved: Mapping[str, str]) -> dict[str, Any]:
    """Return an optimizer's state with other names of parameters at the beginnings of its keys."""
    renamed = {}
    for key, value in state.items():
        old = beginnings.owner(key)
        name = moved[old] + key.removeprefix(old) if old in moved else key
        renamed[name] = _renamed(value, beginnings, moved) if key == "master_weights" else value
    return renamed


def _renumbered(optimizer: paddle.optimizer.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the numbers that Paddle gives, or will give, to the names of its tensors.

    Those of the first optimizer of a parameter end with ``_0``, those of one that is made later with ``_1``.
    """
    counts = paddle.utils.unique_name.generate.__globals__["generator"].ids
    made = (name.rpartition("_") for name in optimizer.state_dict()) if optimizer._accumulators else ()
    numbers = {beginning: number for beginning, _, number in made}
    renumbered = {}
    for key, value in state.items():
        beginning, _, number = key.rpartition("_")
        new = numbers.get(beginning, number) if optimizer._accumulators else counts.get(beginning, 0)
        renumbered[f"{beginning}_{new}" if number.isdigit() else key] = value
    return renumbered


def _misfits(optimizer: paddle.optimizer.Optimizer, tensors: Mapping[str, paddle.Tensor]) -> list[str]:
    """Compare the tensors of a state with those of an optimizer, or with its parameters if it has not made a step."""
    made = optimizer.state_dict() if optimizer._accumulators else {}  # otherwise, it is what was loaded before
    own = {name: value for name, value in leaves(made) if isinstance(value, paddle.Tensor)}
    beginnings = _Beginnings(optimizer)
    wrong = [f"{name}: not in the state" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        if not beginnings.owner(name.removeprefix("master_weights/")) or (own and name not in own):
            wrong.append(f"{name}: the optimizer does not have it")
        elif own and list(tensor.shape) != list(own[name].shape):
            wrong.append(f"{name}: {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
    return wrong


class VarstoreCallback(paddle.callbacks.Callback):  # type: ignore[misc, unused-ignore]  # Any where Paddle is absent
    """Save a `paddle.Model` while `fit` runs: its network, its optimizer with the scheduler, and its gradient scaler.

    ::

        keeper = VarstoreCallback(CheckpointManager("run", keep=Latest(3)))
        done = keeper.resume(model)
        model.fit(data, epochs=10 - done, callbacks=[keeper])

    A step is saved just before the next batch or epoch begins or training ends. So the save has the metrics of an
    evaluation at its step, and what other callbacks did to the scheduler.

    An epoch that was interrupted begins again. Random states are not saved. `fit` shuffles a Dataset by the number of
    the epoch within its call: for the order of a run that was not interrupted, pass a DataLoader, and call
    ``set_epoch(done)`` of its sampler.

    Args:
        manager: which steps are saved and kept.
        each: what a step is: an "epoch", or a "batch".

    Raises:
        UsageError: `each` is neither.

    Example:
        >>> import paddle
        >>> from varstore.adapters.paddle import VarstoreCallback
        >>> model = paddle.Model(paddle.nn.Linear(2, 1))
        >>> model.prepare(paddle.optimizer.Adam(parameters=model.parameters()), paddle.nn.MSELoss())
        >>> batches = [[np.ones((4, 2), "f4"), np.ones((4, 1), "f4")]]
        >>> keeper = VarstoreCallback(vs.CheckpointManager("run", keep=vs.Latest(3)))
        >>> keeper.resume(model)
        0
        >>> model.fit(batches, epochs=2, verbose=0, callbacks=[keeper])
        >>> keeper.resume(model)
        2
    """

    def __init__(self, manager: CheckpointManager, *, each: Literal["epoch", "batch"] = "epoch") -> None:
        super().__init__()
        if each not in ("epoch", "batch"):
            raise UsageError("unknown mode", field="each", found=repr(each), expected="'epoch' or 'batch'")
        self.manager = manager
        self._each = each
        self._done = {"epoch": 0, "batch": 0}
        self._is_due = False
        self._metrics: dict[str, float] = {}

    def resume(self, model: paddle.Model) -> int:
        """Load the latest checkpoint into a prepared model, and return how many epochs it has behind it, or 0.

        Raises:
            UsageError: a `VarstoreCallback` did not save the latest checkpoint, or the model has no optimizer.
            VariableMismatch: the model is another one.
        """
        latest = self.manager.latest()
        if latest is None:
            return 0
        if model._optimizer is None:
            raise UsageError("the model is not prepared for training", hint="call its prepare with an optimizer first")
        with open_checkpoint(latest) as checkpoint:
            tree = checkpoint.tree
            if not isinstance(tree, dict) or tree.keys() - {"scaler"} != _PARTS:
                raise UsageError(
                    "VarstoreCallback did not save this checkpoint",
                    path=checkpoint.path,
                    hint="use a directory of its own for its CheckpointManager",
                )
            state = load(checkpoint, exclude="model/*")
            moved = _moved_names(model.network, _known_names(checkpoint))
            load_into(model.network, checkpoint, include="model/*", rename={"model/": ""})
            _set_state(model._optimizer, state["optimizer"], moved, checkpoint.path)
        scaler = getattr(model, "_scaler", None)  # there is none without mixed precision
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        self._done = state["done"]
        return int(self._done["epoch"])

    def on_train_batch_end(self, step: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Count the batch, and ask the manager whether to save it."""
        self._count("batch")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Count the epoch, and ask the manager whether to save it."""
        self._count("epoch")

    def on_eval_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Keep the metrics for the save of this step."""
        for name, value in (logs or {}).items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) == 1 and isinstance(numbers[0], int | float) and name not in ("step", "batch_size"):
                self._metrics[name] = float(numbers[0])

    def on_train_batch_begin(self, step: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due."""
        self._save()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due."""
        self._save()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Save if a save is due, and wait until everything is written."""
        self._save()
        self.manager.wait()

    def _count(self, what: str) -> None:
        self._done[what] += 1
        if what == self._each:
            self._is_due = self.manager.should_save(self._done[what])

    def _save(self) -> None:
        metrics, self._metrics = self._metrics, {}
        if not self._is_due:
            return
        self._is_due = False
        parts = {"model": self.model.network, "optimizer": self.model._optimizer, "done": dict(self._done)}
        if getattr(self.model, "_scaler", None) is not None:
            parts["scaler"] = self.model._scaler
        names = dict(_parameter_names(parts))
        self.manager.save(self._done[self._each], state_of(parts), metrics=metrics, attributes={_NAMES: names})
