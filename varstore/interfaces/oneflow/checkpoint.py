"""OneFlow's ``checkpoint.save`` and ``checkpoint.get``, for scripts that were written for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint, open_variable
from varstore.disk.read.variable import Variable
from varstore.interfaces.oneflow.session import SessionVariable, get_all_variables
from varstore.layout.names import MARKER
from varstore.model.options import SaveOptions
from varstore.model.store import save

__all__ = ["checkpoint"]


class _CheckpointNamespace:
    """OneFlow's ``checkpoint``: `save` and `get`."""

    def save(
        self, path: str | os.PathLike[str], var_dict: Mapping[str, Any] | None = None, **options: Unpack[SaveOptions]
    ) -> Checkpoint:
        """Save variables as a checkpoint: those of `var_dict`, or else all of the current session.

        Values are variables of a session, which are initialized if they were not, arrays, or lazy variables of
        another checkpoint, which are linked. Options, errors and what is returned are those of `varstore.save`.
        """
        variables = get_all_variables() if var_dict is None else var_dict
        if isinstance(variables, dict):
            variables = {n: v.numpy() if isinstance(v, SessionVariable) else v for n, v in variables.items()}
        return save(path, variables, **options)

    def get(self, path: str | os.PathLike[str]) -> Checkpoint | Variable:
        """Open a checkpoint, or one variable's folder: a mapping of lazy variables, or one lazy variable.

        Raises:
            CheckpointNotFound: nothing is there.
            IncompleteCheckpoint: neither the directory nor one above it has the marker of a checkpoint.
        """
        is_variable = os.path.isfile(os.path.join(path, "out")) and not os.path.exists(os.path.join(path, MARKER))
        return open_variable(path) if is_variable else open_checkpoint(path)


checkpoint = _CheckpointNamespace()
