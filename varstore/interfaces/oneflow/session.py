"""OneFlow's variable interface: a session holds variables in the order of their declaration.

A declaration costs nothing. A variable gets its values when they are first needed: those that were loaded or assigned,
or else those of its initializer. Loading changes all variables that it names, or none. A program may load first and
declare later: the values wait in the session for variables of their names.

The current session is the innermost one that this thread or task has entered by ``with``, or else the default session
of the process. A new thread starts with the default session, and has to enter another one itself.
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
from varstore.text.hints import listed, nearest, plural
from varstore.values.arguments import checked, described
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
    """A variable of a session, which `get_variable` declares; it gets its values when they are first used.

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
        """The value that waited for this name when the variable was declared, used in place of the initializer."""

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
        """Return the variable's own array; a change in it is a change of the variable.

        It is the same array at each call, and `assign` and `load_variables` write into it. The first call initializes
        it, or reads the value that was loaded before the variable was declared.

        Raises:
            UsageError: the initializer cannot fill this shape and type, or returned something else.
            FormatError: what is read is not what was saved.
        """
        if self._values is None:
            with self._session.lock:
                if self._values is None:
                    self._values = self._initialized() if self._given is None else self._read()
                    self._given = None
        return self._values

    def assign(self, value: ArrayLike) -> None:
        """Write a value into the variable, with the casts of numpy's in-place arithmetic, as from float64 to bfloat16.

        An initializer that has not run yet will not run.

        Raises:
            VariableMismatch: the shapes differ, or the value's type is of a higher kind, as floating for an integer
                variable.
            UsageError: the array that `numpy` returned was made read-only.
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
            raise TypeError("a variable without dimensions does not have a len()")
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
                raise UsageError("it returned another shape or type", found=found, expected=expected)
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
        """Take the value that waits for this name; it is read when it is first needed.

        Raises:
            VariableMismatch: the value has another shape or type.
            FormatError: its file does not have the size that shape and type say.
        """
        source = as_source(value, variable=self.name)
        match = compare({"": (self.shape, self.dtype)}, {"": spec_of(source)}, {"": ""}, cast=False, on_mismatch="skip")
        for mismatch in match.mismatched:
            raise VariableMismatch(
                "the variable is declared with another shape or type than the value that load_variables was given",
                path=getattr(source, "path", "a value given to load_variables"),
                variable=self.name,
                found=f"{mismatch.source_shape} {mismatch.source_dtype}",
                expected=f"{self.shape} {self.dtype}",
                hint="declare it as it was saved, or remove the value from the session's `waiting` first",
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
    """Variables by name, and how they are initialized; ``with session:`` makes it the current session.

    The random values of a variable depend on the session's seed and the variable's name, or on the variable's own seed,
    and on nothing else: neither the order of declarations nor the process changes them. `seed` and
    `default_initializer` can be set at any time, for the variables that are initialized after that.

    Args:
        seed: an integer from 0.
        default_initializer: for variables that do not have an initializer. Default: Glorot uniform for two or more
            dimensions, and zeros for the others.

    Attributes:
        variables: the variables by name.
        waiting: values by name that `load_variables` was given before a variable of their name was declared. A
            variable that is declared later takes its value, unless the value was removed.

    Raises:
        UsageError: `seed` is not an integer, or is negative; `default_initializer` is not callable.

    Example:
        >>> with vs.Session(seed=1) as session:
        ...     weight = vs.get_variable("dense1-weight", shape=(64, 32))
        ...     saved = vs.checkpoint.save("model")
        >>> session
        <Session: 1 variable, 8,192 bytes>
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
        """Remove all variables and all values that wait; the seed and the default initializer stay."""
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
        size = plural(sum(variable.nbytes for variable in variables), "byte")
        return f"<Session: {plural(len(variables), 'variable')}, {size}{waits}>"


def current_session() -> Session:
    """Return the session that this thread or task entered last, or else the default session."""
    entered = _entered.get()
    return entered[-1] if entered else _default_session


def clear_default_session() -> None:
    """Replace the default session by an empty one; variables of the old session can still be used.

    Example:
        >>> variable = vs.get_variable("bias", shape=(10,))
        >>> vs.clear_default_session()
        >>> variable.numpy().shape
        (10,)
    """
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
    """Return the current session's variable of a name, and declare it if it does not exist.

    If the variable exists, `shape` and `dtype` are compared with its own where they are given, and the other arguments
    have no effect. If `load_variables` was given a value of this name earlier, the new variable takes it, and its
    initializer does not run.

    Args:
        name: also the name of its folder in a checkpoint.
        shape: sizes of the dimensions; needed for a new variable.
        dtype: default float32.
        initializer: default that of the session.
        regularizer: stored for the training loop.
        trainable: stored for the training loop. Default: True.
        model_name: stored for the training loop.
        random_seed: initialize with ``numpy.random.default_rng(random_seed)``. Default: a generator that depends on
            the session's seed and the name.
        distribute: has no effect; each process has all values.

    Raises:
        VariableMismatch: the variable, or the value that waits for it, has another shape or type.
        FormatError: the file of the value that waits does not have the size that the shape says.
        InvalidName, UnsupportedDtype: a variable of this name or type cannot be saved.
        UsageError: the variable is new and `shape` is not given, or an argument is wrong.

    Example:
        >>> weight = vs.get_variable("dense1-weight", shape=(2, 3), initializer=vs.ones_initializer())
        >>> weight.numpy()[0] = 5  # changes the variable
        >>> vs.get_variable("dense1-weight").numpy()
        array([[5., 5., 5.],
               [1., 1., 1.]], dtype=float32)
    """
    folder_of(name)
    session = current_session()
    with session.lock:
        variable = session.variables.get(name)
        if variable is not None:
            _check_same(variable, shape, dtype)
            return variable
        if shape is None:
            hint = _near([name], session) or "pass shape=, or declare the variable first"
            raise UsageError("a new variable needs a shape", variable=name, hint=hint)
        _check_initializer("initializer", initializer)
        if random_seed is not None:
            _check_seed("random_seed", random_seed)
        if not isinstance(trainable, bool | np.bool_ | None):
            raise UsageError("a wrong value", field="trainable", found=described(trainable), expected="True or False")
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
    """Return all variables of the current session by name, in the order of their declaration.

    Example:
        >>> variable = vs.get_variable("dense1-bias", shape=(10,))
        >>> list(vs.get_all_variables())
        ['dense1-bias']
    """
    session = current_session()
    with session.lock:
        return dict(session.variables)


@checked
def load_variables(value_dict: Mapping[str, Any] | Variable, ignore_mismatch: bool = True) -> LoadReport:
    """Load values into the variables of the current session; after an error, no variable has changed.

    Everything is compared before anything is read, and read before anything is changed. A variable that has its array
    already keeps it, with new values in it. A variable of a checkpoint without ``meta`` takes its shape and type from
    the session.

    Args:
        value_dict: arrays, variables of a checkpoint or variables of a session, by name; or a single variable of a
            checkpoint, which is loaded under its own name.
        ignore_mismatch: let a value wait (`Session.waiting`) if the session does not have a variable of its name. A
            later `get_variable` takes the value and compares shape and type; until then a variable of a checkpoint
            is not read. False makes such a name an error.

    Returns:
        A report of what was loaded, what was missing, and what is waiting.

    Raises:
        VariableNotFound: the session does not have a variable of some name, and `ignore_mismatch` is False.
        VariableMismatch: shapes or types differ, whatever `ignore_mismatch` says; the message lists them all.
        FormatError: what is read is not what was saved, or a file has the wrong size.
        UsageError: `value_dict` is not a mapping of names to such values.

    Example:
        >>> checkpoint = vs.save("old", {"dense1-bias": np.ones(3, np.float32), "dense2-bias": np.zeros(9, np.float32)})
        >>> bias = vs.get_variable("dense1-bias", shape=(3,))
        >>> print(vs.load_variables(vs.checkpoint.get("old")))
        old -> session: 1 of 1 loaded, 1 waiting
        loaded          1  dense1-bias
        waiting         1  dense2-bias  (not declared yet: loaded when it is)
        >>> bias.numpy()
        array([1., 1., 1.], dtype=float32)
    """
    if isinstance(value_dict, Variable):
        value_dict = {value_dict.name: value_dict}
    if not isinstance(value_dict, Mapping) or not all(isinstance(name, str) for name in value_dict):
        raise UsageError(
            "not a mapping of names to values",
            field="value_dict",
            found=type(value_dict).__name__,
            hint="pass checkpoint.get(directory), or {name: value} for one variable",
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
    """Return what waits for a variable; an array is copied, because the caller may change it."""
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
            hint="leave shape and dtype out, use another name, or call clear_default_session() first",
        )


def _refuse_unknown(unknown: list[str], session: Session) -> None:
    if unknown:
        problem = "the session does not have these variables, and ignore_mismatch is False"
        raise VariableNotFound(problem, found=listed(list(map(repr, unknown))), hint=_near(unknown[:3], session))


def _refuse_mismatched(mismatched: Sequence[Mismatch]) -> None:
    if mismatched:
        rows = [f"{mismatch.name!r}: {mismatch}" for mismatch in mismatched]
        count = plural(len(mismatched), "variable")
        problem = f"nothing was loaded: shapes or types of {count} differ, given -> session:"
        raise VariableMismatch(problem, rows=rows, hint="leave them out, or use load_into with on_mismatch= and cast=")


def _near(names: Iterable[str], session: Session) -> str:
    found = [(name, nearest(name, session.variables)) for name in names]
    return "; ".join(f"similar to {name!r}: {', '.join(map(repr, near))}" for name, near in found if near)
