"""Checkpoints of a run: one folder per step, saved and deleted by policies; only complete ones count.

The order of the steps is what makes a crash harmless. A new checkpoint is complete before an old one is deleted, and an
old one is renamed to a staging name before its files are removed. So at any moment there are complete checkpoints, and
folders whose names say that they are leftovers, which the next manager removes.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Unpack, cast

from varstore.disk.read.checkpoint import is_being_read, open_checkpoint
from varstore.disk.save.staging import clean_staging, set_aside
from varstore.disk.threads import start
from varstore.errors import CheckpointExists, CheckpointNotFound, UsageError
from varstore.model.options import LoadOptions, RunOptions, SaveOptions, check_options
from varstore.model.store import save
from varstore.text.escape import one_line
from varstore.training.background import BackgroundSaver, PendingSave, WhenBusy
from varstore.training.policies import Best, BestMode, EverySteps, Keep, Saved, When, policies_of, retain
from varstore.training.series import KEY, Member, Series
from varstore.training.state import load_state
from varstore.training.tensors import MapLocation
from varstore.training.tree import flatten, prune

__all__ = ["CheckpointManager", "Retention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What `CheckpointManager.prune` did, by step.

    `kept` and `deleted` give the reasons; `held` too, for steps that are to be deleted but are being read. `trimmed`
    gives the patterns of the variables that were removed.
    """

    kept: Mapping[int, str]
    deleted: Mapping[int, str]
    held: Mapping[int, str]
    trimmed: Mapping[int, tuple[str, ...]]

    def __str__(self) -> str:
        rows = [(step, "kept", why) for step, why in self.kept.items()]
        rows += [(step, "deleted", why) for step, why in self.deleted.items()]
        rows += [(step, "held", why) for step, why in self.held.items()]
        rows += [(step, "trimmed", "without " + ", ".join(patterns)) for step, patterns in self.trimmed.items()]
        return "\n".join(f"{step:>10}  {what:<8} {one_line(why)}" for step, what, why in sorted(rows))


class CheckpointManager:
    """Save the steps of a run into a directory, and keep those that its policies want.

    Only complete checkpoints count. Leftovers of crashed saves and deletions are removed when the manager is made.
    Everything else in the directory is left as it is, and `others` lists it. A ``with`` block waits for background
    saves at its end.

    Args:
        directory: where the checkpoints are; the first save creates it.
        save_when: when `should_save` returns True. Default: at every step. Policies are combined with ``|``.
        keep: which steps are kept. Default: all. Policies are combined with ``|``.
        keep_parts: patterns of variables, each with a policy for the kept steps in which these variables stay, as in
            ``{"optimizer/*": Latest(2)}``. In the other steps they are removed from the checkpoint; nested state
            loses its dict entries, and lists get None in their place.
        link_unchanged: link variables that equal those of the latest step instead of writing them.
        background: save in a thread, as `varstore.save_async` does.
        when_busy: as for `varstore.save_async`.
        budget: as for `varstore.save_async`.
        prefix: what the names of the folders begin with; the step follows.
        clock: a function that returns the time in seconds since the epoch.
        save_options: `durable`, `threads`, `progress` and `variable_attributes` of `varstore.save`, for every save.

    Raises:
        UsageError: the prefix contains ``/`` or begins with a dot.

    Example:
        >>> weights, keep = np.zeros(3), vs.Latest(2) | vs.Best("loss")
        >>> with vs.CheckpointManager("run", keep=keep, background=True) as manager:
        ...     for step in range(1, 6):
        ...         weights += 1
        ...         pending = manager.save(step, {"w": weights}, metrics={"loss": abs(step - 2)})
        >>> [saved.step for saved in manager.all()]
        [2, 4, 5]
        >>> manager.restore(manager.best())
        {'w': array([2., 2., 2.])}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_when: When | None = None,
        keep: Keep | None = None,
        keep_parts: Mapping[str, Keep] | None = None,
        link_unchanged: bool = True,
        background: bool = False,
        when_busy: WhenBusy = "wait",
        budget: int | None = None,
        prefix: str = "step-",
        clock: Callable[[], float] = time.time,
        **save_options: Unpack[RunOptions],
    ) -> None:
        check_options(save_options, RunOptions, "CheckpointManager()")
        if "/" in prefix or prefix.startswith("."):
            raise UsageError(
                "must not contain '/' or begin with a dot", field="prefix", found=repr(prefix), expected="as 'step-'"
            )
        self._series = Series(os.path.abspath(directory), prefix)
        self._save_when = save_when or EverySteps(1)
        self._keep = keep
        self._keep_parts = dict(keep_parts or {})
        self._link_unchanged = link_unchanged
        self._saver = BackgroundSaver() if background else None
        self._when_busy: WhenBusy = when_busy
        self._budget = budget
        self._clock = clock
        self._save_options = save_options
        self._pending: PendingSave | None = None
        self._removal: threading.Thread | None = None
        self._pruning = threading.Lock()
        if os.path.isdir(self.directory):
            clean_staging(self.directory)
        self._last = self.latest()

    @property
    def directory(self) -> str:
        """The absolute path of the directory."""
        return self._series.directory

    def all(self) -> tuple[Saved, ...]:
        """Return the complete checkpoints in the order of their steps.

        Each has `step`, `time`, `metrics` and `path`, and can be given to `open`, `load` and `load_state` as a path.
        """
        return tuple(member.saved for member in self._series.members())

    def latest(self) -> Saved | None:
        """Return the complete checkpoint with the highest step, None if there is none."""
        return next(reversed(self.all()), None)

    def best(self, metric: str | None = None, mode: BestMode = "min") -> Saved | None:
        """Return the checkpoint with the best value of a metric, None if none has the metric.

        Args:
            metric: default that of the `Best` policy in `keep`, with its mode.
            mode: "min" or "max", for a metric that is given.

        Raises:
            UsageError: no metric is given, and `keep` does not contain a `Best` policy.
        """
        rules = [rule for rule in policies_of(self._keep) if isinstance(rule, Best)] if self._keep else []
        if metric is not None:
            rules = [Best(metric, mode=mode)]
        if not rules:
            raise UsageError("no metric to compare by", hint="name one, or give the manager a Best policy")
        return next(iter(rules[0].ranked(self.all())), None)

    def others(self) -> dict[str, str]:
        """Return the names of everything else in the directory and the reason why each is not a step of the run."""
        return self._series.others()

    def should_save(self, step: int) -> bool:
        """Tell whether the policies want this step saved and it is not saved yet."""
        if not self._save_when.should_save(step, self._clock(), self._last):
            return False
        return (self._last is None or self._last.step != step) and not os.path.lexists(self._series.path(step))

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> PendingSave:
        """Save variables or nested state as a step, then delete what the policies no longer want.

        With `background`, the arrays may change as soon as this returns, while a thread writes; without it, the save
        is complete when this returns.

        Args:
            step: the number of the step, from 0.
            state: variables by name, or nested state, as for `varstore.save_state`.
            metrics: numbers by name, for `Best` and `KeepIf`.
            attributes: JSON data to keep with the checkpoint.
            overwrite: replace the step if it is saved already.

        Raises:
            CheckpointExists: the step is saved already, and `overwrite` is False.
            Exception: the error of the background save before this one; it is raised once.
            UsageError, InvalidName, UnsupportedDtype, StorageError: see `varstore.save_state`.
        """
        step = operator.index(step)
        if step < 0:
            raise UsageError("must not be negative", field="step", found=step)
        path = self._series.path(step)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        saved = Saved(step=step, time=self._clock(), metrics=numbers, path=path)
        flat = flatten(state)
        if self._saver is None or self._when_busy == "wait" or (self._pending is not None and self._pending.done()):
            self._finish_pending()
        if not overwrite and os.path.lexists(path):
            raise CheckpointExists("this step is saved already", path=path, hint="pass overwrite=True to replace it")
        base = self.latest() if self._link_unchanged else None
        facts = {"step": step, "time": saved.time, "metrics": numbers}
        options: SaveOptions = {
            "attributes": {**(attributes or {}), KEY: facts},
            "tree": flat.tree,
            "base": base and base.path,
            "overwrite": overwrite,
        }
        options |= cast(SaveOptions, self._save_options)
        if self._saver is None:
            save(path, flat.variables, **options)
            self._last = saved
            self.prune()
            pending = PendingSave(path)
            pending.future.set_result(None)
            return pending
        pending = self._saver.save(
            path, flat.variables, when_busy=self._when_busy, budget=self._budget, after=self.prune, **options
        )
        self._pending, self._last = pending, saved
        return pending

    def restore(
        self, step: int | Saved | None = None, *, map_location: MapLocation = None, **load_options: Unpack[LoadOptions]
    ) -> Any:
        """Load the state of a step; see `varstore.load_state`.

        Args:
            step: a number, or a record that `latest`, `best` or `all` returned. Default: the latest step.
            map_location: as for `varstore.load_state`.
            load_options: `verify`, `threads` and `progress`, as for `varstore.load`.

        Raises:
            CheckpointNotFound: there is no such step, or no step at all.
        """
        saved = self.latest() if step is None else step
        if saved is None:
            raise CheckpointNotFound("there is no complete checkpoint of this run", path=self.directory)
        path = saved.path if isinstance(saved, Saved) else self._series.path(operator.index(saved))
        return load_state(path, map_location=map_location, **load_options)

    def wait(self) -> None:
        """Wait until everything is written and deleted.

        Raises:
            Exception: the error of a background save; it is raised once.
        """
        self._finish_pending()
        if self._removal is not None:
            self._removal.join()

    def _finish_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.wait()
            except BaseException:
                self._last = self.latest()  # the step is not saved, and may be tried again
                raise

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()

    def prune(self, *, dry_run: bool = False) -> Retention:
        """Delete steps and remove variables that the policies no longer want, as every `save` does.

        A step that this process has open, through a handle that is not closed, is held: it is deleted by a later call.

        Args:
            dry_run: only return what would be done.

        Returns:
            What was kept, deleted, held and trimmed, with the reasons; `print` shows it.
        """
        with self._pruning:
            members = self._series.members()
            retention = self._retention(members)
            if not dry_run:
                for step, patterns in retention.trimmed.items():
                    self._trim(step, patterns)
                self._delete(list(retention.deleted))
            return retention

    def _retention(self, members: list[Member]) -> Retention:
        reasons = retain(self._keep, [member.saved for member in members])
        stay = [member for member in members if member.saved.step in reasons]
        unwanted = {member.saved.step: member.saved.path for member in members if member.saved.step not in reasons}
        why = f"not {self._keep}"
        held = {step: f"{why}, but being read" for step, path in unwanted.items() if is_being_read(path)}
        trimmed: dict[int, tuple[str, ...]] = {}
        whole = {pattern: retain(keep, [m.saved for m in stay]) for pattern, keep in self._keep_parts.items()}
        for member in stay:
            step = member.saved.step
            patterns = tuple(p for p, steps in whole.items() if step not in steps and p not in member.trimmed)
            if patterns and not is_being_read(member.saved.path):
                trimmed[step] = patterns
        return Retention(
            kept={step: ", ".join(because) for step, because in reasons.items()},
            deleted={step: why for step in unwanted if step not in held},
            held=held,
            trimmed=trimmed,
        )

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                set_aside(self._series.path(step))
        if steps:
            earlier = self._removal
            self._removal = threading.Thread(target=self._remove, args=(steps, earlier), name="varstore-delete")
            if not start(self._removal):
                self._removal = None
                self._remove(steps, earlier)

    def _remove(self, steps: list[int], earlier: threading.Thread | None) -> None:
        if earlier is not None:
            earlier.join()
        for step in steps:
            clean_staging(self.directory, name=f"{self._series.prefix}{step}")

    def _trim(self, step: int, patterns: tuple[str, ...]) -> None:
        """Replace a checkpoint by one without some variables; the others are linked, and no values are read."""
        with open_checkpoint(self._series.path(step)) as checkpoint:
            stay = checkpoint.select(exclude=patterns)
            tree = ""
            if checkpoint.tree is not None:
                node = prune(checkpoint.tree, lambda name: name not in stay)
                tree = json.dumps(node, ensure_ascii=False, separators=(",", ":"))
            facts = dict(checkpoint.attributes.get(KEY) or {"time": self._time(step)})
            facts["trimmed"] = [*facts.get("trimmed", ()), *patterns]
            attributes = {**checkpoint.attributes, KEY: facts}
            durable = self._save_options.get("durable", True)
            save(checkpoint.path, stay, attributes=attributes, tree=tree, overwrite=True, durable=durable)

    def _time(self, step: int) -> float:
        return next(saved.time for saved in self.all() if saved.step == step)
