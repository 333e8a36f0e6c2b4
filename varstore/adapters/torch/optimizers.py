"""Load into optimizers: a state that fits the optimizer and its parameters, or an error before anything changes.

``load_state_dict`` of torch's optimizers takes any state with as many parameters. One of another class, or of other
shapes, fails at the next step or gives wrong values. What an optimizer would have is found out by a step of a copy of
it with a parameter of the same shape on the meta device, where nothing is computed.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch

from varstore.errors import VariableMismatch
from varstore.live import optimizer_state
from varstore.model.options import LoadOptions
from varstore.model.report import LoadReport
from varstore.text.hints import listed, shortened
from varstore.values.nodes import leaves

__all__ = ["load_into_optimizer"]

Shape: TypeAlias = tuple[int, ...]
Known: TypeAlias = Mapping[str, Shape | None]
"""What an optimizer has for a parameter: the shape of each tensor, and None for what may have any or none."""

_RICHEST = {"momentum": 0.9, "amsgrad": True, "centered": True}
"""Options with which an optimizer has the most state: one that was turned off leaves its state behind."""
_SIMPLEST = {"foreach": False, "fused": False, "capturable": False, "differentiable": False, "lr": 0.1}
_LBFGS = ("func_evals", "n_iter", "t", "old_dirs", "old_stps", "ro", "al", "H_diag", "prev_loss")
"""What LBFGS has beside its two flat vectors: it cannot make a step without values."""
_LINES = 10


def load_into_optimizer(
    optimizer: torch.optim.Optimizer, given: Mapping[str, Any], **load_options: Unpack[LoadOptions]
) -> LoadReport:
    """Load the only optimizer's state of a checkpoint or of nested state; see `varstore.adapters.torch.load_into`."""
    path = getattr(given, "path", None)  # of a checkpoint or a file
    where = path or type(given).__name__
    state = optimizer_state(given, {"state", "param_groups"}.issubset, framework="torch", **load_options)
    loaded = tuple(name for name, leaf in leaves(state) if isinstance(leaf, torch.Tensor))
    if _loads_plainly(optimizer):
        _check(optimizer, state, where)
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise _refusal(f": {error}", where) from error
    return LoadReport(source=where, target=type(optimizer).__name__, loaded=loaded)


def _loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    loader = getattr(optimizer.load_state_dict, "__func__", None)
    return loader is torch.optim.Optimizer.load_state_dict and not optimizer._optimizer_load_state_dict_pre_hooks


def _check(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], where: str) -> None:
    """Compare the names and shapes of a state with those that the optimizer would have for its parameters.

    Raises:
        VariableMismatch: the groups differ, or something in the state does not fit; lists it.
    """
    try:
        groups = [{**group, "params": list(group["params"])} for group in state["param_groups"]]
        saved = [(key, dict(state["state"].get(key) or {})) for group in groups for key in group["params"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal(f": {type(error).__name__}: {error}", where) from error
    sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if sizes != own_sizes:
        raise _refusal(f": groups of {sizes} parameters, for those of {own_sizes}", where)
    own = [(at, parameter) for at, group in enumerate(optimizer.param_groups) for parameter in group["params"]]
    alike = _names_with_the_parameters_shape(saved, [parameter for _, parameter in own])
    expected: dict[Any, _Expected] = {}
    wrong: dict[str, None] = {}
    for (key, values), (at, parameter) in zip(saved, own, strict=True):
        kind = (at, parameter.shape, parameter.dtype)
        if kind not in expected:
            expected[kind] = _expected(optimizer, optimizer.param_groups[at], groups[at], parameter)
        found = expected[kind]
        known = {**found.possible, **_shapes(optimizer.state.get(parameter, {}))}
        strange = [str(name) for name, value in values.items() if value is not None and known and name not in known]
        lacking = [name for name in found.always if values and name not in values]
        if found.option:
            wrong[f"param_groups/{at}: without {found.option!r}"] = None
        if strange:
            wrong[f"state/{key}: {type(optimizer).__name__} does not have {listed(strange)}"] = None
        if lacking:
            wrong[f"state/{key}: without {listed(lacking)}"] = None
        for name, value in values.items():
            shape = known.get(name, tuple(parameter.shape) if not known and name in alike else None)
            if shape is not None and isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
                wrong[f"state/{key}/{name}: {tuple(value.shape)} -> {shape}"] = None
    if wrong:
        raise _refusal(":", where, shortened(list(wrong), _LINES))


class _Expected(NamedTuple):
    """What an optimizer may have for a parameter, what it has always, and an option that its group is without."""

    possible: Known
    always: Known
    option: str


def _expected(
    optimizer: torch.optim.Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any], parameter: torch.Tensor
) -> _Expected:
    """Return what fits a parameter: with the options as they were saved, and with those that make the most state.

    Only torch's own code is run, as a step of anybody's may do anything, such as wait for other processes. Of another
    optimizer nothing is known.
    """
    step = inspect.unwrap(type(optimizer).step)
    if not step.__module__.startswith("torch.optim."):
        return _Expected({}, {}, "")
    if step is inspect.unwrap(torch.optim.LBFGS.step):
        flat = (sum(one.numel() * (2 if one.is_complex() else 1) for one in optimizer.param_groups[0]["params"]),)
        return _Expected({**dict.fromkeys(_LBFGS), "d": flat, "prev_flat_grad": flat}, {}, "")
    richest = {name: value for name, value in _RICHEST.items() if name in own}
    possible, _ = _stepped(optimizer, {**own, **richest}, parameter)
    always, error = _stepped(optimizer, saved, parameter)
    option = error.args[0] if isinstance(error, KeyError) and error.args[0] in optimizer.defaults.keys() - saved else ""
    return _Expected({**possible, **always}, always, option)


def _stepped(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: torch.Tensor
) -> tuple[Known, Exception | None]:
    """Return what an optimizer of this class has after a step with these options, and what it failed with.

    What needs values fails on the meta device, after it has made its state.
    """
    kind: Any = type(optimizer)
    stand_in = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    layout = torch.sparse_coo if isinstance(optimizer, torch.optim.SparseAdam) else torch.strided
    stand_in.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta", layout=layout)
    simple = {name: value for name, value in _SIMPLEST.items() if name in group}
    probe = kind.__new__(kind)
    failure = None
    try:
        probe.__setstate__(
            {"defaults": {}, "state": defaultdict(dict), "param_groups": [{**group, **simple, "params": [stand_in]}]}
        )
        with torch.no_grad():
            inspect.unwrap(kind.step)(probe)
    except Exception as error:
        failure = error
    return _shapes(probe.state.get(stand_in, {})), failure


def _shapes(values: Mapping[str, Any]) -> Known:
    return {name: tuple(item.shape) if isinstance(item, torch.Tensor) else None for name, item in values.items()}


def _names_with_the_parameters_shape(
    saved: list[tuple[Any, dict[str, Any]]], parameters: list[torch.Tensor]
) -> set[str]:
    """Return the names that have the shape of some parameter whose extents differ: it is not by chance.

    So a state with one layer of another shape is told, of whatever optimizer, and statistics of other shapes by design
    are not.
    """
    return {
        name
        for (_, values), parameter in zip(saved, parameters, strict=True)
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
        and value.shape == parameter.shape
        and 1 < len(set(parameter.shape)) == parameter.ndim
    }


def _refusal(what: str, where: str, rows: Iterable[str] = ()) -> VariableMismatch:
    return VariableMismatch(
        f"the state is that of another optimizer, or of other parameters{what}",
        rows=rows,
        path=where,
        hint="create an optimizer of the class that was saved, with the same parameters and groups",
    )
