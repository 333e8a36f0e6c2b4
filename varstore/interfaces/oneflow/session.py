"""OneFlow's variable interface: a session holds variables, ordered by their declaration.

A declaration costs nothing. Values are made when they are first needed, and a variable that was loaded or
assigned before never runs its initializer. Loading changes every variable that it names, or none. A program may
load first and declare afterwards: values wait in the session for the variables of their names.

The current session is the innermost that was entered by ``with`` in this thread or task, and else the
process-wide default one; a thread that is started inside a ``with`` enters the session itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from varstore.disk.read.variable import Variable
from varstore.errors import UsageError, VariableMismatch, VariableNotFound
from varstore.interfaces.oneflow.initializers import (
    Initializer,
    as_dtype,
    as_shape,
    glorot_uniform_initializer,
    zeros_initializer,
)
from varstore.layout.names import folder_of
from varstore.model.into import load_into
from varstore.model.match import Mismatch, compare, spec_of
from varstore.model.report import LoadReport, make_report
from varstore.text.hints import listed, nearest
from varstore.values.arrays import as_source

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

__all__ = [
    "Session",
    "SessionVariable",
    "clear_default_session",
    "current_session",
    "get_all_variables",
    "get_variable",
    "load_variables",
]


class SessionVariable:
    """A variable of a session: declared at once, filled when it is first used; made by `get_variable`.

    `trainable`, `regularizer` and `model_name` are for the training loop, which may also change them.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        initializer: Initializer | None,
        random_seed: int | None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.trainable = True
        self.regularizer: Any = None
        self.model_name: str | None = None
        self._session, self._initializer, self._random_seed = session, initializer, random_seed
        self._values: np.ndarray | None = None
        self._given: Any = None
        """What `load_variables` left waiting for this name, to be read in place of the initializer's run."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.size * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Return the values: the live array, so that a change in it is a change of the variable.

        It stays the same array: `assign` and `load_variables` write into it. The first call initializes, or reads
        the value that was loaded before the variable was declared.

        Raises:
            UsageError: the initializer cannot fill this shape and type, or gave something else.
            FormatError: what is read is not what was saved.
        """
        if self._values is None:
            with self._session.lock:
                if self._values is None:
                    self._values = self._initialized() if self._given is None else self._read()
                    self._given = None
        return self._values

    def assign(self, value: ArrayLike) -> None:
        """Write a value into the variable, cast as numpy's in-place arithmetic casts: float64 into bfloat16, say.

        An initializer that has not run is not run any more.

        Raises:
            VariableMismatch: another shape, or a type of a higher kind (floating for an integer variable).
            UsageError: the array of `numpy` was made read-only.
        """
        array = np.asarray(value)
        target, source = {"": (self.shape, self.dtype)}, {"": (array.shape, array.dtype)}
        if compare(target, source, {"": ""}, cast=True, on_mismatch="skip").mismatched:
            raise VariableMismatch(
                "the value does not fit",
                variable=self.name,
                found=f"{array.shape} {array.dtype}",
                expected=f"{self.shape} {self.dtype} or a type of its kind",
            )
        with self._session.lock:
            self._check_writeable()
            self._set(np.array(array, self.dtype, order="C") if self._values is None else array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.asarray(self.numpy(), dtype)
        return values.copy() if copy else values

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a variable without dimensions has no len()")
        return self.shape[0]

    def __repr__(self) -> str:
        state = "" if self._values is not None else ", not initialized yet" if self._given is None else ", not read yet"
        return f"<variable {self.name!r}: {self.dtype} {self.shape}{state}>"

    def _initialized(self) -> np.ndarray:
        initializer = self._initializer or self._session.default_initializer or _default_initializer
        try:
            values = np.asarray(initializer(self.shape, self.dtype, self._generator()))
            if values.shape != self.shape or values.dtype != self.dtype:
                found, expected = f"{values.shape} {values.dtype}", f"{self.shape} {self.dtype}"
                raise UsageError("not what was asked for", found=found, expected=expected)
        except UsageError as error:
            raise UsageError(
                f"its initializer failed: {error.problem}",
                variable=self.name,
                field=error.field,
                found=error.found,
                expected=error.expected,
                hint=error.hint,
            ) from error
        return np.require(values, requirements=["C", "W"])

    def _read(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        load_into({self.name: values}, {self.name: self._given})
        return values

    def _take(self, value: Any) -> None:
        """Accept a value that waits for this name; it is read when it is first needed.

        Raises:
            VariableMismatch: its shape or type is another.
            FormatError: its files are not of the size that shape and type say.
        """
        source = as_source(value, variable=self.name)
        match = compare({"": (self.shape, self.dtype)}, {"": spec_of(source)}, {"": ""}, cast=False, on_mismatch="skip")
        for mismatch in match.mismatched:
            raise VariableMismatch(
                "the session declares this variable otherwise than load_variables found it here",
                path=getattr(source, "path", "a value given to load_variables"),
                variable=self.name,
                found=f"{mismatch.source_shape} {mismatch.source_dtype}",
                expected=f"{self.shape} {self.dtype}",
                hint="declare it as it was saved, or first remove the value from the session's `waiting`",
            )
        if isinstance(source, Variable):
            source = value = source if source.has_meta else source.known_as(self.shape, self.dtype)
            source.check_files()
        self._given = value

    def _generator(self) -> np.random.Generator:
        if self._random_seed is not None:
            return np.random.default_rng(self._random_seed)
        return np.random.default_rng([int(self._session.seed), xxhash.xxh3_128_intdigest(self.name.encode())])

    def _check_writeable(self) -> None:
        if self._values is not None and not self._values.flags.writeable:
            hint = "set .numpy().flags.writeable = True"
            raise UsageError("its array was made read-only", variable=self.name, hint=hint)

    def _set(self, values: np.ndarray) -> None:
        if self._values is None:
            self._values = values
        else:
            np.copyto(self._values, values, casting="unsafe")
        self._given = None


class Session:
    """Variables by name, and what they are initialized with; ``with session:`` makes it the current one.

    `seed` and `default_initializer` may be set at any time and count for what is initialized afterwards. A
    variable without a seed of its own is drawn from the session's seed and its own name alone: not the order
    of declaration or use, nor the process, changes its values. Without a default initializer, variables of
    two or more dimensions are Glorot uniform and all others zero.

    `waiting` are the values that `load_variables` was given and no variable was there to take, by name; a variable
    that is declared later takes its own. What is removed from it is not taken.

    Raises:
        UsageError: `seed` is not an integer of zero or more; `default_initializer` is not callable.
    """

    def __init__(self, *, seed: int = 0, default_initializer: Initializer | None = None) -> None:
        self.variables: dict[str, SessionVariable] = {}
        self.waiting: dict[str, Any] = {}
        self.lock = threading.RLock()
        self.seed = seed
        self.default_initializer = default_initializer

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKED.get(name)
        if check is not None:
            check(name, value)
        super().__setattr__(name, value)

    def reset(self) -> None:
        """Forget all variables and the values that wait; seed and default initializer stay."""
        with self.lock:
            self.variables.clear()
            self.waiting.clear()

    def __enter__(self) -> Session:
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _entered.set(_entered.get()[:-1])

    def __repr__(self) -> str:
        variables = list(self.variables.values())
        waits = f", {len(self.waiting)} more waiting" if self.waiting else ""
        return f"<Session: {len(variables)} variables, {sum(variable.nbytes for variable in variables):,} bytes{waits}>"


def current_session() -> Session:
    """Return the session that was entered last in this thread or task, or else the default session."""
    entered = _entered.get()
    return entered[-1] if entered else _default_session


def clear_default_session() -> None:
    """Begin anew with an empty default session; variables of the old one live on for whoever holds them."""
    global _default_session
    _default_session = Session()


def get_variable(
    name: str,
    shape: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    initializer: Initializer | None = None,
    regularizer: Any = None,
    trainable: bool | None = None,
    model_name: str | None = None,
    random_seed: int | None = None,
    *,
    distribute: Any = None,  # noqa: ARG001  # accepted for OneFlow's scripts
) -> SessionVariable:
    """Return the current session's variable of this name; declare it if there is none.

    Of a variable that exists, `shape` and `dtype` are compared where they are given, and all else is ignored.
    A new one is float32, trainable, and initialized as its session says, unless told otherwise; its numbers
    are those of ``numpy.random.default_rng(random_seed)`` where that is given. Where `load_variables` was given a
    value of this name before, the new variable takes it, and its initializer does not run. `distribute` has no
    effect: values are whole in this process.

    Raises:
        VariableMismatch: it exists with another shape or type, or the value that waits for it has another.
        FormatError: the file of the value that waits is not of the size that the shape says.
        InvalidName, UnsupportedDtype: it could not be saved.
        UsageError: it is new and has no shape, or an argument is not what it must be.
    """
    folder_of(name)
    session = current_session()
    with session.lock:
        variable = session.variables.get(name)
        if variable is not None:
            _check_same(variable, shape, dtype)
            return variable
        if shape is None:
            hint = _near([name], session) or "give shape=, or declare it before"
            raise UsageError("a new variable needs a shape", variable=name, hint=hint)
        _check_initializer("initializer", initializer)
        if random_seed is not None:
            _check_seed("random_seed", random_seed)
        as_type = as_dtype(np.float32 if dtype is None else dtype)
        variable = SessionVariable(session, name, as_shape(shape), as_type, initializer, random_seed)
        variable.trainable = trainable is None or bool(trainable)
        variable.regularizer, variable.model_name = regularizer, model_name
        if name in session.waiting:
            variable._take(session.waiting[name])
        session.variables[name] = variable
        session.waiting.pop(name, None)
        return variable


def get_all_variables() -> dict[str, SessionVariable]:
    """Return all variables of the current session by name, in the order of their declaration."""
    session = current_session()
    with session.lock:
        return dict(session.variables)


def load_variables(value_dict: Mapping[str, Any] | Variable, ignore_mismatch: bool = True) -> LoadReport:
    """Load values into the current session's variables: all that `value_dict` names, or on any error none.

    `value_dict` maps names to values, or is one variable of a checkpoint, which is loaded under its own name.
    Values are arrays, lazy variables of a checkpoint, or variables of a session. Everything is compared
    before anything is read, and read before anything is changed. A variable that has its array already
    keeps it and gets new contents. One without ``meta`` on disk takes shape and type from the session.

    With `ignore_mismatch`, a value whose name the session does not have waits there (`Session.waiting`) for a later
    `get_variable`, which compares shape and type. Lazy values are not read before they are needed.

    Raises:
        VariableNotFound: `ignore_mismatch` is false and the session has no variable of some name.
        VariableMismatch: a shape or a type differs, whatever `ignore_mismatch` says; lists every one.
        FormatError: what is read is not what was saved, or its size does not fit.
        UsageError: `value_dict` is not a mapping of names to such values.
    """
    if isinstance(value_dict, Variable):
        value_dict = {value_dict.name: value_dict}
    if not isinstance(value_dict, Mapping) or not all(isinstance(name, str) for name in value_dict):
        raise UsageError(
            "not a mapping of names to values",
            field="value_dict",
            found=type(value_dict).__name__,
            hint="give checkpoint.get(directory), or {name: value} for one variable",
        )
    session = current_session()
    with session.lock:
        if not ignore_mismatch:
            _refuse_unknown([name for name in value_dict if name not in session.variables], session)
        targets = {name: (variable.shape, variable.dtype) for name, variable in session.variables.items()}
        given = {name: value_dict[name] for name in value_dict if name in targets}
        specs = {name: spec_of(as_source(value, variable=name)) for name, value in given.items()}
        match = compare(targets, specs, {name: name for name in value_dict}, on_mismatch="skip")
        _refuse_mismatched(match.mismatched)
        for name in given:
            session.variables[name]._check_writeable()
        waiting = {name: _waiting(name, value_dict[name]) for name in value_dict if name not in targets}
        values = {name: np.empty(*targets[name]) for name in given}
        source = str(getattr(value_dict, "path", type(value_dict).__name__))
        report = make_report(match, source=source, target="session", unused_waits=True)
        load_into(values, given)
        for name in given:
            session.variables[name]._set(values.pop(name))
        session.waiting |= waiting
    return report


def _waiting(name: str, value: Any) -> Any:
    """Return what is kept of a value that nothing takes yet: arrays may change until then, so these are copied."""
    source = as_source(value, variable=name)
    return np.array(source) if isinstance(source, np.ndarray) else value


def _default_initializer(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray:
    initializer = glorot_uniform_initializer() if len(shape) >= 2 else zeros_initializer()
    return initializer(shape, dtype, rng)


def _check_initializer(field: str, initializer: Any) -> None:
    if initializer is not None and not callable(initializer):
        expected = "what a function like glorot_uniform_initializer() returns"
        raise UsageError("not an initializer", field=field, found=repr(initializer), expected=expected)


def _check_seed(field: str, seed: Any) -> None:
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError("not a seed", field=field, found=repr(seed), expected="an integer of zero or more")


_CHECKED = {"seed": _check_seed, "default_initializer": _check_initializer}
_entered: ContextVar[tuple[Session, ...]] = ContextVar("varstore_sessions", default=())
_default_session = Session()


def _check_same(variable: SessionVariable, shape: Sequence[int] | None, dtype: DTypeLike | None) -> None:
    asked_shape = variable.shape if shape is None else as_shape(shape)
    asked_dtype = variable.dtype if dtype is None else as_dtype(dtype)
    if (asked_shape, asked_dtype) != (variable.shape, variable.dtype):
        raise VariableMismatch(
            "the variable exists with another shape or type",
            variable=variable.name,
            found=f"{variable.shape} {variable.dtype}",
            expected=f"{asked_shape} {asked_dtype}",
            hint="leave shape and dtype out, use another name, or start anew with clear_default_session()",
        )


def _refuse_unknown(unknown: list[str], session: Session) -> None:
    if unknown:
        problem = "the session has no such variables, and ignore_mismatch is false"
        raise VariableNotFound(problem, found=listed(list(map(repr, unknown))), hint=_near(unknown[:3], session))


def _refuse_mismatched(mismatched: Sequence[Mismatch]) -> None:
    if mismatched:
        lines = "".join(f"\n  {mismatch.name!r}: {mismatch}" for mismatch in mismatched)
        problem = f"nothing was loaded: {len(mismatched)} differ in shape or type (given -> session):{lines}"
        raise VariableMismatch(problem, hint="leave them out, or use load_into with on_mismatch= and cast=")


def _near(names: Iterable[str], session: Session) -> str:
    found = [(name, nearest(name, session.variables)) for name in names]
    return "; ".join(f"near {name!r}: {', '.join(map(repr, near))}" for name, near in found if near)
