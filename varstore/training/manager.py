"""Checkpoints of a run: one folder per step, saved and deleted by policies; only complete ones count.

The order of the steps is what makes a crash harmless. A new checkpoint is complete before an old one is deleted, and an
old one is renamed to a staging name before its files are removed. So at any moment there are complete checkpoints, and
folders whose names say that they are leftovers, which the next manager removes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import operator
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, SupportsFloat, TypeVar, Unpack, cast

from varstore.disk.read.checkpoint import Checkpoint, attempts, has_open_handle
from varstore.disk.save.leftovers import clean_staging, set_aside
from varstore.disk.threads import Ending, start
from varstore.errors import (
    CheckpointExists,
    CheckpointNotFound,
    FormatError,
    IncompleteCheckpoint,
    MissingDependency,
    StorageError,
    UsageError,
    VarstoreError,
)
from varstore.layout.manifest import kept_attributes
from varstore.model.options import LoadOptions, Path, RunOptions, SaveOptions, check_options
from varstore.model.store import save
from varstore.storage.directory import locate
from varstore.storage.failures import storage_error, translated
from varstore.storage.forks import tell_children
from varstore.storage.looking import kind_of
from varstore.text.hints import listed, plural
from varstore.text.table import Table
from varstore.training.background import (
    BackgroundSaver,
    PendingSave,
    WhenBusy,
    calling,
    ending_of,
    in_signal_handler,
    is_interrupting,
)
from varstore.training.policies import (
    Best,
    BestMode,
    EverySteps,
    Keep,
    Pinned,
    Saved,
    When,
    keep_of,
    policies_of,
    when_of,
)
from varstore.training.retention import Retention, decide, last_run, next_run, settled_run, unknown_metrics
from varstore.training.series import KEY, Member, Record, Series, Taken, check_files, open_step, require_manifest
from varstore.training.state import load_state
from varstore.training.tensors import MapLocation
from varstore.training.together import Ranks
from varstore.training.tree import flatten, prune
from varstore.values.arguments import checked
from varstore.values.attached import FileContent, is_usable

__all__ = ["CheckpointManager"]


_NOT_WHOLE = (FormatError, IncompleteCheckpoint, CheckpointNotFound, StorageError)
_NAMED = 50
_ROWS = 100
"""Steps that a notebook shows."""
_log = logging.getLogger("varstore")
_Result = TypeVar("_Result")

_LIKE = "varstore.adapters.jax"
"""Restores into the structure of a pytree."""
_GRAPHS = "varstore.bundles.together"
"""Gives the graphs of a checkpoint for new values."""
_RANKS = "varstore.adapters.torch_distributed.managing"
"""Saves and loads for a manager that several ranks share."""


class CheckpointManager:
    """Save the steps of a run into a directory, and keep those that its policies want.

    Only complete checkpoints count. Leftovers of crashed saves and deletions are removed when the manager is made.
    Everything else in the directory is left as it is, and `others` lists it. A ``with`` block waits for background
    saves at its end.

    Whatever the policies say, the highest step, the step that was just saved and steps whose metrics are not known are
    not deleted. After a save of a step that is lower than one in the directory, every step that is saved is kept until
    `rewind` is called. Each deletion is logged, at the level INFO.

    Args:
        directory: where the checkpoints are; the first save creates it.
        save_when: when `should_save` returns True. Default: at every step. Policies are combined with ``|``; a list
            means the same.
        keep: which steps are kept. Default: all. Policies are combined with ``|``; a list means the same. If the
            directory holds steps that the next save would delete, a warning names them.
        keep_parts: patterns of variables, each with a policy for the kept steps in which these variables stay, as in
            ``{"optimizer/*": Latest(2)}``. In the other steps they are removed from the checkpoint; nested state
            loses its dict entries, and lists get None in their place.
        link_unchanged: link variables that equal those of the latest step instead of writing them.
        background: save in a thread, as `varstore.save_async` does.
        when_busy: as for `varstore.save_async`.
        budget: as for `varstore.save_async`.
        prefix: what the names of the folders begin with; the step follows.
        clock: a function that returns the time in seconds since the epoch.
        process_group: a process group of torch.distributed, such as ``torch.distributed.group.WORLD``, whose ranks
            save each step together, as `varstore.adapters.torch_distributed.save` does. Every rank makes a manager with
            the same arguments, and each call except ``repr`` on all of them. The first rank decides what is saved,
            deleted and latest, in its directory, and tells the others. Nothing is linked, and of `save_options` there
            is `durable` only.
        save_options: `durable`, `threads`, `progress`, `variable_attributes`, `files` and `links` of `varstore.save`,
            for every save. Files that did not change are linked to those of the latest step.

    Raises:
        UsageError: an argument is of the wrong type, the directory is a file, or the prefix contains ``/`` or begins
            with a dot.
        MissingDependency: there is a process group, but torch cannot be imported.

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

    @checked
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_when: When | Sequence[When] | None = None,
        keep: Keep | Sequence[Keep] | None = None,
        keep_parts: Mapping[str, Keep | Sequence[Keep]] | None = None,
        link_unchanged: bool = True,
        background: bool = False,
        when_busy: WhenBusy = "wait",
        budget: int | None = None,
        prefix: str = "step-",
        clock: Callable[[], float] = time.time,
        process_group: Any = None,
        **save_options: Unpack[RunOptions],
    ) -> None:
        check_options(save_options, RunOptions, "CheckpointManager()")
        if not {"/", "\0"}.isdisjoint(prefix) or prefix.startswith("."):
            raise UsageError(
                "must not contain '/' or begin with a dot", field="prefix", found=repr(prefix), expected="as 'step-'"
            )
        if not callable(clock):
            raise UsageError("must be a function", field="clock", found=repr(clock))
        self._series = Series(_directory(os.fspath(directory)), prefix)
        self._save_when = when_of(save_when, field="save_when") or EverySteps(1)
        self._keep = keep_of(keep, field="keep")
        self._keep_parts = _parts(keep_parts)
        self._link_unchanged = link_unchanged
        self._ranks = _ranks_of(process_group, save_options)
        self._background = background
        self._saver = BackgroundSaver() if background and self._ranks is None else None
        self._when_busy: WhenBusy = when_busy
        self._budget = budget
        self._clock = clock
        self._save_options = save_options
        self._untold: list[BaseException] = []
        """Errors of background saves and deletions that nobody has heard of yet."""
        self._in_child()
        tell_children(self, CheckpointManager._in_child)
        self._warned: set[str] = set()
        self._last: Saved | None = self._decided(self._begin)

    def _begin(self) -> Saved | None:
        """Clean the directory, warn of what the next save would delete, and return the last step."""
        if os.path.isdir(self.directory):
            cleaned = clean_staging(self.directory)
            for path in cleaned:
                _log.info("removed %s, which an unfinished save or deletion left", path)
            for path, whose in cleaned.kept.items():
                _log.info("kept %s, which belongs to %s", path, whose)
        members = self._series.members()
        self._warn_of_deletions(members)
        return members[-1].saved if members else None

    def _decided(self, decide: Callable[[], _Result]) -> _Result:
        """Return what the first rank decides, or this process, if the manager is its own."""
        return decide() if self._ranks is None else self._ranks.decided(decide)

    def __repr__(self) -> str:
        try:
            members = self._series.members()
        except VarstoreError as error:
            return f"<CheckpointManager {self.directory!r}: {error.problem}>"
        last = f", the last is {members[-1].saved.step}" if members else ""
        return f"<CheckpointManager {self.directory!r}: {plural(len(members), 'step')}{last}>"

    def _repr_html_(self) -> str:
        try:
            members = self._series.members()
        except VarstoreError as error:
            return Table(title=repr(self)[1:-1], notes=[str(error)]).html()
        plan = decide(members, self._keep, self._keep_parts)
        fates = {**plan.kept, **{step: f"to be deleted: {why}" for step, why in {**plan.held, **plan.deleted}.items()}}
        shown = [member.saved for member in members[-_ROWS:]]
        metrics = list(dict.fromkeys(name for saved in shown for name in saved.metrics))
        rows = [
            [
                saved.step,
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved.time)),
                *(f"{saved.metrics[name]:.6g}" if name in saved.metrics else "" for name in metrics),
                fates[saved.step],
            ]
            for saved in shown
        ]
        notes = [f"and {plural(len(members) - len(shown), 'earlier step')}"] if len(shown) < len(members) else []
        headings = ["step", "time", *metrics, "kept"]
        return Table(title=repr(self)[1:-1], headings=headings, rows=rows, notes=notes).html()

    def _in_child(self) -> None:
        """Begin without saves and deletions: the threads of the parent's are not in this process."""
        self._pending: Ending | None = None
        self._set_aside: deque[int] = deque()
        self._removing = threading.Lock()
        self._pruning = threading.Lock()

    def _warn_of_deletions(self, members: list[Member]) -> None:
        plan = decide(members, self._keep, self._keep_parts)
        for verb, steps in (("delete", {**plan.deleted, **plan.held}), ("remove variables from", plan.trimmed)):
            if steps:
                _log.warning(
                    "%s: the next save will %s steps of this directory: %s. prune(dry_run=True) tells why",
                    self.directory,
                    verb,
                    listed([str(step) for step in sorted(steps)], limit=_NAMED),
                )

    @property
    def directory(self) -> str:
        """The absolute path of the directory."""
        return self._series.directory

    def all(self) -> tuple[Saved, ...]:
        """Return the complete checkpoints in the order of their steps.

        Each has `step`, `time`, `metrics` and `path`, and can be given to `open`, `load` and `load_state` as a path.
        """
        return self._decided(lambda: tuple(member.saved for member in self._series.members()))

    def latest(self) -> Saved | None:
        """Return the complete checkpoint with the highest step, None if there is none.

        A step is passed over, with a warning, if one of its files is not there or not as long as it was saved.
        """
        return self._decided(lambda: self._latest(self._series.members()))

    def _latest(self, members: list[Member]) -> Saved | None:
        for member in reversed(members):
            try:
                check_files(member.saved)
            except VarstoreError as error:
                self._warn(f"files of {member.saved.path}", f"step {member.saved.step} is passed over: {error}")
            else:
                return member.saved
        return None

    def best(self, metric: str | None = None, mode: BestMode | None = None) -> Saved | None:
        """Return the checkpoint with the best value of a metric, None if none has the metric.

        Args:
            metric: default that of the first `Best` policy in `keep`.
            mode: "min" or "max". Default: that of the `Best` policy of this metric in `keep`; without one, as for
                `Best`.

        Raises:
            UsageError: no metric is given, and `keep` does not contain a `Best` policy; or the mode is not known.
        """
        rules = [rule for rule in policies_of(self._keep) if isinstance(rule, Best)] if self._keep else []
        if metric is not None:
            rules = [rule for rule in rules if rule.metric == metric] or [Best(metric, mode=mode)]
        if rules and mode is not None:
            rules = [replace(rules[0], mode=mode)]
        if not rules:
            raise UsageError("no metric to compare by", hint="name one, or give the manager a Best policy")
        return next(iter(rules[0].ranked(self.all())), None)

    def others(self) -> dict[str, str]:
        """Return the names of everything else in the directory, each with the reason why it is not a step of the run.

        Among them are steps that are not whole: without their marker, or without a manifest that can be read. They are
        never deleted, and ``save(step, state, overwrite=True)`` replaces them.
        """
        return self._decided(self._series.others)

    @checked
    def should_save(self, step: int) -> bool:
        """Tell whether the policies want this step saved and it is not saved yet."""
        return self._decided(partial(self._should_save, _number_of(step)))

    def _should_save(self, step: int) -> bool:
        if not self._save_when.should_save(step, self._clock(), self._last):
            return False
        return (self._last is None or self._last.step != step) and not os.path.lexists(self._series.path(step))

    @checked
    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        attributes: Mapping[str, Any] | None = None,
        files: Mapping[str, FileContent] | None = None,
        overwrite: bool = False,
        graphs_from: Path | Checkpoint | None = None,
    ) -> PendingSave:
        """Save variables or nested state as a step, then delete what the policies no longer want.

        With `background`, the arrays may change as soon as this returns, while a thread writes; without it, the save
        is complete when this returns.

        Args:
            step: the number of the step, from 0.
            state: variables by name, or nested state, as for `varstore.save_state`.
            metrics: numbers by name, for `Best` and `KeepIf`; scalars of numpy and torch are numbers.
            attributes: JSON data to keep with the checkpoint, under any key but "training".
            files: files to attach to this step, beside those of the manager; see `varstore.save`.
            overwrite: replace the step if it is saved already.
            graphs_from: a checkpoint that `varstore.bundle` saved, or an earlier step that has its graphs. They are
                kept, by links, with the values of this step. A graph that has a copy of a variable which changed is
                written again.

        Raises:
            CheckpointExists: the step is saved already, and `overwrite` is False.
            Exception: the error of the background save before this one; it is raised once, and this step is saved.
            UsageError: the step, a metric or the attributes cannot be used, or see `varstore.save_state`.
            StorageError: a step that is to go cannot be deleted; the new one is saved.
            VariableNotFound, VariableMismatch: a variable that a graph uses is not in `state`, or has another shape or
                type; or a value in a graph was computed from one that changed.
            InvalidName, UnsupportedDtype, StorageError: see `varstore.save_state`.
        """
        if self._ranks is not None:
            if files is not None or graphs_from is not None:
                raise UsageError("several processes attach no files", field="graphs_from" if files is None else "files")
            return self._save_together(self._ranks, step, state, metrics, attributes, overwrite=overwrite)
        saved = self._saved(step, metrics, attributes)
        step, path = saved.step, saved.path
        flat = flatten(state)
        hurries = self._hurries()
        is_told = self._pending is not None and self._pending.is_told
        if not hurries and (self._saver is None or self._when_busy == "wait" or is_told):
            self._finish_pending()
        self._check_free(path, overwrite=overwrite)
        members = self._series.members()
        record = self._record(saved, members)
        options: SaveOptions = {
            "attributes": {**(attributes or {}), KEY: record.as_json(step)},
            "tree": flat.tree,
            "base": members[-1].saved.path if members and self._link_unchanged else None,
            "overwrite": overwrite,
            "foreign": "keep",
        }
        options |= cast(SaveOptions, self._save_options)
        if files is not None:
            options["files"] = {**(options.get("files") or {}), **files}
        if graphs_from is not None:
            taken = importlib.import_module(_GRAPHS).graphs_of(graphs_from, flat.variables)
            others = options.get("files") or {}
            if both := [name for name in taken.files if name in others]:
                raise UsageError("a file has the name of a graph", field="graphs_from", found=repr(both[0]))
            options["files"] = {**others, **taken.files}
            flat = replace(flat, variables={**flat.variables, **taken.added})
        ending = Ending()
        if self._saver is None:
            save(path, flat.variables, **options)
            self._last = saved
            self._prune_after(saved)
            ending.tell()
            return PendingSave(locate(path), ending)
        after = partial(self._prune_after, saved)
        pending = self._saver.save(
            path,
            flat.variables,
            when_busy=self._when_busy,
            budget=self._budget,
            after=after,
            ending=ending,
            at_once=hurries,
            **options,
        )
        self._last = saved
        if not hurries:
            self._pending = ending
            self._tell()
        return pending

    def _saved(
        self, step: int, metrics: Mapping[str, SupportsFloat] | None, attributes: Mapping[str, Any] | None
    ) -> Saved:
        """Return what a step will be known as.

        Raises:
            UsageError: what is given cannot be used.
        """
        step = _number_of(step)
        if attributes and KEY in attributes:
            raise UsageError("it holds the manager's record", field=f"attributes[{KEY!r}]", hint="use another key")
        return Saved(step=step, time=self._clock(), metrics=_numbers(metrics), path=self._series.path(step))

    def _check_free(self, path: str, *, overwrite: bool) -> None:
        if not overwrite and os.path.lexists(path):
            why = self._series.others().get(os.path.basename(path))
            problem = "this step is saved already" if why is None else f"its name is taken: {why}"
            raise CheckpointExists(problem, path=path, hint="pass overwrite=True to replace it")

    def _save_together(
        self,
        ranks: Ranks,
        step: int,
        state: Any,
        metrics: Mapping[str, SupportsFloat] | None,
        attributes: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> PendingSave:
        """Save a step with the other ranks; the first one decides whether, and what is recorded of it."""

        def begin() -> tuple[Saved, dict[str, Any]]:
            saved = self._saved(step, metrics, attributes)
            self._check_free(saved.path, overwrite=overwrite)
            record = self._record(saved, self._series.members()).as_json(saved.step)
            return saved, {**kept_attributes(attributes), KEY: record}

        self._finish_pending()
        saved, said = ranks.decided(begin)
        save = ranks.save_async if self._background else ranks.save
        pending = save(
            saved.path,
            state,
            attributes=said,
            overwrite=overwrite,
            durable=self._save_options.get("durable", True),
        )
        self._last = saved
        if pending is not None:
            self._pending = ending_of(pending)
            self._tell()
            return pending
        ranks.decided(partial(self._prune_after, saved))
        ending = Ending()
        ending.tell()
        return PendingSave(locate(saved.path), ending)

    def _hurries(self) -> bool:
        """Tell whether a save is one in a signal handler that must not wait for the one before it."""
        pending = self._pending
        return is_interrupting() or (pending is not None and not pending.is_told and in_signal_handler())

    def _record(self, saved: Saved, members: list[Member]) -> Record:
        settled, run = settled_run(members), next_run(members, saved.step)
        if run > settled:
            self._warn(
                "step back",
                f"step {saved.step} is saved after a step back, in a directory that has steps up to "
                f"{members[-1].saved.step}. From now on every saved step is kept, until rewind(step) removes the steps "
                "later than that one",
            )
        rules = policies_of(self._keep) if self._keep else ()
        pinned = any(isinstance(rule, Pinned) and saved.step in rule.steps for rule in rules)
        return Record(time=saved.time, metrics=saved.metrics, run=run, rewound=settled, pinned=pinned)

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _log.warning("%s: %s", self.directory, text)

    @checked
    def restore(
        self,
        step: int | Saved | None = None,
        *,
        map_location: MapLocation = None,
        like: Any = None,
        **load_options: Unpack[LoadOptions],
    ) -> Any:
        """Load the state of a step; see `varstore.load_state`.

        Args:
            step: a number, or a record that `latest`, `best` or `all` returned. Default: the latest step; if that is
                not whole, a warning is logged, and the one before it is tried, and so on.
            map_location: as for `varstore.load_state`.
            like: a pytree of jax with the wanted structure, as for `varstore.adapters.jax.load`, which loads into it.
                The other options are not for it. With a process group: the state to load into, in place, as for
                `varstore.adapters.torch_distributed.load`; without it, every rank loads the whole state.
            load_options: `verify`, `threads` and `progress`, as for `varstore.load`.

        Raises:
            CheckpointNotFound: there is no such step, no step at all, or none that is whole; the message says what is
                wrong with each.
            ManifestError: the manifest of the step is lost; `varstore.load` gives its arrays.
            IncompleteCheckpoint, DigestMismatch, SizeMismatch, StorageError: see `varstore.load_state`.
        """
        if like is not None and (map_location is not None or load_options):
            raise UsageError("like has its own devices and options", field="like", hint="leave out the other options")
        restored = _restored if self._ranks is None else self._ranks.restored
        if step is not None:
            path = step.path if isinstance(step, Saved) else self._series.path(_number_of(step))
            return restored(path, map_location, like, load_options)
        failures = []
        for number, path, error in self._decided(self._to_try):
            if error is None:
                try:
                    return restored(path, map_location, like, load_options)
                except _NOT_WHOLE as caught:
                    error = caught
            failures.append(f"step {number}: {error}")
            _log.warning("step %d cannot be restored; trying the one before it: %s", number, error)
        if failures:
            raise CheckpointNotFound("no step of this run can be restored", rows=failures, path=self.directory)
        raise CheckpointNotFound("there is no complete checkpoint of this run", path=self.directory)

    def _to_try(self) -> list[tuple[int, str, VarstoreError | None]]:
        """Return the number and path of each step, the highest first, and why it is none of the run's, if so."""
        taken = reversed(self._series.taken())
        return [(one.step, one.path, None if isinstance(one.found, Member) else one.found) for one in taken]

    def wait(self) -> None:
        """Wait until everything is written and deleted.

        A signal handler that interrupted a save of this thread, or the wait for one, does not wait: what it saved
        itself is written by then.

        Raises:
            Exception: the error of a background save, or of a deletion; it is raised once.
        """
        if is_interrupting():
            return
        self._finish_pending()
        self._decided(self._remove)
        self._tell()

    def _finish_pending(self) -> None:
        """Wait for the background save before this one, and keep its error until it is told."""
        pending = self._pending
        if pending is None or is_interrupting():
            return
        with calling():
            pending.wait()
        self._pending = None
        self._last = self._decided(partial(self._ended, pending))

    def _ended(self, pending: Ending) -> Saved | None:
        """Return the last step that is saved, now that a background save has ended."""
        if pending.error is None:
            if self._ranks is not None and self._last is not None:
                self._prune_after(self._last)  # otherwise its thread has done this
            return self._last
        if not pending.is_raised:
            self._untold.append(pending.error)
        return self._latest(self._series.members())  # the step may be tried again

    def _tell(self) -> None:
        """Raise an error that nobody has heard of; ranks hear of those of the first one."""
        self._decided(self._tell_here)

    def _tell_here(self) -> None:
        if self._untold:
            raise self._untold.pop(0)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()

    @checked
    def prune(self, *, dry_run: bool = False) -> Retention:
        """Delete steps and remove variables that the policies no longer want, as every `save` does.

        A step that this process has open, through a handle that is not closed, is held: it is deleted by a later call.
        So is one that belongs to another user.

        Args:
            dry_run: only return what would be done.

        Returns:
            What was kept, deleted, held and trimmed, with the reasons; `print` shows it.
        """
        return self._decided(partial(self._prune, dry_run=dry_run))

    def _prune_after(self, saved: Saved) -> None:
        if self._keep is not None or self._keep_parts:
            self._prune(saved)

    def _prune(self, saved: Saved | None = None, *, dry_run: bool = False) -> Retention:
        if self._pruning.locked() and (is_interrupting() or in_signal_handler()):
            return Retention(kept={}, deleted={}, held={}, trimmed={})  # the next save prunes
        with calling(), self._pruning:
            taken = self._series.taken()
            members = [one.found for one in taken if isinstance(one.found, Member)]
            stay = {}
            if saved is None and (whole := self._latest(members)) is not None:
                stay[whole.step] = "the latest of which all files are there"
            if (last := saved or self._last) is not None:
                stay[last.step] = "just saved"
            retention = decide(members, self._keep, self._keep_parts, stay=stay)
            unseen = {one.step: f"it cannot be looked at: {one.found}" for one in taken if _is_refused(one)}
            retention = replace(retention, kept=dict(sorted({**retention.kept, **unseen}.items())))
            for step, why in unseen.items():
                self._warn(f"refused {step}", f"step {step} is kept: {why}")
            for metric in unknown_metrics(members, [self._keep, *self._keep_parts.values()]):
                text = f"no step has the metric {metric!r}, so Best({metric!r}) keeps every step"
                self._warn(f"metric {metric}", text)
            if not dry_run:
                self._delete(retention.deleted)
                for member in members:
                    if patterns := retention.trimmed.get(member.saved.step):
                        self._trim(member, patterns)
            return retention

    def rewind(self, step: int | Saved) -> Retention:
        """Delete all steps that are later than a step, to go on from there.

        Steps that are not whole go too, where ``overwrite=True`` would replace them. This ends what a step back began:
        from now on the policies decide about every step again.

        Args:
            step: the number of the last step to keep, or its record. It need not exist, but a whole step must be left.

        Returns:
            What was kept and deleted; `print` shows it.

        Raises:
            UsageError: no whole step would be left, or a step that would change is being read. Nothing was deleted.
            StorageError: a step cannot be deleted.
            Exception: the error of a background save; it is raised once.

        Example:
            >>> manager = vs.CheckpointManager("run", keep=vs.Latest(3))
            >>> for number in (100, 200, 300):
            ...     pending = manager.save(number, {"w": np.zeros(3)})
            >>> print(manager.rewind(200))
                   100  kept     not later than step 200
                   200  kept     not later than step 200
                   300  deleted  later than step 200
        """
        number = step.step if isinstance(step, Saved) else _number_of(step)
        self._finish_pending()
        self._tell()
        retention = self._decided(partial(self._rewind, number))
        self._last = self.latest()
        self._warned.discard("step back")
        return retention

    def _rewind(self, number: int) -> Retention:
        with calling(), self._pruning:
            taken = self._series.taken()
            stay = [one.found for one in taken if isinstance(one.found, Member) and one.step <= number]
            later = [one for one in taken if one.step > number and (isinstance(one.found, Member) or one.is_remains)]
            if later and not stay:
                raise UsageError("no whole step would be left", field="step", found=number, path=self.directory)
            mark = self._mark(stay)
            for one in later:
                _require_unread(one.path)
            deleted = {one.step: f"later than step {number}" for one in reversed(later)}
            self._delete(deleted)
            if mark is not None:
                self._rewrite(*mark)
        kept = {member.saved.step: f"not later than step {number}" for member in stay}
        return Retention(kept=kept, deleted=dict(sorted(deleted.items())), held={}, trimmed={})

    def _mark(self, stay: list[Member]) -> tuple[Member, Record] | None:
        """Return a step and its new record, which says that all runs are rewound; None if nothing is to be said."""
        last = last_run(stay)
        if last <= settled_run(stay):
            return None
        recorded = [member for member in stay if member.record and member.record.is_given]
        member = max(recorded, key=lambda member: (not member.is_link, member.saved.step))
        assert member.record is not None
        _require_unread(member.saved.path)
        return member, replace(member.record, rewound=last)

    def _delete(self, steps: Mapping[int, str]) -> None:
        errors: list[OSError] = []
        for step, why in steps.items():
            path = self._series.path(step)
            try:
                with contextlib.suppress(FileNotFoundError):  # another process deleted it
                    set_aside(path)
                    _log.info("deleted %s: %s", path, why)
            except OSError as error:
                _log.warning("cannot delete %s: %s", path, error)
                is_ours = isinstance(error, StorageError)
                errors.append(error if is_ours else storage_error(error, path, "the step cannot be deleted"))
        if steps:
            self._set_aside.extend(steps)
            if not start(self._remove, name="varstore-delete", daemon=False):
                self._remove()
        if errors:
            raise errors[0]

    def _remove(self) -> None:
        """Remove the files of what was set aside: whoever comes first does it, and the others wait."""
        if self._removing.locked() and (is_interrupting() or in_signal_handler()):
            return
        with calling(), self._removing:
            while self._set_aside:
                name = f"{self._series.prefix}{self._set_aside.popleft()}"
                try:
                    with translated(self._series.directory, "what was deleted cannot be removed"):
                        clean_staging(self.directory, name=name)
                except VarstoreError as error:  # raised where it is waited for
                    self._untold.append(error)

    def _trim(self, member: Member, patterns: tuple[str, ...]) -> None:
        assert member.record is not None
        _log.info("removing %s from %s", ", ".join(patterns), member.saved.path)
        self._rewrite(member, replace(member.record, trimmed=(*member.record.trimmed, *patterns)), without=patterns)

    def _rewrite(self, member: Member, record: Record, *, without: tuple[str, ...] = ()) -> None:
        """Replace a checkpoint by one with a new record, without some variables; the others are linked, not read."""
        with open_step(member.saved.path) as checkpoint:
            stay = checkpoint.select(exclude=without)
            tree = ""
            if checkpoint.tree is not None:
                node = prune(checkpoint.tree, lambda name: name not in stay)
                tree = json.dumps(node, ensure_ascii=False, separators=(",", ":"))
            said = {**checkpoint.attributes.get(KEY, {}), **record.as_json(member.saved.step)}
            attributes = {**checkpoint.attributes, KEY: said}
            durable = self._save_options.get("durable", True)
            path = os.path.realpath(checkpoint.path)  # a step that was moved
            save(
                path,
                stay,
                attributes=attributes,
                tree=tree,
                files={name: file for name, file in checkpoint.files.items() if is_usable(file.entry, stay)},
                overwrite=True,
                foreign="keep",
                links=not checkpoint.location.unshared,
                durable=durable,
            )


def _is_refused(taken: Taken) -> bool:
    """Tell whether the system refused to show a step, so that it may be whole."""
    return isinstance(taken.found, StorageError)


def _restored(path: str, map_location: MapLocation, like: Any, options: LoadOptions) -> Any:
    for attempt in attempts(path):
        with attempt as (checkpoint,), checkpoint:  # closed after an error too, which may be kept for long
            require_manifest(checkpoint)
            if like is not None:
                return _adapter(_LIKE, "jax").load(checkpoint, like)
            return load_state(checkpoint, map_location=map_location, **options)
    raise AssertionError  # attempts end with an error


def _adapter(name: str, framework: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(f"this needs {framework}", found=str(error), hint=f"install {framework}") from error


def _ranks_of(process_group: Any, options: RunOptions) -> Ranks | None:
    if process_group is None:
        return None
    if refused := options.keys() - {"durable"}:
        raise UsageError("several processes save without this", field=min(refused), hint="leave it out")
    return cast(Ranks, _adapter(_RANKS, "torch").RunRanks(process_group))


def _directory(path: str) -> str:
    if kind_of(path) != stat.S_IFDIR and os.path.lexists(path):
        raise UsageError("is not a directory", field="directory", path=path, hint="choose another path")
    return os.path.abspath(path)


def _parts(given: object) -> dict[str, Keep]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
        raise UsageError("must map patterns to policies", field="keep_parts", found=repr(given))
    parts = {pattern: keep_of(policy, field=f"keep_parts[{pattern!r}]") for pattern, policy in given.items()}
    return {pattern: policy for pattern, policy in parts.items() if policy is not None}


def _number_of(step: object) -> int:
    try:
        number = operator.index(cast(int, step))
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError("must be an integer from 0", field="step", found=repr(step))
    return number


def _numbers(metrics: object) -> dict[str, float]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UsageError("must map names to numbers", field="metrics", found=repr(metrics))
    return {_name(name): _number(value, f"metrics[{name!r}]") for name, value in metrics.items()}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError("the name of a metric must be a string", field="metrics", found=repr(name))
    return name


def _number(value: Any, field: str) -> float:
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError("must be a number", field=field, found=repr(value)) from error


def _require_unread(path: str) -> None:
    if has_open_handle(path):
        raise UsageError("this step is being read", path=path, hint="close the handles of it first")
