"""Plan a save: determine every folder, size and link, and refuse what cannot be saved, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from varstore.errors import UsageError
from varstore.layout.collector import collector_paused
from varstore.layout.dtypes import data_type_of
from varstore.layout.encodings import RAW, ZARR, is_plain
from varstore.layout.graphs import GRAPH, check_bound, uses
from varstore.layout.manifest import NO_ATTRIBUTES, Entry, kept_attributes
from varstore.layout.meta import Meta
from varstore.layout.names import Folder, folder_of
from varstore.layout.readable import readable
from varstore.layout.regions import Region
from varstore.layout.shards import SMALLEST, Level
from varstore.values.arrays import Source, Stored, as_source
from varstore.values.attached import PlannedFile, plan_files
from varstore.values.lazy import LazyArray

__all__ = ["Encode", "Outcome", "PlannedVariable", "SavePlan", "may_stay", "plan_save"]

Encode = Literal["raw", "zarr"] | None
"""What variables shall be; None writes raw values, and links what is there in any encoding."""

_meta = lru_cache(maxsize=4096)(Meta)


class Outcome(NamedTuple):
    """What ``out`` of a variable became, where that is not known before: the fields of an entry."""

    encoding: str
    nbytes: int
    content_digests: bytes


class PlannedVariable(NamedTuple):
    """One variable to save: `nbytes` of ``out`` from `source`, or a link to the ``out`` of `alias_of`."""

    name: str
    folder: Folder
    meta: Meta
    nbytes: int
    source: Source
    attributes: Mapping[str, Any]
    alias_of: str = ""

    @property
    def is_linked(self) -> bool:
        """Whether ``out`` is a link to a file of another variable, in this checkpoint or in another one."""
        return bool(self.alias_of) or isinstance(self.source, Stored)

    @property
    def file(self) -> str:
        """The path of ``out`` relative to the checkpoint."""
        return f"{self.folder}/out"

    def entry(self, digests: bytes) -> Entry:
        """Return the entry for the manifest, once the digests are known; without any, it has the source's regions."""
        name, folder, meta, nbytes, source, attributes, alias_of = self
        encoding, content = RAW.name, b""
        regions: tuple[Region, ...] = ()
        if isinstance(source, Stored):
            encoding, content = source.entry.encoding, source.entry.content_digests
            regions = () if digests else source.entry.regions
        return Entry(name, folder, meta, nbytes, digests, encoding, attributes, alias_of, b"", True, content, regions)


class SavePlan(NamedTuple):
    """A complete save; `parents` are the folders that contain other folders, outermost first.

    What is written is compressed at this `level` if the `encoding` is "zarr".
    """

    variables: tuple[PlannedVariable, ...]
    parents: tuple[str, ...]
    attributes: Mapping[str, Any]
    tree: str
    files: tuple[PlannedFile, ...] = ()
    links: bool = True
    """Whether files may be links; without it, each file is written or copied."""
    encoding: Encode = None
    level: Level = "fast"
    used: frozenset[str] = frozenset()
    """The variables whose ``out`` a graph reads: they are raw, whatever the encoding of the others."""

    def encoding_of(self, name: str) -> Encode:
        """Return what a variable shall be."""
        return "raw" if name in self.used else self.encoding

    @property
    def written(self) -> list[PlannedVariable]:
        """The variables whose ``out`` is to be written, not linked."""
        return [variable for variable in self.variables if not variable.is_linked]

    def entries(self, digests: Mapping[str, bytes], outcomes: Mapping[str, Outcome]) -> dict[str, Entry]:
        """Return the entries for the manifest by name, once the digests are known.

        `outcomes` are of variables whose encoding was not known before they were written. Tied variables share a file.
        """
        entries = {variable.name: variable.entry(digests[variable.name]) for variable in self.variables}
        for name, outcome in outcomes.items():
            entries[name] = entries[name]._replace(**outcome._asdict())
        if any(entry.encoding != RAW.name or entry.regions for entry in entries.values()):
            for name, entry in entries.items():
                if entry.alias_of:
                    first = entries[entry.alias_of]
                    shared = {field: getattr(first, field) for field in Outcome._fields}
                    entries[name] = entry._replace(**shared, regions=first.regions)
        return entries

    @property
    def tops(self) -> dict[str, None]:
        """The names of all that is made in the root: the first parts of the folders, in order, and then the files."""
        return dict.fromkeys([*_tops(self.variables), *(file.name for file in self.files)])

    @property
    def nbytes(self) -> int:
        """The number of bytes of values and attached files to write, links not included."""
        files = sum(file.nbytes for file in self.files if file.stored is None)
        return sum(variable.nbytes for variable in self.written) + files


def plan_save(
    variables: Mapping[str, Any],
    *,
    attributes: Mapping[str, Any] | None = None,
    variable_attributes: Mapping[str, Mapping[str, Any]] | None = None,
    tree: str = "",
    files: Mapping[str, Any] | None = None,
    links: bool = True,
    encoding: Encode = None,
    level: Level = "fast",
) -> SavePlan:
    """Return the plan for saving these variables.

    With `encoding`, stored variables of another one are not linked, but read. Those that a graph uses are raw.

    Raises:
        InvalidName: a name cannot be a folder; see `folder_of`.
        UnsupportedDtype: the format cannot store a type; see `data_type_of`.
        UsageError: `variables` is not a mapping of names to arrays, attributes are not JSON, or `variable_attributes`
            has names that are not in `variables`; or of `plan_files`, whose errors these are too.
        VariableNotFound, VariableMismatch: a graph among the files uses a variable that is not as it expects.
    """
    if not isinstance(variables, Mapping):
        raise UsageError(
            "variables must be a mapping of names to arrays",
            found=type(variables).__name__,
            hint="pass a dict, or save nested state with save_state",
        )
    own_attributes = variable_attributes or {}
    if unknown := [name for name in own_attributes if name not in variables]:
        raise UsageError("variable_attributes has names that are not in variables", found=unknown[:5])
    kept = NO_ATTRIBUTES if attributes is None else kept_attributes(attributes)
    with collector_paused():
        folders = list(map(folder_of, variables))
        names = list(map(str.__str__, variables))  # of an enum's member, the manifest keeps its text
        sources = list(map(as_source, variables.values(), names))
        forms = [_form(source, encoding) for source in sources]
        types = [data_type_of(dtype, variable=name) for name, (_, dtype, _) in zip(names, forms, strict=True)]
        own = _attributes(names, sources, own_attributes)
        planned = [
            PlannedVariable(name, folder, _meta(shape, row), _nbytes(shape, dtype, source), source, its, alias)
            for name, folder, row, (shape, dtype, source), its, alias in zip(
                names, folders, types, forms, own, _aliases(names, sources), strict=True
            )
        ]
        parents = {parent for folder in folders if "/" in folder for parent in _parents(folder)}
    attached = () if files is None else _attached(files, planned)
    used: set[str] = set()
    if attached:
        used = {name for file in attached for name in uses(file.entry(b""))}
        used |= {variable.alias_of for variable in planned if variable.name in used and variable.alias_of}
        planned = [_unpacked(variable) if variable.name in used else variable for variable in planned]
    return SavePlan(
        variables=tuple(planned),
        parents=tuple(sorted(parents)),
        attributes=kept,
        tree=tree,
        files=attached,
        links=links,
        encoding=encoding,
        level=level,
        used=frozenset(used),
    )


def _unpacked(variable: PlannedVariable) -> PlannedVariable:
    """Return a variable to be saved with raw values."""
    shape, dtype, source = _form(variable.source, "raw")
    return variable._replace(source=source, nbytes=_nbytes(shape, dtype, source))


def _attached(files: Mapping[str, Any], planned: list[PlannedVariable]) -> tuple[PlannedFile, ...]:
    attached = plan_files(files, _tops(planned))
    if any(file.kind == GRAPH for file in attached):
        check_bound((file.entry(b"") for file in attached), {v.name: v.meta for v in planned})
    return attached


def _tops(variables: Iterable[PlannedVariable]) -> dict[str, None]:
    return dict.fromkeys(variable.folder.partition("/")[0] for variable in variables)


def _form(source: Source, encoding: Encode) -> tuple[tuple[int, ...], np.dtype[Any], Source]:
    """Return shape, type and source of the values: for a stored variable, the variable itself if it can be linked."""
    if not isinstance(source, Stored):
        return source.shape, source.dtype, source
    entry, path = source.entry, source.location.path
    if entry.meta is None:
        raise UsageError(
            "the variable does not have a meta file, so its shape and data type are unknown",
            path=path,
            variable=entry.name,
            hint="load it with load_variables or load_into, whose targets have a shape and type, and save those",
        )
    variable = readable(entry, path=path)
    if variable.stored == variable.dtype and may_stay(entry, encoding):
        return variable.shape, variable.dtype, source
    return variable.shape, variable.dtype, LazyArray(variable.shape, variable.dtype, source.numpy)


def may_stay(entry: Entry, encoding: Encode) -> bool:
    """Return whether a stored variable may stay in the encoding that it has; small ones are always raw."""
    if encoding is None:
        return entry.encoding in (RAW.name, ZARR.name)
    return entry.encoding == (RAW.name if entry.nbytes < SMALLEST and is_plain(entry.encoding) else encoding)


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any], source: Source) -> int:
    """Return the size of ``out``: of one that is linked, the size it has; of one that will be encoded, the values'."""
    if isinstance(source, Stored):
        return source.entry.nbytes
    return math.prod(shape) * dtype.itemsize


def _attributes(
    names: list[str], sources: list[Source], given: Mapping[str, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return the attributes of each variable: those that are given, or else those that are stored with its values."""
    own = [source.entry.attributes if isinstance(source, Stored) else NO_ATTRIBUTES for source in sources]
    for index, name in enumerate(names if given else ()):
        if (attributes := given.get(name)) is not None:
            own[index] = kept_attributes(attributes, variable=name)
    return own


def _aliases(names: list[str], sources: list[Source]) -> list[str]:
    """Return, for each variable, the first one that is tied to it, or "" if it is the first itself."""
    viewed = _viewed(sources)
    first_of: dict[Hashable, str] = {}
    aliases = []
    for name, source in zip(names, sources, strict=True):
        identity: Hashable
        if isinstance(source, Stored):
            entry = source.entry
            identity = (source.location, entry.alias_of or entry.name, entry.meta)
        elif not source.nbytes:
            identity = None
        elif isinstance(source, LazyArray):
            identity = source.identity
        elif viewed is not None and source.base is None and id(source) not in viewed:
            identity = ("array", id(source))
        else:
            address = source.__array_interface__["data"][0]
            identity = (address, source.shape, source.strides, source.dtype)
        first = name if identity is None else first_of.setdefault(identity, name)
        aliases.append("" if first == name else first)
    return aliases


def _viewed(sources: list[Source]) -> set[int] | None:
    """Return the ids of the arrays that others are views of, or None if there are views of memory that no array owns.

    Arrays can be the same view of the same memory only if they are views, or one is what others are views of. To ask
    numpy for addresses takes some microseconds per array, so it is not done for arrays that have memory of their own.
    """
    viewed = set()
    for source in sources:
        if isinstance(source, np.ndarray):
            owner: Any = source
            while isinstance(owner, np.ndarray) and owner.base is not None:
                owner = owner.base
            if not isinstance(owner, np.ndarray) or not owner.flags.owndata:
                return None
            if owner is not source:
                viewed.add(id(owner))
    return viewed


def _parents(folder: Folder) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
