"""Keep model variables on disk, one folder a variable: atomic, checked, linked, readable by hand."""

from __future__ import annotations

from varstore import errors
from varstore.disk.check import DiffReport, VerifyReport, diff, seal, verify
from varstore.disk.reader import Checkpoint
from varstore.disk.reader import open_checkpoint as open
from varstore.disk.staging import clean_staging as clean
from varstore.disk.variable import Variable
from varstore.errors import VarstoreError
from varstore.formats.verbs import convert, read, write
from varstore.model.flow_checkpoint import checkpoint
from varstore.model.initializers import (
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
from varstore.model.report import LoadReport
from varstore.model.session import (
    Session,
    clear_default_session,
    get_all_variables,
    get_variable,
    load_variables,
)
from varstore.model.store import load, load_into, save
from varstore.spec.dtype_names import (
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
from varstore.spec.version import __version__

__all__ = [
    "Checkpoint",
    "DiffReport",
    "LoadReport",
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
    "load_into",
    "load_variables",
    "ones_initializer",
    "open",
    "random_normal_initializer",
    "random_uniform_initializer",
    "read",
    "save",
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
