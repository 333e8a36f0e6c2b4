"""Read what a checkpoint contains: its marker, its manifest or, without one, its folders (FORMAT F4, F5)."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from varstore.disk.read.scan import WalkedEntries
from varstore.errors import FormatError, IncompleteCheckpoint, VarstoreError
from varstore.layout.location import Identity, Location
from varstore.layout.manifest import MANIFEST_LIMIT, Entry, Manifest, digest_in
from varstore.layout.names import MANIFEST, MARKER
from varstore.layout.readable import readable
from varstore.storage.directory import Directory, marker_identity, replaced_error

__all__ = ["Content", "incomplete_error", "read_content"]


class Content(NamedTuple):
    """The content of a checkpoint; `damaged` maps the name of each incomplete variable to what is wrong with it."""

    entries: Mapping[str, Entry]
    manifest: Manifest | None
    damaged: Mapping[str, str] = MappingProxyType({})

    def fingerprint(self) -> bytes:
        """Return what is the same for equal states, on all machines that see the checkpoint, also if saved apart."""
        import hashlib  # here, since few processes compare checkpoints, and all import this module

        hasher = hashlib.blake2b(self.manifest.tree.encode() if self.manifest else b"", digest_size=16)
        for entry in self.entries.values():
            hasher.update(repr((entry.name, entry.nbytes, entry.form, entry.digests, entry.regions)).encode())
        return hasher.digest()


def read_content(directory: Directory, *, allow_incomplete: bool) -> tuple[Location, Content]:
    """Return the directory's location with the identity of the checkpoint in it, and the checkpoint's content.

    A save writes the manifest before the marker, and a removal takes the marker first. So a directory without a
    manifest counts as a checkpoint only if it has the marker before the manifest is looked for, and the same marker
    after all folders have been listed.

    Raises:
        IncompleteCheckpoint: there is no marker, and `allow_incomplete` is False.
        ManifestError: the manifest is torn, edited, or of a later version, and `allow_incomplete` is False.
        StorageError: the checkpoint was replaced.
    """
    if allow_incomplete:
        return _read_incomplete(directory)
    marker = _require_marker(directory)
    manifest, digest = _read_manifest(directory)
    if manifest is not None:
        location = directory.location.known_as(digest, unshared=manifest.unshared)
        return location, Content(manifest.entries, manifest)
    location = directory.location.known_as(marker)
    entries = WalkedEntries(directory, location)
    if _require_marker(directory) != marker:
        raise replaced_error(directory.path)
    return location, Content(entries, None)


def incomplete_error(root: str) -> IncompleteCheckpoint:
    """Return the error for a directory without a marker."""
    return IncompleteCheckpoint(
        f"no {MARKER!r}: not a checkpoint, or its save never finished",
        path=root,
        hint="`varstore salvage` makes a checkpoint of what is whole, and allow_incomplete=True opens it",
    )


def _read_incomplete(directory: Directory) -> tuple[Location, Content]:
    manifest = None
    has_marker = directory.marker() is not None
    try:
        manifest, digest = _read_manifest(directory)
        unshared = manifest is not None and manifest.unshared
        identity = digest or directory.identity()
        location = directory.location.known_as(identity, has_marker=has_marker, unshared=unshared)
    except FormatError:
        location = directory.location.known_as(directory.identity(), has_marker=has_marker)
    whole, damaged = _salvage(directory, manifest.entries if manifest else WalkedEntries(directory, location))
    if damaged:
        directory.check_still_there()
    return location, Content(whole, manifest, MappingProxyType(damaged))


def _require_marker(directory: Directory) -> Identity | None:
    """Return what tells the marker from others."""
    marker = directory.marker()
    if marker is None:
        raise incomplete_error(directory.path)
    if not stat.S_ISREG(marker.st_mode):
        raise IncompleteCheckpoint("its marker is not a file", path=directory.place(MARKER))
    return marker_identity(marker)


def _read_manifest(directory: Directory) -> tuple[Manifest | None, bytes | None]:
    """Return the manifest and the digest in its header; None where there is none."""
    data = directory.read_if_there(MANIFEST, limit=MANIFEST_LIMIT)
    if data is None:
        return None, None
    return Manifest.decode(data, path=directory.place(MANIFEST)), digest_in(data)


def _salvage(directory: Directory, entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, str]]:
    whole: dict[str, Entry] = {}
    damaged: dict[str, str] = {}
    for name in entries:
        try:
            entry = entries[name]
            if entry.meta is not None:
                readable(entry, path=directory.path)
            with directory.out(entry):
                whole[name] = entry
        except (VarstoreError, OSError) as error:
            damaged[name] = str(error)
    return whole, damaged
