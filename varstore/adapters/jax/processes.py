"""The processes of a program while they save or load together: short messages, with limits to how long one waits.

Messages go through the key-value store that `jax.distributed` has for all processes. They do not need the devices, so
a process that has died is an error and not a collective operation that never ends. Each process changes a key of its
own every second; one whose key stays the same is taken for dead. What fails in one process becomes the error of all.

Of those that take part, the first one gathers what the others say, and tells them what follows from it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import jax

from varstore import errors
from varstore.errors import StorageError, UsageError, VarstoreError

__all__ = ["Processes", "client"]

Value = TypeVar("Value")

_BEAT = 1.0
"""Seconds between two signs of life."""
_SILENCE = 15.0
"""Seconds without a sign of life after which a process is taken for dead."""
_FIELDS = ("problem", "path", "variable", "field", "found", "expected", "hint")
_PATIENCE = 300.0
"""Seconds to wait for a process that has not come yet."""
_calls: dict[tuple[int, ...], itertools.count[int]] = {}
"""The number of the next call, which all processes know by themselves: they make the same calls in the same order."""


def client() -> Any:
    """Return what reaches the service of `jax.distributed`, which jax does not publish; None where there is none."""
    try:
        from jax._src import distributed
    except ImportError:
        return None
    return getattr(distributed.global_state, "client", None)


class Processes:
    """Those of the program's processes that take part in one save or load; a block that an error ends fails in all.

    Args:
        what: "save" or "load", for messages.
        timeout: seconds to wait for a process that does not make this call.
        members: the indices of the processes that take part, which has this one; by default, all.

    Raises:
        UsageError: `jax.distributed` is not initialized.
    """

    def __init__(self, what: str, timeout: float = _PATIENCE, members: Iterable[int] | None = None) -> None:
        self._client = client()
        if self._client is None:
            raise UsageError(
                "this program has several processes that cannot reach each other",
                hint="call jax.distributed.initialize() first, in every process",
            )
        self._members = tuple(range(jax.process_count()) if members is None else sorted(members))
        self.index, self.count = self._members.index(jax.process_index()), len(self._members)
        self._what = what
        self._group = hashlib.blake2b(repr(self._members).encode(), digest_size=8).hexdigest()
        self._number = next(_calls.setdefault(self._members, itertools.count()))
        self._timeout = timeout
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="varstore-alive", daemon=True)

    def __enter__(self) -> Processes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            failure = error and self._failure(error)
        finally:
            self._ended.set()
            self._thread.join()
        if failure is not None and failure is not error:
            raise failure from None

    def gather(self, what: str, text: str) -> list[str] | None:
        """Give a text to the first process, where the texts of all come back in their order; None in the others.

        Raises:
            StorageError: another process is dead, or does not come.
            Exception: another process failed; the end of the block raises its error.
        """
        if self.index:
            self._tell(f"{what}/{self.index}", text)
            return None
        others = self._wait({process: f"{what}/{process}" for process in range(1, self.count)})
        with contextlib.suppress(RuntimeError):  # all have left the call before this one
            self._client.key_value_delete(f"varstore/{self._group}/{self._number - 1}")
        return [text, *(others[process] for process in range(1, self.count))]

    def scatter(self, what: str, texts: Sequence[str] | None) -> str:
        """Return this process's text of those that the first one gives to all; raises what `gather` does."""
        if texts is None:
            return self._wait({0: f"{what}/{self.index}"})[0]
        for process in range(1, self.count):
            self._tell(f"{what}/{process}", texts[process])
        return texts[0]

    def watched(self, values: Iterable[Value]) -> Iterator[Value]:
        """Yield values for as long as no other process fails."""
        looked = time.monotonic()
        for value in values:
            if time.monotonic() - looked > _BEAT:
                self._require_well(self._states())
                looked = time.monotonic()
            yield value

    def agree(self, what: str, text: str, verdict: Callable[[list[str]], str]) -> str:
        """Return, in all processes, the verdict of the first on the texts of all; raises what `gather` does."""
        texts = self.gather(what, text)
        return self.scatter(f"{what}-verdict", None if texts is None else [verdict(texts)] * self.count)

    def _failure(self, error: BaseException) -> BaseException:
        """Return the error that this process ends with: its own, of which it tells the others, or an earlier one."""
        if isinstance(error, _Elsewhere):
            return error.error
        with contextlib.suppress(RuntimeError):
            try:
                self._require_well(self._states())
            except _Elsewhere as earlier:
                return earlier.error if isinstance(error, VarstoreError) else error
            self._tell(f"state/failed/{self.index}", json.dumps(_portable(error)))
        return error

    def _key(self, what: str) -> str:
        return f"varstore/{self._group}/{self._number}/{what}"

    def _name(self, process: int) -> str:
        return f"process {self._members[process]} of {jax.process_count()}"

    def _tell(self, what: str, text: str) -> None:
        try:
            self._client.key_value_set(self._key(what), text)
        except RuntimeError as error:
            raise _unreachable(error) from error

    def _live(self) -> None:
        key = self._key(f"state/alive/{self.index}")
        for beat in itertools.count():
            with contextlib.suppress(RuntimeError):  # whoever waits for a message sees it too
                self._client.key_value_set(key, str(beat), allow_overwrite=True)
            if self._ended.wait(_BEAT):
                return

    def _states(self) -> dict[str, str]:
        try:
            found: list[tuple[str, str]] = self._client.key_value_dir_get(self._key("state/"))
        except RuntimeError as error:
            raise _unreachable(error) from error
        return {key.partition("/state/")[2]: text for key, text in found}

    def _require_well(self, states: dict[str, str]) -> None:
        for process in range(self.count):
            if process != self.index and (text := states.get(f"failed/{process}")) is not None:
                raise _Elsewhere(_rebuilt(json.loads(text), f"in {self._name(process)}"))

    def _wait(self, keys: dict[int, str]) -> dict[int, str]:
        """Return the messages under these keys, by the processes that write them."""
        found: dict[int, str] = {}
        beats: dict[int, str | None] = {}
        since = dict.fromkeys(keys, time.monotonic())
        while left := [process for process in keys if process not in found]:
            try:
                found[left[0]] = self._client.blocking_key_value_get(self._key(keys[left[0]]), int(_BEAT * 1000))
                continue
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise _unreachable(error) from error
            states, now = self._states(), time.monotonic()
            self._require_well(states)
            for process in left:
                beat = states.get(f"alive/{process}")
                if beat != beats.get(process):
                    beats[process], since[process] = beat, now
                limit = self._timeout if beat is None else min(_SILENCE, self._timeout)
                if now - since[process] > limit:
                    raise self._silent(process, now - since[process], has_come=beat is not None)
        return found

    def _silent(self, process: int, seconds: float, *, has_come: bool) -> StorageError:
        return StorageError(
            f"a process died during the {self._what}"
            if has_come
            else f"a process does not take part in the {self._what}",
            number=errno.ETIMEDOUT,
            found=f"no sign of life from {self._name(process)} for {seconds:.0f} seconds",
            hint="see what it printed" if has_come else "make the same call in every process, within the timeout",
        )


class _Elsewhere(Exception):
    """Carries the error of another process to where this one gives up."""

    def __init__(self, error: VarstoreError) -> None:
        super().__init__(error)
        self.error = error


def _unreachable(error: RuntimeError) -> StorageError:
    return StorageError(
        "the processes do not reach each other through jax.distributed",
        number=errno.ENOTCONN,
        found=str(error).partition("\n")[0],
        hint="see what process 0 printed, which starts that service",
    )


def _portable(error: BaseException) -> dict[str, Any]:
    """Return an error as data for the other processes."""
    if not isinstance(error, VarstoreError):
        return {"kind": "", "problem": f"{type(error).__name__}: {error}"}
    fields = {field: getattr(error, field) for field in _FIELDS}
    return {
        **{field: value if value is None else str(value) for field, value in fields.items()},
        "kind": type(error).__name__,
        "rows": error.rows,
        "number": error.errno if isinstance(error, OSError) else None,
    }


def _rebuilt(said: dict[str, Any], row: str) -> VarstoreError:
    """Return the error of another process."""
    kind = getattr(errors, said.pop("kind"), None)
    if kind is None:
        return UsageError("another process failed", rows=[row], found=said["problem"], hint="see what it printed")
    number = said.pop("number")
    problem, rows = said.pop("problem"), (*said.pop("rows"), row)
    error: VarstoreError = kind(problem, rows=rows, **said)
    if isinstance(error, OSError):
        error.errno = number
    return error
