"""Keep model variables on disk, one folder a variable: atomic, checked, linked, readable by hand."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from varstore import errors
from varstore.disk.read.checkpoint import Checkpoint
from varstore.disk.read.checkpoint import open_checkpoint as open
from varstore.disk.read.variable import Variable
from varstore.disk.save.staging import clean_staging as clean
from varstore.errors import VarstoreError
from varstore.interfaces.oneflow.dtypes import (
    bfloat16,
    bool,
    char,
    complex64,
    complex128,
    double,
    float,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)
from varstore.model.store import load, save
from varstore.version import __version__

if _TYPE_CHECKING:
    from varstore.disk.seal import seal
    from varstore.formats.verbs import convert, read, write
    from varstore.inspection.diff import DiffReport, diff
    from varstore.inspection.verify import VerifyReport, verify
    from varstore.interfaces.mindspore import (
        CheckpointConfig,
        ModelCheckpoint,
        load_checkpoint,
        load_param_into_net,
    )
    from varstore.interfaces.oneflow.checkpoint import checkpoint
    from varstore.interfaces.oneflow.initializers import (
        constant_initializer,
        glorot_normal_initializer,
        glorot_uniform_initializer,
        kaiming_initializer,
        ones_initializer,
        random_normal_initializer,
        random_uniform_initializer,
        truncated_normal,
        truncated_normal_initializer,
        variance_scaling_initializer,
        xavier_normal_initializer,
        xavier_uniform_initializer,
        zeros_initializer,
    )
    from varstore.interfaces.oneflow.session import (
        Session,
        clear_default_session,
        get_all_variables,
        get_variable,
        load_variables,
    )
    from varstore.model.into import load_into
    from varstore.model.report import LoadReport
    from varstore.training.background import PendingSave, save_async, save_state_async
    from varstore.training.manager import CheckpointManager
    from varstore.training.policies import (
        AtSteps,
        Best,
        EverySeconds,
        EverySteps,
        KeepEverySteps,
        KeepIf,
        Latest,
        OnePerMinutes,
        Pinned,
        SaveIf,
    )
    from varstore.training.state import load_state, save_state

__all__ = [
    "AtSteps",
    "Best",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointManager",
    "DiffReport",
    "EverySeconds",
    "EverySteps",
    "KeepEverySteps",
    "KeepIf",
    "Latest",
    "LoadReport",
    "ModelCheckpoint",
    "OnePerMinutes",
    "PendingSave",
    "Pinned",
    "SaveIf",
    "Session",
    "Variable",
    "VarstoreError",
    "VerifyReport",
    "__version__",
    "bfloat16",
    "bool",
    "char",
    "checkpoint",
    "clean",
    "clear_default_session",
    "complex128",
    "complex64",
    "constant_initializer",
    "convert",
    "diff",
    "double",
    "errors",
    "float",
    "float16",
    "float32",
    "float64",
    "get_all_variables",
    "get_variable",
    "glorot_normal_initializer",
    "glorot_uniform_initializer",
    "int16",
    "int32",
    "int64",
    "int8",
    "kaiming_initializer",
    "load",
    "load_checkpoint",
    "load_into",
    "load_param_into_net",
    "load_state",
    "load_variables",
    "ones_initializer",
    "open",
    "random_normal_initializer",
    "random_uniform_initializer",
    "read",
    "save",
    "save_async",
    "save_state",
    "save_state_async",
    "seal",
    "truncated_normal",
    "truncated_normal_initializer",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
    "variance_scaling_initializer",
    "verify",
    "write",
    "xavier_normal_initializer",
    "xavier_uniform_initializer",
    "zeros_initializer",
]

_LATER = {
    "varstore.disk.seal": "seal",
    "varstore.inspection.diff": "DiffReport diff",
    "varstore.inspection.verify": "VerifyReport verify",
    "varstore.interfaces.oneflow.checkpoint": "checkpoint",
    "varstore.interfaces.oneflow.initializers": (
        "constant_initializer glorot_normal_initializer glorot_uniform_initializer kaiming_initializer "
        "ones_initializer random_normal_initializer random_uniform_initializer truncated_normal "
        "truncated_normal_initializer variance_scaling_initializer xavier_normal_initializer "
        "xavier_uniform_initializer zeros_initializer"
    ),
    "varstore.model.into": "load_into",
    "varstore.model.report": "LoadReport",
    "varstore.interfaces.oneflow.session": (
        "Session clear_default_session get_all_variables get_variable load_variables"
    ),
    "varstore.formats.verbs": "convert read write",
    "varstore.training.background": "PendingSave save_async save_state_async",
    "varstore.training.manager": "CheckpointManager",
    "varstore.interfaces.mindspore": "CheckpointConfig ModelCheckpoint load_checkpoint load_param_into_net",
    "varstore.training.policies": (
        "AtSteps Best EverySeconds EverySteps KeepEverySteps KeepIf Latest OnePerMinutes Pinned SaveIf"
    ),
    "varstore.training.state": "load_state save_state",
}
"""Names that most programs do without: their modules are imported when one of them is first used."""

_MODULE_OF = {name: module for module, names in _LATER.items() for name in names.split()}


def __getattr__(name: str) -> _Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'varstore' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
