"""Save while training goes on: copy into buffers that are reused, return, and write in a thread.

One write runs at a time, from one set of buffers; so memory is bounded by what one save copies, and that by a
budget. There is one way to save: the thread calls `varstore.save` as anybody would.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeAlias, Unpack

import numpy as np

from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.threads import run, start, thread_count
from varstore.errors import UsageError
from varstore.model.options import SaveOptions, StateOptions, check_options
from varstore.model.store import save
from varstore.storage.memory import available_memory
from varstore.training.tree import flatten
from varstore.values.lazy import LazyArray
from varstore.values.plan import SavePlan, plan_save

__all__ = ["AsyncOptions", "BackgroundSaver", "PendingSave", "WhenBusy", "save_async", "save_state_async"]

WhenBusy: TypeAlias = Literal["wait", "refuse"]


class AsyncOptions(StateOptions, total=False):
    """All options of `save_state_async`."""

    copy: bool
    when_busy: WhenBusy
    budget: int | None


_ALIGNMENT = 64
_PIECE = 4 << 20
_log = logging.getLogger("varstore")


class PendingSave:
    """A save that goes on in a thread; the process does not end before it has."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.future: Future[None] = Future()

    def done(self) -> bool:
        """Tell whether it has ended, well or not; never waits."""
        return self.future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended, for so many seconds at most.

        Raises:
            TimeoutError: it has not.
            Exception: whatever the save raised, itself.
        """
        self.future.result(timeout)

    def result(self, timeout: float | None = None) -> Checkpoint:
        """Wait as `wait` does, and open the checkpoint."""
        self.wait(timeout)
        return open_checkpoint(self.path)

    def __repr__(self) -> str:
        state = "going on" if not self.done() else "failed" if self.future.exception() else "done"
        return f"<PendingSave {self.path!r}: {state}>"


class _Turn:
    """One save's turn with the buffers, which are its own until it `is_over`.

    Ctrl-C can end the caller's code between any two steps, and what it has learnt is lost then. So whether the thread
    took the turn is not learnt but asked, as often as needed: whoever is first owns it, and the answer stays.
    """

    def __init__(self, pending: PendingSave, job: Callable[[], None]) -> None:
        self.is_handed_over = False
        """The call that began it came to its end: nobody may take it from the thread any more."""
        self._pending = pending
        self._job: Callable[[], None] | None = job
        self._owner: dict[str, str] = {}
        self._running = threading.Lock()
        self._running.acquire()

    def _is_owned_by(self, who: str) -> bool:
        return self._owner.setdefault("owner", who) == who  # one step, and the same answer each time

    def work(self) -> None:
        """Do the job and tell how it ended, in the thread that takes the turn; nothing where it was withdrawn."""
        if not self._is_owned_by("thread"):
            return
        job, self._job = self._job, None
        assert job is not None
        tell = _done(self._pending, job)
        del job  # lets go of the arrays
        self._running.release()
        tell()

    def is_over(self) -> bool:
        """Tell whether the thread is done with the buffers or, of a call that was interrupted, will never begin."""
        if not self.is_handed_over and self._is_owned_by("nobody"):
            self._job = None
            return True
        return not self._running.locked()

    def wait(self) -> None:
        """Return when it is over."""
        if not self.is_over():
            with self._running:
                pass


class BackgroundSaver:
    """The buffers, and the turns, of saves that are written one after another.

    Locks are taken by `with` and nothing else: no Ctrl-C comes between the lock and the block.
    """

    def __init__(self) -> None:
        self._calls = threading.Lock()
        self._turn: _Turn | None = None
        self._buffer = np.empty(0, np.uint8)

    @property
    def buffered(self) -> int:
        """Bytes that the buffers take, between saves too."""
        return self._buffer.nbytes

    def release(self) -> None:
        """Wait for the present save and give its buffers back to the system."""
        with self._calls:
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
        **save_options: Unpack[SaveOptions],
    ) -> PendingSave:
        """Copy the variables, begin to write them, and return; see `save_async`.

        `after` is called in the thread once the checkpoint is complete; what it raises is the save's error.
        """
        if when_busy not in ("wait", "refuse"):
            raise UsageError("no such mode", field="when_busy", found=repr(when_busy), expected="'wait' or 'refuse'")
        check_options(save_options, SaveOptions, "save_async()")
        plan = plan_save(variables)
        pending = PendingSave(os.fspath(path))
        if when_busy == "refuse" and self._calls.locked():
            raise _busy(path)
        with self._calls:
            if self._turn is not None:
                if when_busy == "refuse" and not self._turn.is_over():
                    raise _busy(path)
                self._turn.wait()
            if budget is None:
                budget = (available_memory() + self.buffered) // 2
            is_late = not copy or _buffer_size(plan) <= budget
            if copy and is_late:
                variables = self._copied(plan)
            job = partial(_save, path, variables, after, save_options)
            if not (is_late and self._hand_over(_Turn(pending, job))):
                _done(pending, job)()
                pending.wait()
        return pending

    def _hand_over(self, turn: _Turn) -> bool:
        """Give the turn to a thread; False where the system or an interpreter that ends refuses a new one."""
        self._turn = turn
        if start(threading.Thread(target=turn.work, name="varstore-save", daemon=False)):
            turn.is_handed_over = True
        else:
            self._turn = None
        return turn.is_handed_over

    def _copied(self, plan: SavePlan) -> dict[str, Any]:
        """Return the variables with every array in the buffer; ties and links stay what they are."""
        if self._buffer.nbytes < (size := _buffer_size(plan)):
            self._buffer = np.empty(0, np.uint8)  # the old one goes before the new one comes
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
    return UsageError("another save is still being written", path=path, hint='wait for it, or use when_busy="wait"')


def _done(pending: PendingSave, job: Callable[[], None]) -> Callable[[], None]:
    """Do the job; return what tells those who wait for it how it ended."""
    try:
        job()
    except BaseException as error:  # raised again by whoever asks
        _log.error("the save to %s failed: %s", pending.path, error)
        return partial(pending.future.set_exception, error)
    return partial(pending.future.set_result, None)


def _copies(targets: list[tuple[np.ndarray | LazyArray, np.ndarray]]) -> Iterator[Callable[[], None]]:
    """Yield jobs that copy; what is on a device is fetched between them, one at a time."""
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


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _save(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    after: Callable[[], object] | None,
    options: SaveOptions,
) -> None:
    save(path, variables, **options)
    if after is not None:
        after()


_shared = BackgroundSaver()


def save_async(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    copy: bool = True,
    when_busy: WhenBusy = "wait",
    budget: int | None = None,
    **save_options: Unpack[SaveOptions],
) -> PendingSave:
    """Copy the variables, begin to save them, and return; the arrays may change at once.

    The copies go into buffers that the next save uses again. Variables of other checkpoints are linked. A save
    that fails is logged, and its error raised by the `PendingSave`. The process does not end before it is done.

    Args:
        copy: False if nothing will change the arrays before the save is done; they are written where they are.
        when_busy: what to do while an earlier save is being written: "wait" for it, or "refuse".
        budget: bytes that the copies may take; by default half of what this process may still use, by the machine's
            memory, its control groups' limits and ``RLIMIT_AS``. A save that needs more is written before the call
            returns.
        save_options: those of `varstore.save`.

    Raises:
        UsageError: another save goes on and `when_busy` is "refuse".
        InvalidName, UnsupportedDtype: now; what only writing can tell is raised by the `PendingSave`.
    """
    return _shared.save(path, variables, copy=copy, when_busy=when_busy, budget=budget, **save_options)


def save_state_async(path: str | os.PathLike[str], state: Any, **options: Unpack[AsyncOptions]) -> PendingSave:
    """Save nested state as `varstore.save_state` does, in the background as `save_async` does.

    Raises:
        UsageError, InvalidName, UnsupportedDtype: see both.
    """
    flat = flatten(state)
    return _shared.save(path, flat.variables, tree=flat.tree, **options)
