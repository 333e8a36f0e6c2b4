"""Where the variables of a checkpoint lie in the Zarr hierarchy: one path per variable, and the groups above them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from varstore.errors import UsageError
from varstore.layout.manifest import Entry

__all__ = ["Hierarchy"]


class Hierarchy:
    """The paths of the arrays, and what lies in each group.

    Attributes:
        arrays: the entry of each variable by the path of its array.
        groups: the names in each group by the group's path; ``""`` is the root.
    """

    def __init__(self, entries: Iterable[Entry], *, path: str) -> None:
        known = list(entries)
        names = {entry.name for entry in known}
        plain = {entry.name: entry for entry in known if _is_path(entry.name) and not _is_below(entry.name, names)}
        self.arrays: dict[str, Entry] = dict(plain)
        others = (entry for entry in known if entry.name not in plain)
        for entry in sorted(others, key=lambda entry: entry.folder.count("/")):  # what lies above comes first
            self._add_by_folder(entry, path)
        self.groups: dict[str, dict[str, None]] = {"": {}}
        for array, entry in self.arrays.items():
            parts = array.split("/")
            for depth, part in enumerate(parts):
                group = "/".join(parts[:depth])
                if group in self.arrays:
                    raise _no_path(entry, array, path)
                self.groups.setdefault(group, {})[part] = None

    def _add_by_folder(self, entry: Entry, path: str) -> None:
        """Add a variable under its folder; below an array, where no other one can lie, its ``/`` become ``%2F``."""
        parts = entry.folder.split("/")
        depth = next((i for i in range(1, len(parts)) if "/".join(parts[:i]) in self.arrays), len(parts))
        array = "/".join([*parts[: depth - 1], "%2F".join(parts[depth - 1 :])])
        if array in self.arrays or not _is_path(array):
            raise _no_path(entry, array, path)
        self.arrays[array] = entry

    def siblings(self, array: str) -> Mapping[str, None]:
        """Return the names in the group of an array."""
        return self.groups[array.rpartition("/")[0]]


def _is_path(name: str) -> bool:
    r"""Return whether zarr takes a name as a path as it is: it rewrites ``\``, and Zarr reserves ``__``."""
    return "\\" not in name and all(
        part.strip(".") and not part.startswith("__") and part != "zarr.json" for part in name.split("/")
    )


def _is_below(name: str, names: set[str]) -> bool:
    return any(char == "/" and name[:at] in names for at, char in enumerate(name))


def _no_path(entry: Entry, array: str, path: str) -> UsageError:
    return UsageError(
        "there is no free path in a Zarr hierarchy for this variable",
        path=path,
        variable=entry.name,
        found=f"another array at, above or below {array!r}" if _is_path(array) else f"{array!r}, which Zarr reserves",
        hint="give it another name: vs.save(new, vs.open(path).select(rename={…}))",
    )
