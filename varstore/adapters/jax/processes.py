"""The processes of a program while they save together: short messages, with limits to how long one waits for another.

Messages go through the key-value store that `jax.distributed` has for all processes. They do not need the devices, so
a process that has died is an error and not a collective operation that never ends. Each process changes a key of its
own every second; one whose key stays the same is taken for dead. What fails in one process becomes the error of all.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import jax
from jax._src import distributed

from varstore import errors
from varstore.errors import StorageError, UsageError, VarstoreError

__all__ = ["Processes"]

Value = TypeVar("Value")

_BEAT = 1.0
"""Seconds between two signs of life."""
_SILENCE = 15.0
"""Seconds without a sign of life after which a process is taken for dead."""
_FIELDS = ("problem", "path", "variable", "field", "found", "expected", "hint")
_calls = itertools.count()
"""The number of the next save, which all processes know by itself: they save the same things in the same order."""


class Processes:
    """The processes of the program during one save; leave the block, and they no longer hear of this one.

    Args:
        timeout: seconds to wait for a process that does not make this call.

    Raises:
        UsageError: `jax.distributed` is not initialized.
    """

    def __init__(self, timeout: float) -> None:
        self._client: Any = distributed.global_state.client
        if self._client is None:
            raise UsageError(
                "this program has several processes that cannot reach each other",
                hint="call jax.distributed.initialize() first, in every process",
            )
        self.index, self.count = jax.process_index(), jax.process_count()
        self._number = next(_calls)
        self._timeout = timeout
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="varstore-alive", daemon=True)

    def __enter__(self) -> Processes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def gather(self, what: str, text: str) -> list[str] | None:
        """Give a text to process 0, where the texts of all come back in their order; None in the others.

        Raises:
            VarstoreError: another process failed, or is dead.
        """
        if self.index:
            self._tell(f"{what}/{self.index}", text)
            return None
        others = self._wait({process: f"{what}/{process}" for process in range(1, self.count)})
        return [text, *(others[process] for process in range(1, self.count))]

    def scatter(self, what: str, texts: Sequence[str] | None) -> str:
        """Return this process's text of those that process 0 gives to all; raises what `gather` does."""
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

    def failure(self, error: BaseException) -> BaseException:
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

    def forget_earlier(self) -> None:
        """Remove the messages of the save before this one, which all processes have left when they are in this one."""
        with contextlib.suppress(RuntimeError):
            self._client.key_value_delete(f"varstore/{self._number - 1}")

    def _key(self, what: str) -> str:
        return f"varstore/{self._number}/{what}"

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
                raise _Elsewhere(_rebuilt(json.loads(text), f"in process {process} of {self.count}"))

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
                    raise _silent(process, self.count, now - since[process], has_come=beat is not None)
        return found


class _Elsewhere(Exception):
    """Carries the error of another process to where this one gives up."""

    def __init__(self, error: VarstoreError) -> None:
        super().__init__(error)
        self.error = error


def _silent(process: int, count: int, seconds: float, *, has_come: bool) -> StorageError:
    which = f"process {process} of {count}"
    return StorageError(
        "a process died while all were saving" if has_come else "a process does not take part in the save",
        number=errno.ETIMEDOUT,
        found=f"no sign of life from {which} for {seconds:.0f} seconds",
        hint="see what it printed" if has_come else "make the same call in every process, or wait longer with timeout=",
    )


def _unreachable(error: RuntimeError) -> StorageError:
    return StorageError(
        "the processes do not reach each other through jax.distributed",
        number=errno.ENOTCONN,
        found=str(error).partition("\n")[0],
        hint="see what process 0 printed: it runs the service, or starts it",
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
