"""OneFlow's ``checkpoint.save`` and ``checkpoint.get``, for scripts that were written for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from typing import Any, Unpack

from varstore.disk.read.checkpoint import Checkpoint, open_variable, retry_if_replaced
from varstore.disk.read.variable import Variable
from varstore.errors import IncompleteCheckpoint
from varstore.interfaces.oneflow.session import SessionVariable, get_all_variables
from varstore.layout.names import MARKER
from varstore.model.options import SaveOptions
from varstore.model.store import CheckpointVariables, save
from varstore.values.arguments import checked

__all__ = ["checkpoint"]


class _CheckpointNamespace:
    """OneFlow's ``checkpoint``, with its functions `save` and `get`.

    Example:
        >>> bias = vs.get_variable("dense1-bias", shape=(10,))
        >>> vs.checkpoint.save("model")
        <Checkpoint 'model': 1 variable>
        >>> report = vs.load_variables(vs.checkpoint.get("model"))
        >>> report.loaded
        ('dense1-bias',)
    """

    @checked
    def save(
        self, path: str | os.PathLike[str], var_dict: Mapping[str, Any] | None = None, **options: Unpack[SaveOptions]
    ) -> Checkpoint:
        """Save variables as a checkpoint, as `varstore.save` does.

        Args:
            path: as for `varstore.save`.
            var_dict: variables of a session, arrays, or variables of another checkpoint, by name. Default: all
                variables of the current session. A variable that does not have its values yet is initialized.
            options: the options of `varstore.save`; the default of `encoding` is "raw", which OneFlow reads.
        """
        options.setdefault("encoding", "raw")
        variables = get_all_variables() if var_dict is None else var_dict
        if isinstance(variables, dict):
            variables = copy(variables)
            variables |= {name: v.numpy() for name, v in variables.items() if isinstance(v, SessionVariable)}
        return save(path, variables, **options)

    @checked
    def get(self, path: str | os.PathLike[str]) -> CheckpointVariables | Variable:
        """Open a checkpoint as a dict of variables by name, or the folder of one variable as that variable.

        Values are not read before they are used. The dict is the caller's own: items can be removed, replaced and
        added. It has the checkpoint's `path` and `attributes`.

        Raises:
            CheckpointNotFound: there is nothing at the path.
            IncompleteCheckpoint: neither the directory nor one above it has the marker of a checkpoint.
        """
        is_variable = os.path.isfile(os.path.join(path, "out")) and not os.path.exists(os.path.join(path, MARKER))
        if is_variable:
            return open_variable(path)
        try:
            return retry_if_replaced(CheckpointVariables, path)
        except IncompleteCheckpoint as error:
            if not os.path.exists(os.path.join(path, "pickled_data")):
                raise
            problem, hint = "flow.save wrote this, and it is not a checkpoint", "read it with varstore.read"
            raise IncompleteCheckpoint(problem, path=path, hint=hint) from error


checkpoint = _CheckpointNamespace()
