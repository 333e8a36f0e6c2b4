"""Saving and loading live objects of Paddle; see `varstore.adapters.paddle`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import paddle

from varstore import live
from varstore.adapters.paddle.optimizers import load_into_optimizer
from varstore.adapters.paddle.state import (
    NAMES,
    known_names,
    parameter_names,
    state_of,
    tensor_of,
    tensors_of,
    with_tensors,
)
from varstore.disk.progress import Progress
from varstore.disk.read.checkpoint import Checkpoint, retry_if_replaced
from varstore.errors import UsageError, VariableMismatch
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.verbs import open_source
from varstore.loading import load_state
from varstore.model.into import fill_targets, from_source
from varstore.model.match import Missing, OnMismatch, OnTied
from varstore.model.moves import LateTarget, Place
from varstore.model.options import LoadOptions, Path, StateOptions
from varstore.model.refusal import Demands
from varstore.model.report import LoadReport
from varstore.training.state import save_state
from varstore.values.arguments import checked
from varstore.values.arrays import as_source
from varstore.values.select import Patterns, Rename, select

__all__ = ["load", "load_into", "save"]


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
    attributes = {NAMES: names} if (names := dict(parameter_names(state))) else {}
    save_options["attributes"] = {**attributes, **(save_options.get("attributes") or {})}
    return save_state(path, state_of(state), **save_options)


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
        return with_tensors(load_state(opened, **choice, framework="numpy", **options))

    return load_from(source) if isinstance(source, ForeignCheckpoint) else retry_if_replaced(load_from, source)


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
    one. The state of an optimizer is loaded whole, without other options than `layer` and those of reading: it is the
    source itself, or the only such state in the source. It is an error if it is not that of the optimizer's parameters,
    which Paddle finds out at the next step.

    Args:
        target: a layer or an optimizer.
        source: a checkpoint, any path that `varstore.read` opens, such as a ``.pdparams``, or a state dict.
        include, exclude, rename, strict, on_mismatch, cast, missing, on_tied: see `varstore.load_into`. For a layer in
            nested state, use ``include="model/*", rename={"model/": ""}``. With ``strict=False, missing="error"``, only
            the source may have other names.
        use_structured_name: False takes the names of parameters, such as ``linear_0.w_0``, in place of those of
            ``state_dict``, as Paddle's ``set_state_dict`` does: for the parameters of a program. It is an error if two
            parameters have one such name, in the layer or in the source.
        layer: for an optimizer, the layer that it trains. If parameters had other names when they were saved, as where
            a notebook makes a layer again, the names in the state are changed by it.
        verify, threads, progress: see `varstore.load`.

    Raises:
        VariableMismatch: see `varstore.load_into`.
        UsageError: the target is neither a layer nor an optimizer, the source does not have one optimizer state, or an
            optimizer is given another option.
        DigestMismatch, SizeMismatch, CheckpointNotFound, IncompleteCheckpoint: see `varstore.load`.

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
        live.refuse_options(
            include=include,
            exclude=exclude,
            rename=rename,
            use_structured_name=use_structured_name,
            strict=strict,
            on_mismatch=on_mismatch,
            cast=cast,
            missing=missing,
            on_tied=on_tied,
        )

    def load_from(given: Mapping[str, Any]) -> LoadReport:
        if is_optimizer:
            options: LoadOptions = {"verify": verify, "threads": threads, "progress": progress}
            return load_into_optimizer(target, given, layer, **options)

        def selected_by(other: Rename | None) -> Mapping[str, str]:
            way = rename if other is None else other
            chosen = select(tuple(given), include=include, exclude=exclude, rename=way)
            return chosen if use_structured_name else _by_parameters(chosen, given)

        return fill_targets(
            {name: _target(name, tensor) for name, tensor in own.items()},
            given,
            selected_by,
            Demands(strict=strict, missing=missing, on_mismatch=on_mismatch, cast=cast),
            on_tied=on_tied,
            verify=verify,
            threads=threads,
            progress=progress,
            target=type(target).__name__,
        )

    own = {} if is_optimizer else tensors_of(target) if use_structured_name else _parameters_of(target)
    return from_source(open_source(source), load_from)


def _parameters_of(layer: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """Return the parameters and buffers of a layer by their names in Paddle."""
    own: dict[str, paddle.Tensor] = {}
    for tensor in tensors_of(layer).values():
        if own.setdefault(tensor.name, tensor) is not tensor:
            raise UsageError(
                "two parameters of the layer have one name",
                field="use_structured_name",
                found=repr(tensor.name),
                hint="leave out use_structured_name=False",
            )
    return own


def _by_parameters(chosen: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, str]:
    """Return chosen names of a source by the names in Paddle; a tied parameter has one of these, and one value."""
    known = known_names(given)
    origins: dict[str, str] = {}
    wrong = []
    for name, origin in chosen.items():
        parameter = known.get(origin, name)
        first = origins.setdefault(parameter, origin)
        if first != origin and not _are_equal(given[first], given[origin]):
            wrong.append(f"{parameter}: {first} and {origin}")
    if wrong:
        raise VariableMismatch(
            "different values in the source have one name of a parameter:",
            rows=wrong,
            path=getattr(given, "path", None),
            hint="leave out use_structured_name=False, or choose one of them with include=",
        )
    return origins


def _are_equal(*values: Any) -> bool:
    one, other = (np.asarray(as_source(v, variable="") if isinstance(v, paddle.Tensor) else v) for v in values)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _target(name: str, tensor: paddle.Tensor) -> LateTarget:
    held = as_source(tensor, variable=name)
    strides = np.empty(held.shape, held.dtype).strides
    return LateTarget(
        place=Place(("paddle", id(tensor)), 0, held.shape, strides, held.dtype),
        present=lambda: np.array(as_source(tensor, variable=name)),
        hand_over=lambda values: tensor.set_value(tensor_of(values)),
    )
