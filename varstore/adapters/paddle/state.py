"""What the state of layers and optimizers of Paddle holds: tensors, and the names that they have besides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import paddle

from varstore import live
from varstore.errors import UnsupportedDtype
from varstore.values.arrays import as_source
from varstore.values.nodes import leaves, replaced

__all__ = ["NAMES", "known_names", "parameter_names", "state_of", "tensor_of", "tensors_of", "with_tensors"]

NAMES = "parameter_names"
"""The attribute of a checkpoint with the names that parameters have besides those of ``state_dict``."""


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


def parameter_names(state: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names in a checkpoint of tensors with other names in Paddle, and these names."""
    if isinstance(state, paddle.nn.Layer):
        program = _names_in_program(state)
        for name, tensor in tensors_of(state).items():
            yield prefix + name, program.get(name, tensor.name)
    elif type(state) in (dict, list):
        for key, item in state.items() if type(state) is dict else enumerate(state):
            yield from parameter_names(item, f"{prefix}{key}/")
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


def tensors_of(layer: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """Return the parameters and buffers of a layer by the names of its state dict."""
    return dict(layer.state_dict(use_hook=False))


def known_names(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the names in Paddle of the variables of a source, as far as it has them."""
    known = getattr(given, "attributes", {}).get(NAMES, {})
    return {path: name for path, name in known.items() if isinstance(name, str)} if isinstance(known, dict) else {}


def with_tensors(state: Any) -> Any:
    """Return nested state with Paddle's tensors for arrays; master weights are named as their accumulators say."""
    state = replaced(state, lambda leaf: tensor_of(leaf) if isinstance(leaf, np.ndarray) else leaf)
    for item in (state, *(state.values() if isinstance(state, dict) else ())):
        weights = item.get("master_weights") if isinstance(item, dict) else None
        for parameter, weight in weights.items() if isinstance(weights, dict) else ():
            name = re.compile(rf"{re.escape(parameter)}_fp32_master_\d+")
            found = next(filter(None, (name.match(key) for key in item if isinstance(key, str))), None)
            weight.name = found[0] if found else f"{parameter}_fp32_master_0"
    return state


def tensor_of(array: np.ndarray) -> paddle.Tensor:
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
