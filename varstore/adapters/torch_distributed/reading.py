"""Load a checkpoint into the state of many ranks, each of which reads the rectangles that it has.

All ranks look first, and tell each other what they found: what no rank wants is unexpected, and an error of one is an
error of all. Files are looked at before the first byte is written to a tensor. Values that are not tensors are put in
last, when every rank has read its part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist

from varstore.adapters.torch_distributed.parts import check_share, read_parts
from varstore.adapters.torch_distributed.ranks import Ranks, threads_beside
from varstore.adapters.torch_distributed.targets import Target, Targets, survey
from varstore.disk.read.checkpoint import Checkpoint, open_checkpoint
from varstore.disk.read.checks import check_files
from varstore.disk.read.variable import Variable
from varstore.errors import ManifestError, StorageError, UsageError, VariableMismatch, VarstoreError
from varstore.layout.collector import collector_paused
from varstore.layout.readable import readable
from varstore.model.match import Match, Missing, Pair, SourceSpec, Spec, compare, spec_of
from varstore.model.moves import Move, OnDisk, Place
from varstore.model.options import Path
from varstore.model.refusal import Demands, refuse
from varstore.model.report import LoadReport, make_report
from varstore.model.ties import settle
from varstore.storage.directory import says_replaced
from varstore.text.hints import listed
from varstore.training.chosen import Choice
from varstore.training.state import filled, outlined, plain_tree
from varstore.training.tensors import Leaf, strides_of
from varstore.values.arguments import checked, described
from varstore.values.nodes import BARE, Unbuilt
from varstore.values.select import Patterns, Rename

__all__ = ["Verify", "disagreement", "load"]

Verify = bool | Literal["all"]
"""Whether what a rank reads is compared with its digests; "all": the ranks first check everything, each a share."""

_ATTEMPTS = 100
_DISAGREEMENTS = 20
_PAUSE = 0.05
"""Seconds until ranks look again that saw different checkpoints: one of them looked while it was being replaced."""
_ANYTHING: Spec = ((), np.dtype(np.bool_))
"""Stands for the shape and type of a value of any kind, on both sides."""
_TARGET = "state"


@checked
def load(
    path: Path | Checkpoint,
    state: Any,
    *,
    process_group: dist.ProcessGroup | None = None,
    strict: bool = True,
    verify: Verify = True,
    rename: Rename | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    missing: Missing = None,
) -> LoadReport:
    """Load a checkpoint into a state, in place, on every rank of a group; each rank reads its own parts only.

    The checkpoint may have been saved on any number of ranks with any mesh, or by one process. Tensors are read
    straight into the memory that they have on the host. Values that are not tensors are replaced in their dicts and
    lists by those that were saved. For the state of an optimizer, pass what ``get_state_dict`` of
    ``torch.distributed.checkpoint.state_dict`` returns, and then call ``set_state_dict``.

    Names, shapes and types are compared, and files looked at, before anything changes. If one rank fails, all of them
    raise its error.

    Args:
        path: a checkpoint's directory, which all ranks see.
        state: a nested dict of tensors, DTensors and other values, or an object with ``state_dict`` and
            ``load_state_dict``, or a dict that contains such objects. A value's name is the keys and indices that lead
            to it, joined by ``/``, as with `varstore.save_state`. The ranks may have different names.
        process_group: the ranks that load together. Default: all; without ``init_process_group``, this process.
        strict: raise an error for names that only the state or only the checkpoint has. A name in the checkpoint is
            unexpected if no rank has it.
        verify: compare what is read with the digests: all of a tensor that a rank has whole, and of another one the
            blocks and regions that lie in its part. With "all", the ranks first check everything, each a share of it,
            before a tensor changes.
        rename, include, exclude: as for `varstore.load`, to turn the checkpoint's names into those of the state.
        missing: as for `varstore.load_into`: patterns of names that need not be in the checkpoint.

    Returns:
        What was loaded on this rank. What is `unexpected` is the same on all ranks.

    Raises:
        VariableMismatch: names, shapes or types differ; nothing has changed, on no rank.
        UsageError: the state holds what cannot be filled.
        DigestMismatch: the bytes are not those that were saved. Without ``verify="all"``, tensors may have changed.
        CheckpointNotFound, IncompleteCheckpoint, ManifestError, SizeMismatch: see `varstore.load`.
        StorageError: a rank has ended, does not see the checkpoint, or sees another one.

    Example:
        >>> import torch
        >>> from varstore.adapters.torch_distributed import load
        >>> model = torch.nn.Linear(2, 3)
        >>> checkpoint = vs.save_state("before", {"model": model.state_dict(), "epoch": 3})
        >>> state = {"model": model, "epoch": 0}
        >>> load("before", state).loaded, state["epoch"]
        (('model/weight', 'model/bias', 'epoch'), 3)
    """
    if not isinstance(verify, bool) and verify != "all":
        raise UsageError("a wrong value", field="verify", found=described(verify), expected='True, False or "all"')
    choice: Choice = {"include": include, "exclude": exclude, "rename": rename}
    demands = Demands(strict=strict, missing=missing, must_fit=True)
    ranks = Ranks(process_group)
    with contextlib.closing(_Loading(path, state, choice, demands, verify, ranks)) as loading:
        return _loaded(loading, ranks)


def _loaded(loading: _Loading, ranks: Ranks) -> LoadReport:
    """Load until the checkpoint stays the same meanwhile."""
    disagreements = 0
    for _ in range(_ATTEMPTS):
        identities = ranks.together(loading.open)
        if identities is not None and len(set(identities)) > 1:
            disagreements += 1
            if disagreements == _DISAGREEMENTS:
                raise disagreement(loading.path, identities)
            time.sleep(_PAUSE)
        elif loading.goes_well():
            ranks.together(loading.put)
            return loading.report
    raise StorageError("the checkpoint was replaced each time before it could be read", path=loading.path)


def disagreement(path: str, identities: list[bytes]) -> StorageError:
    """Return the error of ranks that do not see the same checkpoint."""
    other = next(rank for rank, identity in enumerate(identities) if identity != identities[0])
    return StorageError(
        "the ranks see different checkpoints at this path",
        path=path,
        found=f"that of rank {other} is not that of rank 0",
        hint="give the path of a directory on a file system that all ranks share",
    )


class _Seen(NamedTuple):
    """What the others have to know of what a rank found.

    `unused` are the names that the rank does not want, and `tied` those that the checkpoint does not have, but whose
    memory gets the values of another name.
    """

    unused: tuple[str, ...]
    tied: frozenset[str]


class _Loading:
    """One load on one rank."""

    report: LoadReport
    _checkpoint: Checkpoint
    _targets: Targets
    _match: Match
    _nodes: dict[str, Any]
    _values: dict[str, Any]
    _pairs: list[tuple[Pair, Target, Variable]]

    def __init__(
        self, path: Path | Checkpoint, state: Any, choice: Choice, demands: Demands, verify: Verify, ranks: Ranks
    ) -> None:
        self._given = path
        self._state = state
        self._choice = choice
        self._demands = demands
        self._verify = verify
        self._ranks = ranks
        self._threads = threads_beside(ranks.size)
        self.path = path.path if isinstance(path, Checkpoint) else str(path)
        self._is_surveyed = False
        self._opened: Checkpoint | None = None

    def close(self) -> None:
        """Close what was opened here; an error, which refers to it, may be kept for long."""
        if self._opened is not None:
            self._opened.close()

    def open(self) -> bytes:
        """Open the checkpoint, and return what tells it from others."""
        self.close()
        if isinstance(self._given, Checkpoint):
            self._checkpoint = self._given
        else:
            self._checkpoint = self._opened = open_checkpoint(self._given)
        self.path = self._checkpoint.path
        return self._checkpoint.content.fingerprint()

    def goes_well(self) -> bool:
        """Load all but the values that are put in last; False if the checkpoint was replaced: then open it again."""
        together = partial(self._ranks.together, is_passing=self._is_passing)
        seen = together(self._look)
        return (
            seen is not None and together(partial(self._judge, seen)) is not None and together(self._read) is not None
        )

    def _is_passing(self, error: VarstoreError) -> bool:
        return says_replaced(error) and not isinstance(self._given, Checkpoint) and self._checkpoint.is_replaced

    # --- looking: nothing changes ------------------------------------------------------------------------------------

    def _look(self) -> _Seen:
        """Compare the checkpoint with the state."""
        with collector_paused():
            if not self._is_surveyed:
                self._targets = survey(self._state)
                self._is_surveyed = True
            self._match, self._nodes = self._compared(self._choice)
        return _Seen(self._match.unused, self._tied())

    def _judge(self, seen: list[_Seen]) -> None:
        """Refuse what does not fit on any rank, and look at the files that this rank reads."""
        tied = frozenset[str]().union(*(one.tied for one in seen))
        elsewhere = [set(one.unused) for one in seen]
        match = replace(
            self._match,
            kept=tuple(name for name in self._match.kept if name not in tied),
            unused=tuple(name for name in self._match.unused if all(name in names for names in elsewhere)),
        )
        self.report = make_report(match, source=self.path, target=_TARGET)
        refuse(
            match,
            self._demands,
            is_vain=bool(self._checkpoint) and not match.pairs and bool(match.kept or match.mismatched),
            source=self.path,
            target=_TARGET,
            path=self.path,
            matched=lambda rename: self._compared({**self._choice, "rename": rename})[0],
        )
        self._pairs = list(self._settled(match.pairs))
        location = self._checkpoint.location
        check_files((location, variable.entry) for _, target, variable in self._pairs if target.shards)
        if self._verify == "all":
            variables = self._checkpoint.values()
            check_share(variables, self._ranks.rank, self._ranks.size, threads=self._threads)

    def _compared(self, choice: Choice) -> tuple[Match, dict[str, Any]]:
        """Return what of the checkpoint is for what of the state, and the source of each name: a `Leaf` or a value."""
        checkpoint = self._checkpoint
        state = outlined(checkpoint, checkpoint.tree or plain_tree(checkpoint), choice)
        nodes = dict(_nodes(state, self._targets))
        selected = {name: node.name if isinstance(node, Leaf) else name for name, node in nodes.items()}
        tensors = self._targets.tensors
        wrong = [name for name, node in nodes.items() if name in tensors and not isinstance(node, Leaf)]
        if wrong:
            raise VariableMismatch(
                "what is a tensor in the state is not an array in the checkpoint",
                path=self.path,
                found=listed(list(map(repr, wrong))),
                hint="leave it out with exclude= and missing=, or hold another value in its place",
            )
        wanted: dict[str, Spec] = {name: tensors[name].spec if name in tensors else _ANYTHING for name in self._targets}
        specs: dict[str, SourceSpec] = {
            selected[name]: spec_of(self._variable(node)) if name in tensors else _ANYTHING
            for name, node in nodes.items()
        }
        return compare(wanted, specs, selected), nodes

    def _variable(self, leaf: Leaf) -> Variable:
        variable = self._checkpoint.get(leaf.name)
        if variable is None:
            raise ManifestError("the tree names a variable that does not exist", path=self.path, variable=leaf.name)
        assert isinstance(variable, Variable)
        return variable

    def _tied(self) -> frozenset[str]:
        """Return the names without values of their own whose memory gets those of another name."""
        tensors = self._targets.tensors
        filled = {tensors[pair.target].place for pair in self._match.pairs if pair.target in tensors} - {None}
        return frozenset(name for name in self._match.kept if name in tensors and tensors[name].place in filled)

    def _settled(self, pairs: tuple[Pair, ...]) -> Iterator[tuple[Pair, Target, Variable]]:
        """Yield what is read: once for tensors that share memory, which must get the same values."""
        held: dict[Any, list[tuple[Pair, Target, Variable]]] = {}
        for pair in pairs:
            target = self._targets.tensors.get(pair.target)
            if target is None:
                continue
            variable = self._variable(self._nodes[pair.target])
            if not variable.has_meta:
                variable = variable.known_as(pair.target_shape, pair.target_dtype)
            held.setdefault(target.place or pair.target, []).append((pair, target, variable))
        alike = [group for group in held.values() if len(group) > 1]
        moves = [self._whole_move(number, *item) for number, group in enumerate(alike) for item in group]
        settle(moves, names=self._targets, on_tied="error", verify=bool(self._verify), path=self.path, can_choose=False)
        for group in held.values():
            yield group[0]

    def _whole_move(self, number: int, pair: Pair, target: Target, variable: Variable) -> Move:
        """Return a move of whole tensors to memory that those of one number share."""
        shape, dtype = target.spec
        strides = tuple(step * dtype.itemsize for step in strides_of(shape))
        place = Place(("tied", number), 0, shape, strides, dtype)
        return Move(pair, place, OnDisk(variable.location, readable(variable.entry, path=self.path)))

    # --- loading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read this rank's parts of tensors into their memory, and values of other kinds aside."""
        is_verified, threads = bool(self._verify), self._threads
        wanted = [(variable, shard) for _, target, variable in self._pairs for shard in target.shards]
        read_parts(self._checkpoint.location, wanted, verify=is_verified, threads=threads)
        values = {name: node for name, node in self._nodes.items() if name in self._targets.values}
        self._values = filled(self._checkpoint, values, map_location="cpu", verify=is_verified, threads=threads)

    def put(self) -> None:
        """Put the values in that are not tensors, and give objects their state dicts."""
        self._targets.put(self._values)


def _nodes(node: Any, targets: Targets, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what a checkpoint's state has for each name of the targets, and its other leaves, with their names."""
    name = "/".join(parts) or BARE
    if isinstance(node, Unbuilt):
        node = node if name in targets else node.items
    if name in targets or not isinstance(node, dict | list | tuple):
        yield name, node
        return
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _nodes(item, targets, (*parts, key if type(key) is str else repr(key)))
