"""The values of one variable in all steps of a run, as one lazy array."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from varstore.disk.read.variable import Variable
from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.inspection.stats import stats
from varstore.layout.readable import readable
from varstore.text.hints import listed, nearest, plural
from varstore.training.series import Series, open_step, prefixes_in
from varstore.values.arguments import checked
from varstore.values.lazy import LazyArray, chunked_array

__all__ = ["History", "history"]


class History(LazyArray):
    """The values of a variable in each step of a run, of shape ``(steps, *shape)``; they are read where they are used.

    `steps` has the number of the step of each row. What is the same file in two steps is read once.

    Example:
        >>> with vs.CheckpointManager("run") as manager:
        ...     for step in (10, 20, 30):
        ...         pending = manager.save(step, {"w": np.full(3, step)})
        >>> history = vs.history("run", "w")
        >>> history
        <History 'w': int64 [3, 3], 3 steps>
        >>> history.steps, history[:, 0], history.norms().round(1)
        ((10, 20, 30), array([10, 20, 30]), array([17.3, 34.6, 52. ]))
    """

    __slots__ = ("_variables", "steps")

    steps: tuple[int, ...]

    def __init__(self, name: str, steps: Sequence[int], variables: Sequence[Variable]) -> None:
        first = variables[0]
        rows = chunked_array((len(steps), *first.shape), first.dtype, self._block)
        super().__init__(rows.shape, rows.dtype, rows.numpy, part=lambda index, _: rows[index], name=name)
        self.steps = tuple(steps)
        self._variables = variables

    def __reduce__(self) -> tuple[Any, ...]:
        return History, (self.name, self.steps, self._variables)

    def _block(self, ranges: Sequence[range]) -> np.ndarray:
        block = np.empty([len(rows) for rows in ranges], self.dtype)
        inner = tuple(slice(rows.start, rows.stop) for rows in ranges[1:])
        before: Hashable = None
        for at, row in enumerate(ranges[0]):
            variable = self._variables[row]
            content = _content(variable)
            block[at] = block[at - 1] if at and content == before else variable[inner]
            before = content
        return block

    def norms(self) -> np.ndarray:
        """Return the Euclidean norm of the finite values in each step, nan if there are none; a few MiB in memory."""
        distinct = {_content(variable): variable for variable in self._variables}
        found = stats({str(at): variable for at, variable in enumerate(distinct.values())}, quantiles=False)
        norms = dict(zip(distinct, (record.norm for record in found.values()), strict=True))
        return np.array([norms[_content(variable)] for variable in self._variables], np.float64)

    def __repr__(self) -> str:
        return f"<History {self.name!r}: {self.dtype} {list(self.shape)}, {plural(len(self.steps), 'step')}>"


def _content(variable: Variable) -> Hashable:
    """Return what is equal for variables of a run that have the same bytes; what has no digest is by itself."""
    entry = variable.entry
    return (entry.nbytes, entry.encoding, entry.checksums) if entry.checksums else variable.path


@checked
def history(run: str | os.PathLike[str], name: str, *, prefix: str | None = None) -> History:
    """Return the values of a variable in all whole steps of a run as one lazy array; nothing but manifests is read.

    Steps that do not have the variable are left out: its `steps` has the numbers of those that do.

    Args:
        run: the directory of a `CheckpointManager`.
        name: the name of a variable.
        prefix: what the names of the steps begin with, if there are several runs in the directory.

    Raises:
        UsageError: there are no steps in the directory, or those of several runs.
        VariableNotFound: no step has the variable.
        VariableMismatch: it does not have the same shape and type in all steps.
        UnsupportedDtype: numpy does not have its type.
        StorageError: the operating system refused to read the directory.

    Example:
        >>> with vs.CheckpointManager("run") as manager:
        ...     for step in (10, 20, 30):
        ...         pending = manager.save(step, {"layer/w": np.full((2, 2), step)})
        >>> weights = vs.history("run", "layer/w")
        >>> weights.shape, weights[-1].tolist(), weights[:, 0, 1].tolist()
        ((3, 2, 2), [[30, 30], [30, 30]], [10, 20, 30])
    """
    root = os.fspath(run)
    steps: list[int] = []
    variables: list[Variable] = []
    known: dict[str, None] = {}
    for member in Series(root, _prefix(root, prefix)).members():
        with open_step(member.saved.path) as checkpoint:
            known |= dict.fromkeys(checkpoint)
            variable = checkpoint.get(name)
        if variable is not None:
            steps.append(member.saved.step)
            variables.append(variable)
    if not variables:
        near = nearest(name, known)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`varstore ls` lists the names"
        raise VariableNotFound("no step has this variable", path=root, variable=name, hint=hint)
    forms = [readable(variable.entry, path=variable.root) for variable in variables]
    for variable, form in zip(variables, forms, strict=True):
        if (form.shape, form.dtype) != (forms[0].shape, forms[0].dtype):
            raise VariableMismatch(
                "the variable does not have the same shape and type in all steps",
                path=variable.root,
                variable=name,
                found=variable.entry.form,
                expected=f"{variables[0].entry.form}, as in {variables[0].root}",
            )
    return History(name, steps, variables)


def _prefix(root: str, given: str | None) -> str:
    found = sorted(prefixes_in(root))
    if not found:
        raise UsageError("there are no steps of a run here", path=root)
    if given is None and len(found) > 1:
        raise UsageError(
            "there are the steps of several runs in this directory",
            path=root,
            found=listed(list(map(repr, found)), 5),
            hint="name one of them with prefix=",
        )
    if given is not None and given not in found:
        raise UsageError("no step has this prefix", path=root, field="prefix", found=repr(given))
    return found[0] if given is None else given
