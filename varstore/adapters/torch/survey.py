"""What ``load_state_dict`` takes of a module, and where that is more than copying into memory.

``load_state_dict`` calls code: hooks before and after, ``_load_from_state_dict``, ``set_extra_state``. What such code
sees or changes has to come in a state dict. Everything else can be read straight into the memory of a parameter or
buffer, with the same result and without a second copy of the values: where the module loads as `torch.nn.Module` does,
neither it nor a module around it has a hook before loading, and ``state_dict`` shows the parameter's own memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from varstore.errors import UnsupportedDtype
from varstore.model.match import Spec
from varstore.model.moves import Place
from varstore.values.arrays import as_source

__all__ = ["EXTRA_STATE", "Member", "Survey", "place_of_tensor", "spec_of_tensor", "survey"]

EXTRA_STATE = "_extra_state"
"""The name that torch gives to what ``get_extra_state`` returns."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_VERSION_WITH_COUNT = 2  # of batch normalisation: from then on, num_batches_tracked is saved


@dataclass(kw_only=True, slots=True)
class Member:
    """One name of a module's state: its parameter or buffer (`own`), and what ``state_dict`` gives for it (`shown`).

    `own_spec` and `shown_spec` are the shapes and types of those that are plain tensors. With `is_custom`, code of the
    module sees the values; with `is_late`, it has a say in whether the name is missing. With `is_filled`, the values
    come to lie in the memory of `own`; with `is_direct`, copying them there is all that ``load_state_dict`` would do,
    and `shown` has the same memory. With `is_on_meta`, it would do nothing: there is no memory.
    """

    own: torch.Tensor | None
    shown: Any
    own_spec: Spec | None = None
    shown_spec: Spec | None = None
    is_custom: bool
    is_late: bool
    is_direct: bool = False
    is_filled: bool = False
    is_on_meta: bool = False

    @property
    def is_opaque(self) -> bool:
        """Whether a value of any kind is taken: for extra state, and for what is not a tensor."""
        return self.own is None and not isinstance(self.shown, torch.Tensor)


@dataclass(kw_only=True, slots=True)
class Survey:
    """All names that a module takes, and the code that it runs when it loads.

    Below the prefixes of `custom`, code of the module sees the values, and may take other names, shapes and types.
    Below those of `late`, it has a say in what is missing or unexpected, when all is loaded. The names in `optional`
    need not be there. `has_code` is False where copying is all that there is to do; with `has_own_verb`,
    ``load_state_dict`` itself is not torch's.
    """

    members: dict[str, Member] = field(default_factory=dict)
    custom: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    optional: set[str] = field(default_factory=set)
    has_code: bool = False
    has_own_verb: bool = False

    def is_custom(self, name: str) -> bool:
        """Tell whether code of the module sees what is loaded under a name."""
        member = self.members.get(name)
        return name.startswith(tuple(self.custom)) if member is None else member.is_custom

    def is_late(self, name: str) -> bool:
        """Tell whether the module has a say in whether a name is missing or unexpected."""
        member = self.members.get(name)
        return name.startswith(tuple(self.late)) if member is None else member.is_late


def survey(module: torch.nn.Module, metadata: Mapping[str, Any], *, assign: bool) -> Survey:
    """Look at a module and all modules in it; `metadata` holds the versions of the modules that were saved."""
    shown: Mapping[str, Any] = module.state_dict()
    has_own_verb = getattr(module.load_state_dict, "__func__", None) is not torch.nn.Module.load_state_dict
    replaces = assign or torch.__future__.get_swap_module_params_on_conversion()
    found = Survey(has_code=has_own_verb or replaces, has_own_verb=has_own_verb)
    for prefix, part, is_custom in _parts(module, is_custom=has_own_verb):
        is_late = is_custom or bool(part._load_state_dict_post_hooks) or found.is_late(prefix)
        takes_extra = type(part).set_extra_state is not torch.nn.Module.set_extra_state
        found.has_code |= is_late or takes_extra
        if is_custom and not found.is_custom(prefix):
            found.custom.append(prefix)
        if is_late and not found.is_late(prefix):
            found.late.append(prefix)
        member = partial(Member, is_custom=is_custom, is_late=is_late)
        for name, own in _own_tensors(part, prefix):
            given, spec = shown.get(name), spec_of_tensor(own)
            is_shown = spec is not None and _is_same_memory(own, given)
            found.members[name] = member(
                own=own,
                shown=given,
                own_spec=spec,
                shown_spec=spec if is_shown else spec_of_tensor(given),
                is_direct=is_shown and not is_custom and not replaces and _is_plain(own),
                is_filled=(is_shown or not is_custom) and (assign or not own.is_meta),
                is_on_meta=own.is_meta and not assign and _loads_plainly(part),
            )
        if takes_extra:
            extra = shown.get(prefix + EXTRA_STATE)
            found.members[prefix + EXTRA_STATE] = member(own=None, shown=extra, shown_spec=spec_of_tensor(extra))
        version = metadata.get(prefix[:-1], {}).get("version")
        if isinstance(part, _NormBase) and part.track_running_stats and (version or 0) < _VERSION_WITH_COUNT:
            found.optional.add(f"{prefix}num_batches_tracked")
    for name, value in shown.items():
        if name not in found.members and found.is_custom(name):
            found.members[name] = Member(
                own=None, shown=value, shown_spec=spec_of_tensor(value), is_custom=True, is_late=True
            )
    return found


def spec_of_tensor(tensor: Any) -> Spec | None:
    """Return the shape and type of a tensor; None for what is not a plain tensor, or has no type that numpy has."""
    if not isinstance(tensor, torch.Tensor) or torch.nn.parameter.is_lazy(tensor):
        return None
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    dtype = _numpy_type(tensor.dtype)
    return None if dtype is None else (tuple(tensor.shape), dtype)


@cache
def _numpy_type(dtype: torch.dtype) -> np.dtype[Any] | None:
    try:
        return as_source(torch.empty(0, dtype=dtype), variable="").dtype
    except UnsupportedDtype:
        return None


_device_name = cache(str)


def place_of_tensor(tensor: torch.Tensor, spec: Spec, *, assign: bool) -> Place:
    """Return the memory that a tensor's values come to; with `assign`, that of the tensor in its place."""
    shape, dtype = spec
    memory, address = (
        (_device_name(tensor.device), tensor.data_ptr()) if not assign else (("in place of", id(tensor)), 0)
    )
    strides = torch.empty(shape, device="meta").stride() if assign else tensor.stride()
    return Place(memory, address, shape, tuple(stride * dtype.itemsize for stride in strides), dtype)


def _parts(part: torch.nn.Module, prefix: str = "", *, is_custom: bool) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Yield each module with its prefix, and whether its own code or that of one around it sees the values.

    A module that stands in two places is yielded twice, as ``load_state_dict`` visits it.
    """
    is_custom = is_custom or bool(part._load_state_dict_pre_hooks) or not _loads_plainly(part)
    yield prefix, part, is_custom
    for name, child in part._modules.items():
        if child is not None:
            yield from _parts(child, f"{prefix}{name}.", is_custom=is_custom)


def _loads_plainly(part: torch.nn.Module) -> bool:
    """Tell whether a module itself only copies; batch normalisation also does without num_batches_tracked."""
    loader = getattr(part._load_from_state_dict, "__func__", None)
    return loader in (torch.nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)


def _own_tensors(part: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    persistent = ((name, item) for name, item in part._buffers.items() if name not in part._non_persistent_buffers_set)
    for name, item in itertools.chain(part._parameters.items(), persistent):
        if item is not None:
            yield prefix + name, item


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and not tensor.is_meta


def _is_same_memory(own: torch.Tensor, shown: Any) -> bool:
    """Tell whether a strided tensor is shown as it is; torch compares plain ones of real numbers in one call."""
    if not isinstance(shown, torch.Tensor) or shown.layout is not torch.strided or own.dtype is not shown.dtype:
        return False
    is_plain = type(own) in _PLAIN and type(shown) in _PLAIN and own.is_cpu and shown.is_cpu
    if is_plain and not own.is_complex() and not own.is_neg():
        return bool(own.is_set_to(shown))
    return (
        (type(shown) in _PLAIN or spec_of_tensor(shown) is not None)
        and own.data_ptr() == shown.data_ptr()
        and own.shape == shown.shape
        and own.stride() == shown.stride()
        and own.device == shown.device
        and (own.is_conj(), own.is_neg()) == (shown.is_conj(), shown.is_neg())
    )
