"""The names of the face: where each is defined, and what ``import *`` gives.

Type checkers read this file, and ``__init__.py`` reads it to import each name at its first use. ``bool``, ``float``
and ``open`` are public but not in ``__all__``, so that ``import *`` replaces nothing of Python's own.
"""

from varstore import errors
from varstore.bundles.export import export
from varstore.bundles.together import bundle
from varstore.disk.read.attached import AttachedFile
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.variable import Variable
from varstore.disk.relink import LinksReport, links
from varstore.disk.save.leftovers import clean_staging as clean
from varstore.disk.seal import seal
from varstore.errors import VarstoreError
from varstore.formats.verbs import (
    convert,
    read,
    write,
)
from varstore.inspection.diff import (
    DiffReport,
    Movement,
    diff,
)
from varstore.inspection.history import History, history
from varstore.inspection.merge import merge
from varstore.inspection.salvage import SalvageReport, salvage
from varstore.inspection.stats import (
    Statistics,
    StatsReport,
    stats,
)
from varstore.inspection.steps import RunStep, RunSteps, steps
from varstore.inspection.storage import check_storage
from varstore.inspection.verify import (
    VerifyReport,
    verify,
)
from varstore.interfaces.mindspore import (
    CheckpointConfig,
    ModelCheckpoint,
    load_param_into_net,
)
from varstore.interfaces.oneflow.checkpoint import checkpoint
from varstore.interfaces.oneflow.config import config
from varstore.interfaces.oneflow.dtypes import (
    bfloat16,
    bool as bool,
    char,
    complex64,
    complex128,
    double,
    float as float,
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
from varstore.loading import (
    load,
    load_checkpoint,
    load_into,
    load_state,
)
from varstore.model.packing import pack, unpack
from varstore.model.report import LoadReport
from varstore.model.store import save
from varstore.training.background import (
    PendingSave,
    save_async,
    save_state_async,
)
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
from varstore.training.state import save_state
from varstore.version import __version__

open = open_checkpoint

__all__ = [
    "AtSteps",
    "AttachedFile",
    "Best",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointManager",
    "DiffReport",
    "EverySeconds",
    "EverySteps",
    "History",
    "KeepEverySteps",
    "KeepIf",
    "Latest",
    "LinksReport",
    "LoadReport",
    "ModelCheckpoint",
    "Movement",
    "OnePerMinutes",
    "PendingSave",
    "Pinned",
    "RunStep",
    "RunSteps",
    "SalvageReport",
    "SaveIf",
    "Session",
    "Statistics",
    "StatsReport",
    "Variable",
    "VarstoreError",
    "VerifyReport",
    "__version__",
    "bfloat16",
    "bundle",
    "char",
    "check_storage",
    "checkpoint",
    "clean",
    "clear_default_session",
    "complex128",
    "complex64",
    "config",
    "constant_initializer",
    "convert",
    "diff",
    "double",
    "errors",
    "export",
    "float16",
    "float32",
    "float64",
    "get_all_variables",
    "get_variable",
    "glorot_normal_initializer",
    "glorot_uniform_initializer",
    "history",
    "int16",
    "int32",
    "int64",
    "int8",
    "kaiming_initializer",
    "links",
    "load",
    "load_checkpoint",
    "load_into",
    "load_param_into_net",
    "load_state",
    "load_variables",
    "merge",
    "ones_initializer",
    "pack",
    "random_normal_initializer",
    "random_uniform_initializer",
    "read",
    "salvage",
    "save",
    "save_async",
    "save_state",
    "save_state_async",
    "seal",
    "stats",
    "steps",
    "truncated_normal",
    "truncated_normal_initializer",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
    "unpack",
    "variance_scaling_initializer",
    "verify",
    "write",
    "xavier_normal_initializer",
    "xavier_uniform_initializer",
    "zeros_initializer",
]
