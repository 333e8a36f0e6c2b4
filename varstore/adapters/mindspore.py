"""MindSpore: checkpoints of `Model.train` by a callback, and checkpoints as Parameters.

Names are those of MindSpore's own callback and functions; each checkpoint is a directory, and its name has no suffix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import mindspore
import numpy as np
from mindspore.train.callback import Callback

from varstore import loading
from varstore.errors import UnsupportedDtype, UsageError
from varstore.interfaces.mindspore import CheckpointConfig, ModelCheckpoint as _Saver

__all__ = ["ModelCheckpoint", "load_checkpoint"]

_SETTINGS = ("save_checkpoint_steps", "save_checkpoint_seconds", "keep_checkpoint_max", "keep_checkpoint_per_n_minutes")
_UNKNOWN = ("enc_key", "append_dict", "remove_redundancy", "map_param_inc")


class ModelCheckpoint(Callback):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """Save the parameters of a network while `Model.train` runs; for its argument `callbacks`.

    Which steps are saved, under which names, and what is deleted is as with MindSpore's callback of this name. All
    parameters of the training network are saved, those of its optimizer too.

    Args:
        prefix: what the names of the checkpoints begin with. A second run in the same directory uses ``PREFIX_1``.
        directory: where the checkpoints are. Default: the working directory.
        config: a `CheckpointConfig` of varstore or of MindSpore. Default: `CheckpointConfig()`.

    Raises:
        UsageError: `prefix` is not a string, or contains ``/``; or MindSpore's configuration asks for something that
            varstore does not do, such as encryption.

    Example:
        >>> import mindspore
        >>> from varstore.adapters.mindspore import ModelCheckpoint
        >>> callback = ModelCheckpoint("lenet", "models", vs.CheckpointConfig(save_checkpoint_steps=100))
        >>> callback.latest_ckpt_file_name
        ''
    """

    def __init__(
        self,
        prefix: str = "CKP",
        directory: str | os.PathLike[str] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self._network = getattr(config, "saved_network", None)
        self._saver = _Saver(prefix, directory, _own_config(config))

    @property
    def latest_ckpt_file_name(self) -> str:
        """The path of the checkpoint that was saved last; empty before the first."""
        return self._saver.latest_ckpt_file_name

    def step_end(self, run_context: Any) -> None:
        """Save the parameters if the configuration says so."""
        about = run_context.original_args()
        network = self._network or about.train_network
        step = int((about.cur_step_num - 1) % about.batch_num + 1)
        parameters = {parameter.name: parameter for parameter in network.get_parameters()}
        self._saver.step_end(int(about.cur_epoch_num), step, parameters)

    def end(self, run_context: Any) -> None:  # noqa: ARG002  # as MindSpore calls it
        """Save the last step if it is not saved yet."""
        self._saver.end()


def _own_config(config: Any) -> CheckpointConfig | None:
    if config is None or isinstance(config, CheckpointConfig):
        return config
    if not isinstance(config, mindspore.train.CheckpointConfig):
        raise UsageError("must be a CheckpointConfig", field="config", found=type(config).__name__)
    for name in _UNKNOWN:
        if getattr(config, name, None):
            raise UsageError(
                f"varstore does not support {name} of MindSpore's CheckpointConfig",
                field="config",
                hint="leave it out, or use MindSpore's own ModelCheckpoint",
            )
    return CheckpointConfig(**{name: getattr(config, name) for name in _SETTINGS})


def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: str | Iterable[str] | None = None,
    specify_prefix: str | Iterable[str] | None = None,
    choice_func: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint as MindSpore's `load_checkpoint` does: Parameters by name, for its `load_param_into_net`.

    Args:
        ckpt_file_name: a checkpoint's directory, or any path that `varstore.read` opens, such as a ``.ckpt``.
        net: a Cell to copy the parameters into.
        strict_load, filter_prefix, specify_prefix, choice_func: see `varstore.load_checkpoint`.

    Raises:
        UsageError: the prefixes, or `choice_func`, leave nothing to load.
        UnsupportedDtype: MindSpore does not have the type of a variable.
        CheckpointNotFound, IncompleteCheckpoint, DigestMismatch, SizeMismatch: see `varstore.load`.

    Example:
        >>> from varstore.adapters.mindspore import load_checkpoint
        >>> checkpoint = vs.save("lenet", {"fc.bias": np.ones(3, np.float32)})
        >>> load_checkpoint("lenet")
        {'fc.bias': Parameter (name=fc.bias, shape=(3,), dtype=Float32, requires_grad=True)}
    """
    arrays = loading.load_checkpoint(ckpt_file_name, net, strict_load, filter_prefix, specify_prefix, choice_func)
    return {name: _parameter(name, values) for name, values in arrays.items()}


def _parameter(name: str, values: np.ndarray) -> Any:
    is_bfloat16 = values.dtype.name == "bfloat16"  # which numpy arrays of MindSpore cannot be
    try:
        tensor = mindspore.Tensor(values.astype(np.float32) if is_bfloat16 else values)
        parameter = mindspore.Parameter(tensor, name=name)
        if is_bfloat16:
            parameter.set_dtype(mindspore.bfloat16)
        return parameter
    except (TypeError, ValueError, RuntimeError, SystemError) as error:
        raise UnsupportedDtype(
            "MindSpore does not have this type",
            variable=name,
            found=f"dtype {values.dtype}",
            hint="varstore.load_checkpoint gives numpy arrays",
        ) from error
