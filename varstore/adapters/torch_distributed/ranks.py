"""The processes that save or load together: what one of them fails at becomes one error on all of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from varstore.disk.threads import thread_count
from varstore.errors import StorageError, UsageError, VarstoreError
from varstore.text.hints import listed

__all__ = ["Ranks"]

Result = TypeVar("Result")


class _Outcome(NamedTuple):
    """What one rank did: its result; or its error, one of varstore's, or the text of another one."""

    result: Any = None
    error: VarstoreError | None = None
    other: str = ""
    is_passing: bool = False


class Ranks:
    """The processes of a group; without one, those of the default group; where there is none, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        is_together = dist.is_available() and dist.is_initialized()
        self._group = group
        self.size: int = dist.get_world_size(group) if is_together else 1
        self.rank: int = dist.get_rank(group) if is_together else 0
        if self.rank < 0:
            raise UsageError(
                "this process is not in the group",
                field="process_group",
                hint="call it only in the processes of the group",
            )

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
        except VarstoreError as error:
            own = error
            outcome = _Outcome(error=_portable(error), is_passing=is_passing is not None and is_passing(error))
        except BaseException as error:  # Ctrl-C too: the other ranks wait for this one
            own = error
            outcome = _Outcome(other=f"{type(error).__name__}: {error}")
        try:
            outcomes = self._gathered(outcome)
        except RuntimeError as error:
            raise own or _lost(error) from (None if own else error)
        if own is not None and not isinstance(own, VarstoreError):
            raise own
        if any(outcome.is_passing for outcome in outcomes):
            return None
        failure = self._failure(outcomes)
        if failure is not None:
            raise failure from own
        return [outcome.result for outcome in outcomes]

    def _gathered(self, outcome: _Outcome) -> Sequence[_Outcome]:
        if self.size == 1:
            return [outcome]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        return outcomes

    def _failure(self, outcomes: Sequence[_Outcome]) -> VarstoreError | None:
        errors = [(rank, outcome.error) for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if errors:
            rank, error = errors[0]
            same = [str(other) for other, found in errors if str(found) == str(error)]
            if len(same) == self.size:
                return error
            return _with_row(error, f"on rank {listed(same)} of {self.size}")
        others = [(rank, outcome.other) for rank, outcome in enumerate(outcomes) if outcome.other]
        if not others:
            return None
        rank, text = others[0]
        return UsageError(f"rank {rank} of {self.size} failed", found=text, hint="see what that rank printed")

    @property
    def threads(self) -> int:
        """The number of threads of this rank where all ranks of a machine, which torchrun tells, work at once."""
        try:
            beside = int(os.environ["LOCAL_WORLD_SIZE"])
        except (KeyError, ValueError):
            beside = self.size
        return max(1, thread_count(None) // max(1, min(beside, self.size)))


def _portable(error: VarstoreError) -> VarstoreError:
    """Return an error that other processes understand: what it found may be any object."""
    sent = copy.copy(error)
    sent.found = None if error.found is None else str(error.found)
    sent.expected = None if error.expected is None else str(error.expected)
    return sent


def _with_row(error: VarstoreError, row: str) -> VarstoreError:
    error.rows = (*error.rows, row)
    error.args = (error._message(),)
    return error


def _lost(error: RuntimeError) -> StorageError:
    return StorageError(
        "the ranks do not reach each other: one of them has ended, or does not take part",
        found=str(error).partition("\n")[0].partition(". ")[0],
        hint="see what the other ranks printed; every rank of the process group has to make this call",
    )
