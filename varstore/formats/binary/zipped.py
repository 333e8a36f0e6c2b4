"""The files in a zip archive, seen as those in a folder."""

from __future__ import annotations

from dataclasses import dataclass

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.folder import DEEPEST, WalkedFolder
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import Member, archive_members

__all__ = ["ZippedFolder"]

_FILE = 300
"""The bytes of memory that one file or folder takes beside its name."""


@dataclass(frozen=True, slots=True)
class ZippedFolder(WalkedFolder):
    """The members of an archive, like the files that `WalkedFolder.walked` finds; they are read in place."""

    members: dict[str, Member]

    @classmethod
    def opened(cls, source: Source, budget: Budget) -> ZippedFolder:
        """List the members of an archive.

        Raises:
            UnsafeContent: a name is not a plain path, or is also that of a folder; or what is unpacked is out of
                proportion to the size of the archive.
            FormatError, SizeMismatch: see `archive_members`; or folders are nested too deeply.
        """
        members = archive_members(source)
        found = cls(source.path, source.path, {}, {"": []}, {"": []}, members)
        for name, member in members.items():
            budget.charge(_FILE + len(name), variable=name)
            if not member.is_plain:
                budget.unpack(member.size)
            folder, _, file = found._folder_of(name, budget)
            found.files[name] = member.packed
            found.names[folder].append(file)
        if taken := found.files.keys() & found.folders.keys():
            raise UnsafeContent("a member is a file and a folder", path=source.path, found=repr(min(taken)[:100]))
        return found

    def content(self, name: str, *, most: int | None = None) -> bytes:
        """Return the content of one of the files, which is compared with its checksum.

        Raises:
            SizeMismatch: it is longer than `most` bytes.
            DigestMismatch: it does not match the checksum in the archive.
            FormatError: the member is damaged.
        """
        member = self.members[name]
        self._check_length(name, member.size, most)
        return member.content()

    def _folder_of(self, name: str, budget: Budget) -> tuple[str, str, str]:
        """Return the folder and the name of a file; list the folders that lead to it."""
        parts = name.split("/")
        if {"", "."} & set(parts):
            raise UnsafeContent("the name of a member is not a plain path", path=self.path, found=repr(name[:100]))
        if len(parts) > DEEPEST:
            raise FormatError("folders are nested too deeply", path=self.path, found=f"more than {DEEPEST}")
        above = ""
        for part in parts[:-1]:
            here = f"{above}/{part}" if above else part
            if here not in self.folders:
                budget.charge(_FILE + len(here), variable=name)
                self.folders[here], self.names[here] = [], []
                self.folders[above].append(part)
            above = here
        return above, "/", parts[-1]
