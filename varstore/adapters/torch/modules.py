"""Load into modules: straight into memory where that is all there is to do, else through ``load_state_dict``.

All is compared and all files are looked at before anything changes. Then what has to come in a state dict is read into
new memory, and everything else straight into its place. Last, ``load_state_dict`` is called if the module has code that
wants it. For what is in its place already it is given the parameter itself, and copies nothing.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch

from varstore.adapters.torch.survey import Member, place_of_tensor, survey
from varstore.disk.progress import reporting
from varstore.disk.read.checkpoint import Checkpoint
from varstore.errors import UnsupportedDtype, UsageError, VariableMismatch
from varstore.layout.collector import collector_paused
from varstore.model.into import carry_out, prepare
from varstore.model.match import (
    Match,
    Missing,
    OnMismatch,
    OnTied,
    Pair,
    SourceSpec,
    Spec,
    compare,
    is_same_type,
    spec_of,
)
from varstore.model.moves import LateTarget, Move, OnDisk, Place, move_of, place_of
from varstore.model.options import LoadOptions
from varstore.model.refusal import Demands, refuse
from varstore.model.report import LoadReport, make_report, with_saturated
from varstore.model.ties import Settled
from varstore.text.hints import listed
from varstore.training.state import restore
from varstore.training.tensors import Leaf, to_torch
from varstore.training.tree import entries, unflatten
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.lazy import LazyArray
from varstore.values.select import Patterns, Rename, select

__all__ = ["ModuleOptions", "load_into_module"]

_LAZY = (Stored, LazyArray)
_ANYTHING: Spec = ((), np.dtype(np.bool_))
"""Stands for the shape and type of a value of any kind, on both sides."""


class ModuleOptions(TypedDict):
    """The options of `varstore.adapters.torch.load_into` that say what is loaded into a module."""

    include: Patterns | None
    exclude: Patterns | None
    rename: Rename | None
    strict: bool
    assign: bool
    on_mismatch: OnMismatch
    cast: bool
    missing: Missing
    on_tied: OnTied


def load_into_module(
    module: torch.nn.Module, given: Mapping[str, Any], options: ModuleOptions, load_options: LoadOptions
) -> LoadReport:
    """Load a checkpoint or a state dict into a module; see `varstore.adapters.torch.load_into`."""
    with collector_paused():
        loading = _Loading(module, given, options)
    return loading.run(load_options)


class _Loading:
    """One load into one module.

    What is selected is either an array, in `_sources`, or a value of another kind, in `_values`, which the module takes
    as it is; both are by the module's names.
    """

    def __init__(self, module: torch.nn.Module, given: Mapping[str, Any], options: ModuleOptions) -> None:
        self._module = module
        self._given = given
        self._options = options
        self._demands = Demands(
            strict=options["strict"],
            missing=options["missing"],
            on_mismatch=options["on_mismatch"],
            cast=options["cast"],
        )
        self._metadata = copy.deepcopy(getattr(given, "_metadata", None)) if options["rename"] is None else None
        self._survey = survey(module, self._metadata or {}, assign=options["assign"])
        self._places: dict[str, Place | None] = {}  # those that were needed
        self._path = getattr(given, "path", None)  # of a checkpoint or a file
        self._where = self._path or type(given).__name__
        self._sources: dict[str, Source] = {}
        self._values: dict[str, Any] = {}
        self._nodes = dict(self._opaque_nodes())
        self._selected = self._select()
        self._sort()

    def run(self, load_options: LoadOptions) -> LoadReport:
        """Load, and return what was loaded."""
        with collector_paused():
            match, report, moves, settled = self._settle(load_options)
        verify, threads = load_options.get("verify", True), load_options.get("threads")
        self._read_values(verify=verify, threads=threads)
        tensors, buffered = self._buffers(moves, settled.winners)
        settled = Settled(
            free=[*filter(_is_direct, settled.free), *buffered],
            ordered=[*filter(_is_direct, settled.ordered)],
            winners=settled.winners,
        )
        with reporting(load_options.get("progress"), settled.nbytes, f"loading {self._where}") as advance:
            beyond = carry_out(settled, verify=verify, threads=threads, advance=advance)
        report = with_saturated(report, beyond)
        if not tensors and not self._survey.has_code:
            return report
        return self._hand_over(report, self._state(match, tensors))

    def _settle(self, load_options: LoadOptions) -> tuple[Match, LoadReport, dict[str, Move], Settled]:
        """Compare, refuse what does not fit, and decide what goes where."""
        match = self._compare()
        report = make_report(match, source=self._where, target=type(self._module).__name__)
        is_vain = not match.pairs and bool(self._given) and bool(match.kept or match.mismatched)
        self._judge(
            self._early(match),
            is_vain=is_vain and not any(map(self._survey.is_late, self._selected)),
            matched=lambda rename: self._with(rename).early_match(),
        )
        self._refuse_meta(match.pairs)
        moves = {pair.target: self._move(pair) for pair in match.pairs if pair.target in self._sources}
        settled = prepare(
            list(moves.values()),
            names=[*self._survey.members, *self._selected],
            on_tied=self._options["on_tied"],
            verify=load_options.get("verify", True),
            path=self._path,
        )
        return match, report, moves, settled

    def early_match(self) -> Match:
        """Compare, and return what the module's own code has no say in."""
        return self._early(self._compare())

    def _with(self, rename: Rename) -> _Loading:
        options = copy.copy(self._options)
        options["rename"] = rename
        return _Loading(self._module, self._given, options)

    def _early(self, match: Match) -> Match:
        is_late = self._survey.is_late
        by_source = {origin: name for name, origin in self._selected.items()}
        return replace(
            match,
            kept=tuple(name for name in match.kept if not is_late(name) and name not in self._survey.optional),
            unused=tuple(origin for origin in match.unused if not is_late(by_source[origin])),
        )

    # --- what is selected ----------------------------------------------------------------------------------------

    def _opaque_nodes(self) -> Iterable[tuple[str, Any]]:
        """Return the entries of the checkpoint's tree that may be what the module takes as values of any kind."""
        ends = {_last(name) for name, member in self._survey.members.items() if member.is_opaque}
        if not ends or not isinstance(self._given, Checkpoint):
            return ()
        return ((path, node) for path, node in entries(self._given.tree) if _last(path) in ends)

    def _select(self) -> dict[str, str]:
        """Return the sources' names by the module's; an array within a value of another kind is not one by itself."""
        options = self._options
        chosen = select(
            [*self._given, *(path for path in self._nodes if path not in self._given)],
            include=options["include"],
            exclude=options["exclude"],
            rename=options["rename"],
            path=self._path,
        )
        if not self._nodes:
            return chosen
        nodes = {name: origin for name, origin in chosen.items() if origin in self._nodes and self._is_opaque(name)}
        within: set[str] = set()
        for origin in nodes.values():
            unflatten(self._nodes[origin], lambda leaf: within.add(leaf.name), path=self._where)
        return {
            name: origin
            for name, origin in chosen.items()
            if name in nodes or (origin in self._given and origin not in within)
        }

    def _sort(self) -> None:
        for name, origin in self._selected.items():
            if origin in self._nodes and self._is_opaque(name):
                self._values[name] = None  # until it is read
                continue
            value = self._given[origin]
            if isinstance(value, _LAZY) or (_is_array(value) and not self._is_opaque(name)):
                try:
                    self._sources[name] = as_source(value, variable=origin)
                except UnsupportedDtype:
                    if not self._takes_any(name):
                        raise
                    self._values[name] = value
            elif self._takes_any(name):
                self._values[name] = value

    def _takes_any(self, name: str) -> bool:
        return self._is_opaque(name) or self._survey.is_custom(name)

    def _is_opaque(self, name: str) -> bool:
        member = self._survey.members.get(name)
        return member is not None and member.is_opaque

    # --- what it is compared with --------------------------------------------------------------------------------

    def _compare(self) -> Match:
        members = self._survey.members
        targets: dict[str, Spec] = dict.fromkeys((*members, *self._values), _ANYTHING)
        sources: dict[str, SourceSpec] = {}
        for name, origin in self._selected.items():
            source = self._sources.get(name)
            sources[origin] = spec = _ANYTHING if source is None else spec_of(source)
            if source is None and name not in self._values:
                targets.pop(name, None)  # neither an array nor where another kind of value is taken
            elif source is not None and (name in members or self._survey.is_custom(name)):
                targets[name] = self._target_spec(name, spec)
        options = self._options
        match = compare(targets, sources, self._selected, on_mismatch=options["on_mismatch"], cast=options["cast"])
        if not match.kept:
            return match
        filled = {self._place(pair.target) for pair in match.pairs}
        return replace(match, kept=tuple(name for name in match.kept if self._place(name) not in filled))

    def _target_spec(self, name: str, known: SourceSpec) -> Spec:
        """Return what a source is compared with: its own shape and type where the module's code decides what fits."""
        member = self._survey.members.get(name)
        own, shown = (None, None) if member is None else (member.own_spec, member.shown_spec)
        shape, dtype = known
        if shape is None or dtype is None:
            return own or shown or _ANYTHING
        if own is None or member is None or member.is_custom:
            return (shape if shown is None or self._options["on_mismatch"] == "error" else shown[0]), dtype
        if shown is not None and is_same_type(shown[1], dtype):  # the type that the module would have been saved with
            return own[0], dtype
        return own

    def _place(self, name: str) -> Place | None:
        """Return where the values of a name come to lie: a place of its own if that is not known.

        None for what the module itself does not have.
        """
        if name not in self._places:
            member = self._survey.members.get(name)
            self._places[name] = None if member is None else self._new_place(name, member)
        return self._places[name]

    def _new_place(self, name: str, member: Member) -> Place:
        spec = member.own_spec if member.is_filled else None
        if spec is None or member.own is None or not member.own.numel():
            return _place_of_its_own(name)
        return place_of_tensor(member.own, spec, assign=self._options["assign"])

    def _judge(self, match: Match, *, is_vain: bool = False, matched: Callable[[Rename], Match] | None = None) -> None:
        """Raise an error for what does not fit, if it is not wanted so."""
        target = type(self._module).__name__
        refuse(
            match,
            self._demands,
            is_vain=is_vain,
            source=self._where,
            target=target,
            path=self._path,
            matched=matched,
        )

    def _refuse_meta(self, pairs: Iterable[Pair]) -> None:
        names = [pair.target for pair in pairs if pair.target in self._survey.members]
        without = [name for name in names if self._survey.members[name].is_on_meta]
        if without:
            raise UsageError(
                "tensors on the meta device have no memory to load into",
                path=self._path,
                found=listed(list(map(repr, without))),
                hint="pass assign=True to put new tensors in their place, or call module.to_empty(device='cpu') first",
            )

    # --- where it goes -------------------------------------------------------------------------------------------

    def _move(self, pair: Pair) -> Move:
        member = self._survey.members.get(pair.target)
        target: np.ndarray | LateTarget | Place | None = None
        if member is not None and member.own is not None and member.is_direct:
            target = _memory_of(member)
        if target is None:
            target = self._place(pair.target) or _place_of_its_own(pair.target)
            if member is not None and member.own is not None and member.is_direct:
                target = _target_of(member.own, target)
        return move_of(pair, target, self._sources[pair.target])

    def _read_values(self, *, verify: bool, threads: int | None) -> None:
        origins = {name: self._selected[name] for name in self._values}
        nodes = [[name, self._nodes[origin]] for name, origin in origins.items() if origin in self._nodes]
        if nodes and isinstance(self._given, Checkpoint):
            tree = {"$": "dict", "items": nodes}
            self._values |= restore(self._given, tree, map_location="cpu", verify=verify, threads=threads)

    def _buffers(
        self, moves: Mapping[str, Move], winners: Mapping[str, str]
    ) -> tuple[dict[str, torch.Tensor], list[Move]]:
        """Return new tensors for what is not direct, and the moves that fill them; equal sources share one."""
        tensors: dict[str, torch.Tensor] = {}
        buffered: list[Move] = []
        made: dict[Hashable, torch.Tensor] = {}
        for name, move in moves.items():
            if not isinstance(move.target, Place):
                continue
            chosen = winners.get(name, name)
            pair, _, source = moves[chosen]
            value = self._given[self._selected[chosen]]
            if pair.how == "exact" and isinstance(value, torch.Tensor):
                tensors[name] = value
                continue
            key = (_identity(source), pair.how == "exact" or name)
            if key not in made:
                array = self._present(name) if pair.how == "overlap" else None
                if array is None:
                    array = np.empty(pair.target_shape, pair.target_dtype.newbyteorder("="))
                made[key] = to_torch(array, Leaf(name=name), "cpu")
                buffered.append(Move(pair, array, source))
            tensors[name] = made[key]
        return self._tied(tensors), buffered

    def _present(self, name: str) -> np.ndarray:
        """Return a copy of the values that a name has now."""
        member = self._survey.members[name]
        return _host_copy(member.shown if isinstance(member.shown, torch.Tensor) else member.own)

    def _tied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors of which those for one and the same parameter are one parameter, for `assign` to keep so."""
        if not self._options["assign"]:
            return tensors
        own = {name: member.own for name, member in self._survey.members.items() if member.own is not None}
        counts = Counter(map(id, own.values()))
        made: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            parameter = own.get(name)
            if isinstance(parameter, torch.nn.Parameter) and counts[id(parameter)] > 1:
                made[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return tensors | {name: made[id(item)] for name, item in own.items() if id(item) in made}

    def _state(self, match: Match, tensors: Mapping[str, torch.Tensor]) -> OrderedDict[str, Any]:
        """Return the state dict: new tensors, values of other kinds, and the module's own tensors where all is done."""
        loaded = {pair.target for pair in match.pairs}
        state: OrderedDict[str, Any] = OrderedDict()
        for name in self._selected:
            if name in self._values:
                state[name] = self._values[name]
            elif name in loaded:
                state[name] = tensors[name] if name in tensors else self._survey.members[name].own
            elif self._survey.is_custom(name):
                state[name] = self._survey.members[name].shown  # skipped, so it stays what it is
            elif self._survey.is_late(name) and name not in self._survey.members:
                state[name] = torch.empty(0)  # only its name is seen
        at = {self._place(name): state[name] for name in loaded if name in self._survey.members}
        for name in self._survey.members:
            place = self._place(name)
            if name not in state and place in at:
                state[name] = tensors.get(name, at[place])
        if self._metadata is not None:
            state._metadata = self._metadata  # type: ignore[attr-defined]
        return state

    def _hand_over(self, report: LoadReport, state: Mapping[str, Any]) -> LoadReport:
        """Call ``load_state_dict``, and return the report with what the module said of it."""
        strict = self._survey.has_own_verb and self._options["strict"]
        keywords = {"assign": True} if self._options["assign"] else {}
        try:
            said = self._module.load_state_dict(state, strict=strict, **keywords)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise VariableMismatch(
                f"the module's load_state_dict refused the values: {error}",
                path=self._path,
                hint="the module may have changed in part; load it again, or from another checkpoint",
            ) from error
        if said is None:
            return report
        loaded, skipped = set(report.loaded), {item.name for item in report.mismatched}
        missing = [name for name in said.missing_keys if self._survey.is_late(name) and name not in skipped]
        unexpected = [name for name in said.unexpected_keys if self._survey.is_late(name)]
        unused = [self._selected.get(name, name) for name in unexpected]
        kept = [name for name in report.kept if not self._survey.is_custom(name)]
        report = replace(
            report,
            loaded=tuple(name for name in report.loaded if name not in set(unexpected)),
            kept=tuple(dict.fromkeys([*kept, *(name for name in missing if name not in loaded)])),
            unused=tuple(dict.fromkeys([*report.unused, *unused])),
        )
        try:
            self._judge(Match(pairs=(), kept=tuple(missing), unused=tuple(unused)))
        except VariableMismatch as error:
            raise VariableMismatch(
                error.problem,
                rows=[*error.rows, "The module has changed: its own code had a say in this"],
                hint=error.hint,
            ) from error
        return report


def _last(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def _is_array(value: Any) -> bool:
    return isinstance(value, Stored | LazyArray | np.ndarray | torch.Tensor) or hasattr(value, "__array__")


def _place_of_its_own(name: str) -> Place:
    return Place(("of its own", name), 0, (), (), _ANYTHING[1])


def _is_direct(move: Move) -> bool:
    return not isinstance(move.target, Place)


def _memory_of(member: Member) -> np.ndarray | None:
    """Return the memory of a contiguous tensor on the CPU, by what ``state_dict`` shows of it; None for another one."""
    shown = member.shown
    if (
        member.own_spec is None
        or member.own_spec[1].type.__module__ != "numpy"
        or not shown.is_cpu
        or not shown.is_contiguous()
        or shown.is_conj()
        or shown.is_neg()
        or shown.untyped_storage().nbytes() < _end_of(shown)  # freed
    ):
        return None
    memory: np.ndarray = shown.numpy()
    return memory


def _target_of(own: torch.Tensor, place: Place) -> np.ndarray | LateTarget:
    """Return the memory of a tensor, or what is handed the values for it: a device's, or the base of a conjugate."""
    if own.device.type == "cpu" and not own.is_conj() and not own.is_neg():
        array = as_source(own, variable="")
        assert isinstance(array, np.ndarray)
        return array

    def hand_over(values: np.ndarray) -> None:
        with torch.no_grad():
            own.copy_(to_torch(values, Leaf(name=""), "cpu"))

    return LateTarget(place=place, present=lambda: _host_copy(own), hand_over=hand_over)


def _end_of(tensor: torch.Tensor) -> int:
    """Return where a contiguous tensor ends in its storage, in bytes."""
    end: int = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return end


def _host_copy(tensor: torch.Tensor) -> np.ndarray:
    array = as_source(tensor.detach().cpu().clone().resolve_conj().resolve_neg(), variable="")
    assert isinstance(array, np.ndarray)
    return array


def _identity(source: np.ndarray | LazyArray | OnDisk) -> Hashable:
    """Return what two sources have in common whose values are the same ones."""
    if isinstance(source, OnDisk):
        return source.location, source.variable.entry.alias_of or source.variable.entry.name
    return source.identity if isinstance(source, LazyArray) else place_of(source)
