"""Save while training continues: copy the arrays into buffers, return, and write in a thread.

One write runs at a time, from one set of buffers that the next save reuses, so memory is bounded by what one save
copies, and that by a budget. The thread calls `varstore.save`; there is no second way to save.

**Signal handlers.** A handler runs in the main thread, between two steps of whatever it interrupts, which goes on only
after the handler has ended. If that is a call that holds a lock, or waits for a thread, a save in the handler must not
wait for the same. So each thread has a lock of its own that it holds in such calls (`calling`). Whoever finds it taken
`is_interrupting`, and waits for nothing: the save is written at once, from the caller's arrays, past the buffers. So is
one in a handler that interrupted other work while the thread writes: whoever sends SIGTERM may not wait for two saves.

**Forks.** A child has neither the thread that writes nor use for its locks; see `varstore.storage.forks`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from types import CodeType, FrameType
from typing import Any, Literal, TypeAlias, Unpack

import numpy as np

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.threads import Ending, run, start, thread_count
from varstore.errors import UsageError
from varstore.layout.attached import DATA
from varstore.layout.location import Location
from varstore.model.options import SaveOptions, StateOptions, check_options
from varstore.model.store import save
from varstore.storage.directory import locate
from varstore.storage.failures import translated
from varstore.storage.forks import tell_children
from varstore.storage.memory import available_memory
from varstore.training.tree import flatten
from varstore.values.arguments import checked
from varstore.values.attached import FileContent, GivenFile, PlannedFile, SourceFile, StoredFile
from varstore.values.lazy import LazyArray
from varstore.values.plan import SavePlan, plan_save

__all__ = [
    "AsyncOptions",
    "BackgroundSaver",
    "PendingSave",
    "WhenBusy",
    "calling",
    "ending_of",
    "in_signal_handler",
    "is_interrupting",
    "save_async",
    "save_state_async",
]

WhenBusy: TypeAlias = Literal["wait", "refuse"]


class AsyncOptions(StateOptions, total=False):
    """All options of `save_state_async`."""

    copy: bool
    when_busy: WhenBusy
    budget: int | None


_ALIGNMENT = 64
_PIECE = 4 << 20
_STAR = 0x04
"""The flag of a function's code that says that it has a parameter like ``*args``."""
_SIGNALS = tuple(signal.valid_signals())
_get_handler: Callable[[int], object] = import_module("_signal").getsignal
"""What `signal.getsignal` wraps: not in Python, where Ctrl-C could come between any two steps."""
_log = logging.getLogger("varstore")
_thread = threading.local()
_handlers: dict[int, CodeType] = {}
"""The code of each signal handler that was noted, by its identity: to compare codes takes longer."""


def calling() -> threading.Lock:
    """Return the lock to hold in a call that takes other locks or waits: the thread's own, or a new one inside it."""
    return threading.Lock() if is_interrupting() else _own_lock()


def is_interrupting() -> bool:
    """Tell whether this thread is in such a call already: what asks is a signal handler, or was called by that call."""
    return _own_lock().locked()


def in_signal_handler() -> bool:
    """Tell whether this thread runs a signal handler.

    That is one that is set now, or was when the last thread was begun, or one that still has what it was given.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    _note_handlers()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame.f_code) in _handlers or _is_given_a_signal(frame):
            return True
        frame = frame.f_back
    return False


def _is_given_a_signal(frame: FrameType) -> bool:
    """Tell whether a function was given the number of a signal and the frame below it, as only a handler is."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    named, star = code.co_varnames[: code.co_argcount], code.co_varnames[count : count + bool(code.co_flags & _STAR)]
    if len(named) + 2 * len(star) < 2:
        return False
    found = frame.f_locals
    given = [*map(found.get, named), *(value for name in star for value in found.get(name, ()))]
    return any(value is frame.f_back for value in given) and any(
        isinstance(value, int) and value in _SIGNALS for value in given
    )


def _note_handlers() -> None:
    """Note what handlers are set: one may unset itself as it begins."""
    handler: Any
    for handler in filter(callable, map(_get_handler, _SIGNALS)):
        while isinstance(handler, partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        if code := getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None):
            _handlers[id(code)] = code


def _own_lock() -> threading.Lock:
    lock: threading.Lock = _thread.__dict__.setdefault("lock", threading.Lock())
    return lock


class PendingSave:
    """A save that a background thread carries out; `save_async` returns it.

    Python does not exit before the save has ended, unless the process is killed. `path` is where the checkpoint will
    be.

    Example:
        >>> pending = vs.save_async("step-1", {"w": np.zeros(3)})
        >>> pending.wait()  # an error of the save is raised here
        >>> pending
        <PendingSave 'step-1': done>
        >>> pending.result()
        <Checkpoint 'step-1': 1 variable>
    """

    def __init__(self, location: Location, ending: Ending) -> None:
        self._location = location
        self._ending = ending
        self._process = os.getpid()

    @property
    def path(self) -> str:
        """Where the checkpoint will be, as it was given; a relative path keeps the meaning that it had."""
        return self._location.path

    def done(self) -> bool:
        """Tell whether the save has ended, with or without an error; does not wait."""
        return self._ending.is_told

    @checked
    def wait(self, timeout: float | None = None) -> None:
        """Wait until the save has ended, for at most `timeout` seconds.

        Raises:
            TimeoutError: the save has not ended in that time.
            UsageError: another process began it, and this one was forked before its end.
            Exception: the error that the save raised.
        """
        if not self.done() and os.getpid() != self._process:
            raise UsageError(
                "this save belongs to the process that began it, and its end is not known here",
                path=self.path,
                found=f"process {os.getpid()}",
                expected=f"process {self._process}",
                hint="wait for it there; what this process saves itself, it can wait for",
            )
        with calling():
            if not self._ending.wait(timeout):
                raise TimeoutError(f"{self.path}: the save has not ended")
        self._ending.check()

    @checked
    def result(self, timeout: float | None = None) -> Checkpoint:
        """Wait as `wait` does, then open the checkpoint."""
        self.wait(timeout)
        found = open_checkpoint(self._location.absolute)
        known = self._location.known_as(found.location.identity, unshared=found.location.unshared)
        return Checkpoint(known, found.content)

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._ending.error else "done"
        return f"<PendingSave {self.path!r}: {state}>"


def ending_of(pending: PendingSave) -> Ending:
    """Return what a save is told with how it ended."""
    return pending._ending


class _Turn:
    """One save's turn with the buffers, which belong to it until it `is_over`.

    Ctrl-C can interrupt the caller between any two steps, and local variables that say how far it came are lost then.
    So who owns the turn, whoever works or nobody, is decided by the first who asks, in one indivisible step, and can be
    asked again at any time with the same answer.
    """

    def __init__(self, path: str, ending: Ending, job: Callable[[], None]) -> None:
        self.is_handed_over = False
        """Whether the call that started the thread has finished; from then on the turn can only be the thread's."""
        self._path = path
        self._ending = ending
        self._job: Callable[[], None] | None = job
        self._owner: dict[str, str] = {}

    def _is_owned_by(self, who: str) -> bool:
        return self._owner.setdefault("owner", who) == who  # one step, and the same answer each time

    def work(self) -> None:
        """Do the job, and tell how it ended; do nothing if the turn was withdrawn."""
        if not self._is_owned_by("worker"):
            return
        job, self._job = self._job, None
        assert job is not None
        error: BaseException | None = None
        try:
            job()
        except BaseException as failure:  # raised where the save is waited for
            error = failure
            _log.error("the save to %s failed: %s", self._path, error)
        finally:
            del job  # releases the arrays
            self._ending.tell(error)

    def is_over(self) -> bool:
        """Tell whether the thread has finished with the buffers, or was never started because Ctrl-C came first."""
        return (not self.is_handed_over and self.is_withdrawn()) or self._ending.is_told

    @property
    def is_told(self) -> bool:
        """Whether the job was done, and how it ended is known."""
        return self._ending.is_told

    def is_withdrawn(self) -> bool:
        """Withdraw the turn unless the thread has it; tell whether the thread will never have it."""
        if not self._is_owned_by("nobody"):
            return False
        self._job = None
        return True

    def wait(self) -> None:
        """Wait until it is over."""
        if not self.is_over():
            self._ending.wait()


class BackgroundSaver:
    """Buffers for background saves, which are written one after another.

    Locks are taken only by ``with``, because Ctrl-C cannot come between taking such a lock and entering its block.
    """

    def __init__(self) -> None:
        self._in_child()
        tell_children(self, BackgroundSaver._in_child)

    def _in_child(self) -> None:
        """Begin without a save: the thread of the parent's is not in this process."""
        self._calls = threading.Lock()
        self._turn: _Turn | None = None
        self._buffer = np.empty(0, np.uint8)

    @property
    def buffered(self) -> int:
        """Size of the buffers in bytes; they are kept between saves."""
        return self._buffer.nbytes

    def release(self) -> None:
        """Wait for the current save, then free its buffers."""
        with calling(), self._calls:
            if self._turn is not None:
                self._turn.wait()
            self._buffer = np.empty(0, np.uint8)

    def save(
        self,
        path: str | os.PathLike[str],
        variables: Mapping[str, Any],
        *,
        copy: bool = True,
        when_busy: WhenBusy = "wait",
        budget: int | None = None,
        after: Callable[[], object] | None = None,
        ending: Ending | None = None,
        at_once: bool = False,
        **save_options: Unpack[SaveOptions],
    ) -> PendingSave:
        """Copy the variables, start to write them, and return; see `save_async`.

        `after` is called in the thread when the checkpoint is complete; its error becomes the save's error. `ending`
        is told how the save ended. With `at_once`, it is written before this returns, past the buffers.
        """
        check_options(save_options, SaveOptions, "save_async()")
        plan = plan_save(variables, files=save_options.get("files"))
        location = locate(path)
        if plan.files:
            save_options["files"] = {file.name: _given(file) for file in plan.files}
        if isinstance(base := save_options.get("base"), str | os.PathLike):
            save_options["base"] = locate(base).absolute
        ending = ending or Ending()
        pending = PendingSave(location, ending)
        if at_once or is_interrupting() or (self._is_busy() and in_signal_handler()):
            _Turn(location.path, ending, partial(_save, location, variables, after, save_options)).work()
            pending.wait()
            return pending
        if when_busy == "refuse" and self._calls.locked():
            raise _busy(path)
        with calling(), self._calls:
            if self._turn is not None:
                if when_busy == "refuse" and not self._turn.is_over():
                    raise _busy(path)
                self._turn.wait()
            if budget is None:
                budget = (available_memory() + self.buffered) // 2
            in_thread = not copy or _buffer_size(plan) + _files_size(plan) <= budget
            if copy and in_thread:
                variables = self._copied(plan)
                if plan.files:
                    save_options["files"] = {file.name: _read(file) for file in plan.files}
            job = partial(_save, location, variables, after, save_options)
            if not (in_thread and self._hand_over(_Turn(location.path, ending, job))):
                _Turn(location.path, ending, job).work()
                pending.wait()
        return pending

    def _is_busy(self) -> bool:
        """Tell whether a save would wait."""
        turn = self._turn
        return self._calls.locked() or (turn is not None and not turn.is_told)

    def _hand_over(self, turn: _Turn) -> bool:
        """Give the turn to a new thread; False if the system, or an interpreter that is ending, refuses one."""
        self._turn = turn
        _note_handlers()
        turn.is_handed_over = start(turn.work, name="varstore-save", daemon=False) or not turn.is_withdrawn()
        return turn.is_handed_over

    def _copied(self, plan: SavePlan) -> dict[str, Any]:
        """Return the variables with each array copied into the buffer; tied and linked variables stay so."""
        if self._buffer.nbytes < (size := _buffer_size(plan)):
            self._buffer = np.empty(0, np.uint8)  # frees the old buffer before the new one is allocated
            self._buffer = np.empty(size, np.uint8)
        start = -self._buffer.__array_interface__["data"][0] % _ALIGNMENT
        copied: dict[str, Any] = {}
        targets: list[tuple[np.ndarray | LazyArray, np.ndarray]] = []
        for variable in plan.variables:
            if variable.is_linked:
                copied[variable.name] = copied.get(variable.alias_of, variable.source)
                continue
            assert isinstance(variable.source, np.ndarray | LazyArray)
            dtype = variable.source.dtype
            target = self._buffer[start : start + variable.nbytes].view(dtype).reshape(variable.meta.shape)
            copied[variable.name] = target
            targets.append((variable.source, target))
            start += _aligned(variable.nbytes)
        run(_copies(targets), thread_count(None) if plan.nbytes > _PIECE else 1)
        return copied


def _busy(path: str | os.PathLike[str]) -> UsageError:
    return UsageError("another save is still being written", path=path, hint='wait for it, or pass when_busy="wait"')


def _copies(targets: list[tuple[np.ndarray | LazyArray, np.ndarray]]) -> Iterator[Callable[[], None]]:
    """Yield jobs that copy. Arrays on a device are fetched between them, one at a time, which bounds the memory."""
    for source, target in targets:
        array = source.numpy() if isinstance(source, LazyArray) else source
        if not array.flags.c_contiguous or array.nbytes <= _PIECE:
            yield partial(np.copyto, target, array)
            continue
        values, into = array.reshape(-1), target.reshape(-1)
        step = _PIECE // array.itemsize
        for first in range(0, values.size, step):
            yield partial(np.copyto, into[first : first + step], values[first : first + step])


def _buffer_size(plan: SavePlan) -> int:
    return _ALIGNMENT + sum(_aligned(variable.nbytes) for variable in plan.variables if not variable.is_linked)


def _files_size(plan: SavePlan) -> int:
    """Return the bytes of the files outside, which are read before the save goes on in the background."""
    return sum(file.nbytes for file in plan.files if isinstance(file.source, SourceFile))


def _given(file: PlannedFile) -> FileContent:
    """Return an attached file in a form that keeps its meaning when the working directory changes."""
    source = file.source
    if isinstance(source, StoredFile):
        return source
    given = source.path if isinstance(source, SourceFile) else source.data
    return given if file.kind == DATA else GivenFile(given, file.kind, file.attributes)


def _read(file: PlannedFile) -> FileContent:
    """Return an attached file in a form that keeps its bytes."""
    if not isinstance(file.source, SourceFile):
        return _given(file)
    path = file.source.path
    with translated(path, "the file cannot be read"), open(path, "rb") as source:
        return _given(file._replace(source=np.frombuffer(source.read(), np.uint8)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _save(
    location: Location,
    variables: Mapping[str, Any],
    after: Callable[[], object] | None,
    options: SaveOptions,
) -> None:
    save(location.absolute, variables, **options)
    if after is not None:
        after()


_shared = BackgroundSaver()


@checked
def save_async(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    copy: bool = True,
    when_busy: WhenBusy = "wait",
    budget: int | None = None,
    **save_options: Unpack[SaveOptions],
) -> PendingSave:
    """Copy the variables, start to save them in a thread, and return; the arrays may change at once.

    The copies go into buffers that the next save reuses. Variables of other checkpoints are linked. If the save fails,
    the error is logged, and raised by `PendingSave.wait`.
    Python does not exit before the save has ended, unless the process is killed. In a signal handler, a save that would
    wait for another one is written before the call returns, and waits for nothing.

    Args:
        path: as for `varstore.save`.
        variables: as for `varstore.save`.
        copy: False writes the arrays where they are; nothing may change them until the save has ended.
        when_busy: what to do while an earlier save is being written: "wait" for it, or "refuse" with an error.
        budget: the most bytes that the copies may take. Default: half of what this process may still use, by the
            machine's memory, the limits of its control groups, and ``RLIMIT_AS``. A save that needs more is written
            before the call returns.
        save_options: the options of `varstore.save`.

    Raises:
        UsageError: another save is being written, and `when_busy` is "refuse".
        InvalidName, UnsupportedDtype: a variable cannot be saved. Errors that only writing can show, CheckpointExists
            among them, are raised by `PendingSave.wait`.

    Example:
        >>> weights = {"w": np.zeros(3)}
        >>> pending = vs.save_async("step-1", weights)
        >>> weights["w"] += 1  # training continues
        >>> pending.result()["w"][:]
        array([0., 0., 0.])
    """
    return _shared.save(path, variables, copy=copy, when_busy=when_busy, budget=budget, **save_options)


@checked
def save_state_async(path: str | os.PathLike[str], state: Any, **options: Unpack[AsyncOptions]) -> PendingSave:
    """Save nested state as `save_state` does, in the background as `save_async` does.

    Args:
        path: as for `save_async`.
        state: as for `save_state`.
        options: `copy`, `when_busy`, `budget` and the options of `varstore.save`, as for `save_async`.

    Raises:
        UsageError, InvalidName, UnsupportedDtype: see `save_state` and `save_async`.

    Example:
        >>> pending = vs.save_state_async("run-3", {"model": {"w": np.zeros(3)}, "epoch": 3})
        >>> vs.load_state(pending.result())["epoch"]
        3
    """
    flat = flatten(state)
    return _shared.save(path, flat.variables, tree=flat.tree, **options)
