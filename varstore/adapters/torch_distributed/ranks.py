"""The processes that save or load together: what one of them fails at becomes one error on all of them.

Where all ranks of the run take part, they talk in groups of their own. If one of them ends, those that speak to it hear
of that at once, and the others wait for these; so whoever hears of it closes that group, and nobody waits any more. The
group of the run stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from varstore.disk.threads import thread_count
from varstore.errors import StorageError, UsageError, VarstoreError
from varstore.text.hints import listed

__all__ = ["Ranks", "are_ranks", "in_own_group", "lost", "open_group", "require_member", "threads_beside", "with_row"]

Result = TypeVar("Result")

_groups: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
"""The groups that ranks talk in, by the group that they are of, and by what they talk about."""


class _Outcome(NamedTuple):
    """What one rank did: its result; or its error, one of varstore's, or the text of another one."""

    result: Any = None
    error: VarstoreError | None = None
    other: str = ""
    is_passing: bool = False


def are_ranks() -> bool:
    """Tell whether this is one of several processes that can reach each other, and not one by itself."""
    return bool(dist.is_available() and dist.is_initialized())


class Ranks:
    """The processes of a group; without one, those of the default group; where there is none, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if are_ranks():
            require_member(group)
            open_group(group, about="loads")
        self._group = group
        self.size: int = dist.get_world_size(group) if are_ranks() else 1
        self.rank: int = dist.get_rank(group) if are_ranks() else 0

    def together(
        self, do: Callable[[], Result], *, is_passing: Callable[[VarstoreError], bool] | None = None
    ) -> list[Result] | None:
        """Do something on every rank, and return what each returned, by rank.

        None if a rank failed with an error that `is_passing`: all have to try again.

        Raises:
            VarstoreError: a rank failed. Every rank raises the error of the first one that did; a rank whose own error
                is not varstore's raises that.
            StorageError: a process has ended, or does not take part.
        """
        own: BaseException | None = None
        outcome = _Outcome()
        try:
            outcome = _Outcome(result=do())
        except BaseException as error:  # Ctrl-C too: the other ranks wait for this one
            own = error
            outcome = _outcome_of(error, is_passing)
        try:
            outcomes = self._gathered(outcome)
        except RuntimeError as error:
            raise own or lost(error, _ALL_CALL) from (None if own else error)
        if own is not None and not isinstance(own, VarstoreError):
            raise own
        if any(outcome.is_passing for outcome in outcomes):
            return None
        failure = self._failure(outcomes)
        if failure is not None:
            raise failure from own
        return [outcome.result for outcome in outcomes]

    def decided(self, decide: Callable[[], Result]) -> Result:
        """Return on every rank what a function returns on the first one; one message goes to each.

        Raises:
            Exception: what it raises on the first one; the others raise that if it is varstore's.
            StorageError: a process has ended, or does not take part.
        """
        own: BaseException | None = None
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [_Outcome(result=decide())]
            except BaseException as error:  # Ctrl-C too: the other ranks wait for this one
                own = error
                told = [_outcome_of(error)]
        try:
            if self.size > 1:
                in_own_group(
                    lambda group: dist.broadcast_object_list(told, group=group, group_src=0), self._group, about="loads"
                )
        except RuntimeError as error:
            raise own or lost(error, _ALL_CALL) from (None if own else error)
        if own is not None:
            raise own
        outcome: _Outcome = told[0]
        failure = self._failure([outcome])
        if failure is not None:
            raise failure
        result: Result = outcome.result
        return result

    def _gathered(self, outcome: _Outcome) -> Sequence[_Outcome]:
        if self.size == 1:
            return [outcome]
        outcomes: list[Any] = [None] * self.size
        in_own_group(lambda group: dist.all_gather_object(outcomes, outcome, group=group), self._group, about="loads")
        return outcomes

    def _failure(self, outcomes: Sequence[_Outcome]) -> VarstoreError | None:
        errors = [(rank, outcome.error) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if errors:
            rank, error = errors[0]
            same = [str(other) for other, found in errors if str(found) == str(error)]
            if len(same) == self.size:
                return error
            return with_row(error, f"on rank {listed(same)} of {self.size}")
        others = [(rank, outcome.other) for rank, outcome in enumerate(outcomes) if outcome.other]
        if not others:
            return None
        rank, text = others[0]
        return UsageError(f"rank {rank} of {self.size} failed", found=text, hint="see what that rank printed")


def threads_beside(ranks: int) -> int:
    """Return the number of threads of one of these ranks where all of a machine work at once; torchrun tells which."""
    try:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        here = ranks
    return max(1, thread_count(None) // max(1, min(here, ranks)))


def _outcome_of(error: BaseException, is_passing: Callable[[VarstoreError], bool] | None = None) -> _Outcome:
    if not isinstance(error, VarstoreError):
        return _Outcome(other=f"{type(error).__name__}: {error}")
    return _Outcome(error=_portable(error), is_passing=is_passing is not None and is_passing(error))


def _portable(error: VarstoreError) -> VarstoreError:
    """Return an error that other processes understand: what it found may be any object."""
    sent = copy.copy(error)
    sent.found = None if error.found is None else str(error.found)
    sent.expected = None if error.expected is None else str(error.expected)
    return sent


_ALL_CALL = "see what the other ranks printed; every rank of the process group has to make this call"


def require_member(group: dist.ProcessGroup | None, path: str | None = None) -> None:
    """Raise if this process is not in a group."""
    if dist.get_rank(group) < 0:
        raise UsageError(
            "this process is not in the group",
            path=path,
            field="process_group",
            hint="call it only in the processes of the group",
        )


def open_group(group: dist.ProcessGroup | None, *, about: str) -> None:
    """Make the group that ranks talk in about something, where all take part; they all make this call."""
    world = dist.group.WORLD
    if group is None or group is world:
        groups = _groups.setdefault(world, {})
        if about not in groups:
            groups[about] = dist.new_group(backend="gloo")


def in_own_group(talk: Callable[[Any], Result], group: dist.ProcessGroup | None, *, about: str) -> Result:
    """Let ranks talk: in the group that `open_group` made if all take part, and in the given one otherwise.

    That group is closed if one of the ranks does not answer.
    """
    world = dist.group.WORLD
    if group is not None and group is not world:
        return talk(group)
    groups = {} if world is None else _groups.get(world, {})
    own = groups.get(about)
    if own is None:
        raise RuntimeError("the group was closed when an earlier call failed")
    try:
        return talk(own)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # connections close with the last reference to the group
        del groups[about]
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(own)
        del own
        raise


def with_row(error: VarstoreError, row: str) -> VarstoreError:
    """Return a copy of an error whose message has one more row."""
    told = copy.copy(error)
    told.rows = (*error.rows, row)
    told.args = (told._message(),)
    return told


def lost(error: RuntimeError, hint: str, path: str | None = None) -> StorageError:
    """Return the error of ranks that torch cannot reach."""
    return StorageError(
        "the ranks do not reach each other: one of them has ended, or does not take part",
        path=path,
        found=str(error).partition("\n")[0].partition(". ")[0],
        hint=hint,
    )
