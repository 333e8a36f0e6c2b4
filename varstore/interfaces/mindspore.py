"""MindSpore's checkpoint interface, with its exact semantics (mindspore/train/callback/_checkpoint.py, 2.10).

Two things differ. A checkpoint is a directory ``PREFIX-EPOCH_STEP`` in place of a file of that name. And the checkpoint
that has to go is deleted after the new one is complete, not before.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from varstore.disk.save.leftovers import clean_staging, discard
from varstore.errors import UsageError, VariableMismatch, VarstoreError
from varstore.model.into import check_targets
from varstore.model.store import save
from varstore.storage.appearing import make_folders
from varstore.storage.failures import translated
from varstore.training.series import KEY, open_step, time_of
from varstore.values.arguments import check_names, checked
from varstore.values.arrays import as_source

__all__ = ["CheckpointConfig", "ModelCheckpoint", "chosen_names", "load_param_into_net"]

_log = logging.getLogger("varstore")
_MINUTE = 60
_FLOATS = {"float16", "float32", "float64", "bfloat16"}
_INTS = {"int8", "int16", "int32", "int64"}


class WrongType(UsageError, TypeError):
    """An argument has the wrong type; MindSpore raises a TypeError."""


class CheckpointConfig:
    """Settings of `ModelCheckpoint`: when it saves, and how many checkpoints it keeps.

    None is the same as 0, which switches a setting off. If steps and seconds are both set, steps count; if the maximum
    and minutes are both set, the maximum counts. If neither steps nor seconds are set, nothing is saved; if neither the
    maximum nor minutes are set, one checkpoint is kept.

    Args:
        save_checkpoint_steps: save when this many steps have passed since the last save, and at the end.
        save_checkpoint_seconds: save when more than this many seconds have passed, and at the end.
        keep_checkpoint_max: keep this many checkpoints, the newest.
        keep_checkpoint_per_n_minutes: keep the oldest checkpoint of each window of this many minutes.

    Raises:
        UsageError: all are None or 0, or one is negative or not an int.

    Example:
        >>> vs.CheckpointConfig(save_checkpoint_steps=100, keep_checkpoint_max=3).get_checkpoint_policy()
        {'save_checkpoint_steps': 100, 'save_checkpoint_seconds': None, 'keep_checkpoint_max': 3, ...}
    """

    def __init__(
        self,
        save_checkpoint_steps: int | None = 1,
        save_checkpoint_seconds: int | None = 0,
        keep_checkpoint_max: int | None = 5,
        keep_checkpoint_per_n_minutes: int | None = 0,
    ) -> None:
        given = {
            "save_checkpoint_steps": save_checkpoint_steps,
            "save_checkpoint_seconds": save_checkpoint_seconds,
            "keep_checkpoint_max": keep_checkpoint_max,
            "keep_checkpoint_per_n_minutes": keep_checkpoint_per_n_minutes,
        }
        for name, value in given.items():
            _check_number(name, value)
        if not any(given.values()):
            raise UsageError("all settings are None or 0", field="CheckpointConfig", hint="set at least one")
        self.save_checkpoint_steps = save_checkpoint_steps
        self.save_checkpoint_seconds = None if save_checkpoint_steps else save_checkpoint_seconds
        self.keep_checkpoint_max = keep_checkpoint_max
        self.keep_checkpoint_per_n_minutes = None if keep_checkpoint_max else keep_checkpoint_per_n_minutes
        if not keep_checkpoint_max and not keep_checkpoint_per_n_minutes:
            self.keep_checkpoint_max = 1

    def get_checkpoint_policy(self) -> dict[str, int | None]:
        """Return the settings that count, by name."""
        return dict(vars(self))


def _check_number(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise WrongType("must be an int or None", field=name, found=repr(value))
    if value < 0:
        raise UsageError("must not be negative", field=name, found=value)


class ModelCheckpoint:
    """Save the variables of a training loop: call `begin`, `step_end` after each step, and `end`.

    A second run with the same prefix in the same directory saves as ``PREFIX_1-…``, a third as ``PREFIX_2-…``.

    Args:
        prefix: what the names of the checkpoints begin with.
        directory: where the checkpoints are. Default: the working directory.
        config: default `CheckpointConfig()`.
        clock: a function that returns the time in seconds since the epoch.

    Raises:
        UsageError: `prefix` is not a string, or contains ``/``; `config` is not a `CheckpointConfig`.

    Example:
        >>> callback = vs.ModelCheckpoint("lenet", "models", vs.CheckpointConfig(2, keep_checkpoint_max=1))
        >>> for step in range(1, 6):
        ...     callback.step_end(epoch=1, step=step, variables={"bias": np.full(3, step)})
        >>> callback.end()
        >>> vs.load_checkpoint("models/lenet-1_5")
        {'bias': array([5, 5, 5])}
    """

    @checked
    def __init__(
        self,
        prefix: str = "CKP",
        directory: str | os.PathLike[str] | None = None,
        config: CheckpointConfig | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(prefix, str) or "/" in prefix:
            raise UsageError("must be a string without '/'", field="prefix", found=repr(prefix))
        if config is not None and not isinstance(config, CheckpointConfig):
            raise WrongType("must be a CheckpointConfig", field="config", found=type(config).__name__)
        self._directory = os.path.abspath(os.curdir if directory is None else directory)
        with translated(self._directory, "the directory cannot be created or read"):
            make_folders(self._directory)
            clean_staging(self._directory)
            self._prefix = _free_prefix(self._directory, prefix)
        self._config = config or CheckpointConfig()
        self._clock = clock
        self._last_time = self._last_time_for_keep = clock()
        self._last_triggered_step = 0
        self._latest = ""
        self._saved: list[str] = []
        self.begin()

    @property
    def latest_ckpt_file_name(self) -> str:
        """The path of the checkpoint that was saved last; empty before the first."""
        return self._latest

    def begin(self) -> None:
        """Start a run: its steps count from one."""
        self._steps = 0
        self._epoch_and_step = (0, 0)
        self._variables: Mapping[str, Any] = {}

    @checked
    def step_end(self, epoch: int, step: int, variables: Mapping[str, Any]) -> None:
        """Save the variables if the settings say so.

        Args:
            epoch: the number of the epoch, from one; part of the checkpoint's name.
            step: the number of the step in its epoch, from one; part of the checkpoint's name.
            variables: as for `varstore.save`. `end` saves those of the last call.
        """
        if (epoch, step) != self._epoch_and_step:
            earlier = self._epoch_and_step[1]
            self._steps += step - earlier if step > earlier else step
        self._epoch_and_step, self._variables = (epoch, step), variables
        self._save(is_last=False)

    def end(self) -> None:
        """Save the last step if it is not saved yet; nothing if neither steps nor seconds are set."""
        self._save(is_last=True)

    def _save(self, *, is_last: bool) -> None:
        if self._steps == self._last_triggered_step or not self._is_due(is_last):
            return
        epoch, step = self._epoch_and_step
        path = os.path.join(self._directory, f"{self._prefix}-{epoch}_{step}")
        unwanted = self._unwanted()
        now = self._clock()
        attributes = {KEY: {"epoch": epoch, "step": step, "time": now}}
        save(path, self._variables, attributes=attributes, overwrite=True, foreign="keep")
        self._saved = [*(earlier for earlier in self._saved if earlier != path), path]
        for old in unwanted:
            if old != path:
                with translated(old, "the checkpoint cannot be deleted"):
                    discard(old)
                _log.info("deleted %s: %s", old, self._config.get_checkpoint_policy())
        self._last_time_for_keep = now
        self._last_triggered_step = self._steps
        self._latest = path

    def _is_due(self, is_last: bool) -> bool:
        if self._config.save_checkpoint_steps:
            return is_last or self._steps >= self._last_triggered_step + self._config.save_checkpoint_steps
        if self._config.save_checkpoint_seconds:
            now = self._clock()
            if is_last or not 0 <= now - self._last_time <= self._config.save_checkpoint_seconds:  # a clock may be set
                self._last_time = now
                return True
        return False

    def _unwanted(self) -> list[str]:
        """Return what is deleted after the new one is complete: the oldest, or all but the oldest of the window.

        Of what this callback saved, the order is that of its saves, because a clock may be set in between.
        """
        times = self._present()
        order = {path: place for place, path in enumerate(self._saved)}
        by_age = sorted(times, key=lambda path: (order.get(path, -1), times[path]))
        if self._config.keep_checkpoint_max:
            return by_age[:1] if len(by_age) >= self._config.keep_checkpoint_max else []
        now = self._clock()
        window = (self._config.keep_checkpoint_per_n_minutes or 0) * _MINUTE
        if not 0 <= now - self._last_time_for_keep < window:
            return []
        return [path for path in by_age if 0 <= now - times[path] < window][1:]

    def _present(self) -> dict[str, float]:
        present = {}
        with translated(self._directory, "the directory cannot be read"):
            names = os.listdir(self._directory)
        for name in names:
            numbers = name.removeprefix(self._prefix + "-")
            if numbers == name or any(map(str.isalpha, numbers)):
                continue
            try:
                with open_step(os.path.join(self._directory, name)) as checkpoint:
                    present[checkpoint.path] = time_of(checkpoint)
            except VarstoreError:  # not a whole checkpoint, so it neither counts nor is deleted
                continue
        return present


def _free_prefix(directory: str, prefix: str) -> str:
    """Return the prefix, with the next number if names begin with it, exactly as MindSpore does."""
    number = 0
    for name in os.listdir(directory):
        rest = name[len(prefix) :]
        if not name.startswith(prefix) or rest[:1].isalpha():
            continue
        dash = rest.find("-")
        if dash == 0:
            number = max(number, 1)
        elif rest[1 : max(dash, 0)].isdigit():
            number = max(number, int(rest[1:dash]) + 1)
    return f"{prefix}_{number}" if number else prefix


def chosen_names(
    names: Iterable[str],
    *,
    path: str,
    filter_prefix: str | Iterable[str] | None = None,
    specify_prefix: str | Iterable[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
) -> list[str]:
    """Return the names that `varstore.load_checkpoint` loads.

    Raises:
        UsageError: nothing is left, or a prefix is not a non-empty string.
    """
    specify, filtered = _prefixes(specify_prefix), _prefixes(filter_prefix)
    chosen = [
        name
        for name in names
        if (not specify or name.startswith(specify)) and not (filtered and name.startswith(filtered))
    ]
    if choice_func is not None and specify_prefix is None and filter_prefix is None:
        chosen = [name for name in chosen if choice_func(name)]
    if not chosen:
        raise UsageError("nothing is left to load", path=path, hint="check the prefixes or choice_func")
    return chosen


def _prefixes(given: str | Iterable[str] | None) -> tuple[str, ...]:
    prefixes = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
    if given is not None and not (prefixes and all(isinstance(prefix, str) and prefix for prefix in prefixes)):
        raise UsageError("a prefix must be a non-empty string or several of them", found=repr(given))
    return prefixes


@checked
def load_param_into_net(
    net: Any, parameter_dict: Mapping[str, Any], strict_load: bool = False
) -> tuple[list[str], list[str]]:
    """Copy parameters into a network in place, and return the names that were not loaded.

    Args:
        net: a dict of writeable arrays by name, or a MindSpore Cell.
        parameter_dict: arrays by name.
        strict_load: False converts values among floating types and among signed integers. It also finds a parameter of
            the net under a longer name, that is with a prefix, as MindSpore does.

    Returns:
        The names of the net that were not loaded, and the names of `parameter_dict` that are not in the net. As in
        MindSpore, names that were loaded by way of a prefix are among the latter.

    Raises:
        VariableMismatch: shapes or types differ; nothing has changed.

    Example:
        >>> net = {"conv1.bias": np.zeros(2), "fc.bias": np.zeros(2)}
        >>> vs.load_param_into_net(net, {"network.conv1.bias": np.ones(2)})
        (['fc.bias'], ['network.conv1.bias'])
        >>> net["conv1.bias"]
        array([1., 1.])
    """
    check_names(parameter_dict, "parameter_dict")
    targets = _targets(net)
    pairs = {name: name for name in targets if name in parameter_dict}
    missing = [name for name in targets if name not in pairs]
    unused = [name for name in parameter_dict if name not in pairs]
    if not strict_load:
        while prefix := _missing_prefix(missing, parameter_dict):
            found = [name for name in missing if prefix + name in parameter_dict]
            pairs.update((name, prefix + name) for name in found)
            missing = [name for name in missing if name not in pairs]
    fitting = {
        name: _fitting(name, np.asarray(parameter_dict[source]), targets[name][0], strict_load)
        for name, source in pairs.items()
    }
    for name, values in fitting.items():
        targets[name][1](values)
    return missing, unused


def _missing_prefix(missing: list[str], parameter_dict: Mapping[str, Any]) -> str:
    for name in missing:
        for longer in parameter_dict:
            if longer.endswith(name):
                return longer.removesuffix(name)
    return ""


def _targets(net: Any) -> dict[str, tuple[Any, Callable[[np.ndarray], None]]]:
    """Return for each parameter an object with its shape and dtype, and a function that sets it."""
    if isinstance(net, Mapping):
        check_targets(net, "net")
        return {name: (array, _setter(array)) for name, array in net.items()}
    if hasattr(net, "parameters_and_names"):
        return {
            parameter.name: (as_source(parameter, variable=parameter.name), _cell_setter(parameter))
            for _, parameter in net.parameters_and_names()
        }
    raise WrongType(
        "not a network",
        found=type(net).__name__,
        expected="a dict of arrays, or a MindSpore Cell",
        hint="varstore.adapters.torch.load_into loads into modules of torch",
    )


def _setter(array: np.ndarray) -> Callable[[np.ndarray], None]:
    return lambda values: np.copyto(array, values)


def _cell_setter(parameter: Any) -> Callable[[np.ndarray], None]:
    tensor = type(parameter.data)

    def set_values(values: np.ndarray) -> None:
        is_bfloat16 = values.dtype.name == "bfloat16"  # which MindSpore takes by way of float32 only
        parameter.set_data(tensor(values.astype(np.float32)).astype(parameter.dtype) if is_bfloat16 else tensor(values))

    return set_values


def _fitting(name: str, values: np.ndarray, target: Any, strict: bool) -> np.ndarray:
    shape, dtype = tuple(target.shape), np.dtype(target.dtype)
    extra = values.shape[len(shape) :]
    if values.shape != shape and not (extra and set(extra) == {1}):
        raise VariableMismatch("the shapes differ", variable=name, found=values.shape, expected=shape)
    convertible = any({values.dtype.name, dtype.name} <= kind for kind in (_FLOATS, _INTS))
    if values.dtype != dtype and (strict or not convertible):
        raise VariableMismatch("the types differ", variable=name, found=values.dtype, expected=dtype)
    return values.reshape(shape).astype(dtype, copy=False)
