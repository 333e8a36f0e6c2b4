"""What retention keeps, deletes and trims: a pure decision by the records of the steps.

What may be deleted is narrower than what the policies do not want. The highest step stays, because a run resumes there;
in `prune`, so does the highest of which all files are there. The step that a save has just finished stays, because the
caller counts on it. A step whose record cannot be read stays, and where a policy decides by metrics, a step without a
record, because nobody knows its metrics.

When a save's step is lower than one that the directory holds, the training has stepped back, and numbers no longer tell
old from new: `Latest` would delete the new steps and keep the old ones. From there on, each save is recorded as one of
a new *run*. No step of that run is deleted, while the policies go on to decide about the steps of earlier runs as if
the new ones were not there. `CheckpointManager.rewind` ends this: it removes the later steps, after which numbers order
the steps again, and records that this run is *rewound*. The run of a step is in its manifest, so all of this survives
the process, and no clock takes part in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from varstore.disk.read.checkpoint import has_open_handle
from varstore.disk.save.leftovers import is_of_another_user
from varstore.text.escape import one_line
from varstore.text.table import Table
from varstore.training.policies import Best, Keep, looks_at_metrics, policies_of, retain
from varstore.training.series import Member

__all__ = ["Retention", "decide", "last_run", "next_run", "settled_run", "unknown_metrics"]

_ROWS = 100
"""Rows that a notebook shows."""

NOTHING: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Retention:
    """What `CheckpointManager.prune` or `CheckpointManager.rewind` did, by step.

    `kept` and `deleted` give the reasons; `held` too, for steps that are to be deleted but are being read or belong to
    another user. `trimmed` gives the patterns of the variables that were removed.
    """

    kept: Mapping[int, str]
    deleted: Mapping[int, str]
    held: Mapping[int, str]
    trimmed: Mapping[int, tuple[str, ...]]

    def __repr__(self) -> str:
        parts = {"kept": self.kept, "deleted": self.deleted, "held": self.held, "trimmed": self.trimmed}
        counts = ", ".join(f"{len(steps):,} {what}" for what, steps in parts.items() if steps)
        return f"<Retention: {counts or 'no steps'}>"

    def _repr_html_(self) -> str:
        rows = self._rows()
        notes = [f"and {len(rows) - _ROWS:,} earlier ones"] if len(rows) > _ROWS else []
        return Table(title=repr(self)[1:-1], rows=rows[-_ROWS:], notes=notes).html()

    def __str__(self) -> str:
        return "\n".join(f"{step:>10}  {what:<8} {one_line(why)}" for step, what, why in self._rows())

    def _rows(self) -> list[tuple[int, str, str]]:
        rows = [(step, "kept", why) for step, why in self.kept.items()]
        rows += [(step, "deleted", why) for step, why in self.deleted.items()]
        rows += [(step, "held", why) for step, why in self.held.items()]
        rows += [(step, "trimmed", "without " + ", ".join(patterns)) for step, patterns in self.trimmed.items()]
        return sorted(rows)


def decide(
    members: Sequence[Member], keep: Keep | None, parts: Mapping[str, Keep], *, stay: Mapping[int, str] = NOTHING
) -> Retention:
    """Return what is kept, deleted, held and trimmed of the whole steps of a run, which are given in order.

    Args:
        members: the whole steps.
        keep: which of them are kept; None keeps all.
        parts: patterns of variables, each with the policy for the steps in which these variables stay.
        stay: steps that stay as they are, whatever the policies say, each with the reason.
    """
    ordinary = list(_ordinary(members, keep))
    decided = {member.saved.step for member in ordinary}
    spared = {member.saved.step: why for member in members if (why := _spared(member, decided, stay))}
    wanted = retain(keep, [member.saved for member in (members if keep is None else ordinary)])
    reasons = {step: ", ".join(because) for step, because in wanted.items()}
    kept = {
        step: reasons.get(step) or spared[step]
        for step in (member.saved.step for member in members)
        if step in reasons or step in spared
    }
    why = f"not {keep}"
    unwanted = {member.saved.step: _holds(member) for member in members if member.saved.step not in kept}
    return Retention(
        kept=kept,
        deleted={step: why for step, held in unwanted.items() if not held},
        held={step: f"{why}, but {held}" for step, held in unwanted.items() if held},
        trimmed=dict(_trimmed([member for member in ordinary if member.saved.step in kept], parts, spared)),
    )


def _holds(member: Member) -> str:
    """Return why a step that is to be deleted is not, "" if it is."""
    if has_open_handle(member.saved):
        return "being read"
    return "it belongs to another user" if is_of_another_user(member.saved.path) else ""


def _spared(member: Member, decided: Collection[int], stay: Mapping[int, str]) -> str:
    if member.record is None:
        return "its record cannot be read"
    if member.saved.step not in decided:
        return "saved after a step back" if member.record.is_given else "its metrics are not known"
    return stay.get(member.saved.step, "")


def _trimmed(
    kept: list[Member], parts: Mapping[str, Keep], spared: Collection[int]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    whole = {pattern: retain(keep, [member.saved for member in kept]) for pattern, keep in parts.items()}
    for member in kept:
        step = member.saved.step
        record = member.record
        if step in spared or member.is_link or record is None or not record.is_given:
            continue
        unwanted = (pattern for pattern, steps in whole.items() if step not in steps)
        patterns = tuple(pattern for pattern in unwanted if pattern not in record.trimmed)
        if patterns and not has_open_handle(member.saved):  # which takes longer than all else here
            yield step, patterns


def _ordinary(members: Sequence[Member], keep: Keep | None) -> Iterator[Member]:
    """Yield the steps about which a policy decides."""
    settled, by_metrics = settled_run(members), looks_at_metrics(keep)
    for member in members:
        record = member.record
        if record is not None and record.run <= settled and (record.is_given or not by_metrics):
            yield member


def settled_run(members: Iterable[Member]) -> int:
    """Return the last run whose steps are ordinary, because it was rewound or is the first."""
    return max((member.record.rewound for member in members if member.record), default=0)


def last_run(members: Sequence[Member]) -> int:
    """Return the last run of which there is a step."""
    return max((member.record.run for member in members if member.record), default=0)


def next_run(members: Sequence[Member], step: int) -> int:
    """Return the run of the next save; it is later than `settled_run` if the training has stepped back."""
    settled = settled_run(members)
    last = last_run(members)
    is_back = any(member.saved.step > step for member in members)
    return last if last > settled else settled + is_back


def unknown_metrics(members: Sequence[Member], policies: Iterable[Keep | None]) -> list[str]:
    """Return the metrics that `Best` policies compare by and no step has, so that these policies keep every step."""
    unknown = []
    for keep in filter(None, policies):
        ordinary = list(_ordinary(members, keep))
        known = {metric for member in ordinary for metric in member.saved.metrics}
        metrics = [rule.metric for rule in policies_of(keep) if isinstance(rule, Best)]
        unknown += [metric for metric in metrics if ordinary and metric not in known]
    return unknown
