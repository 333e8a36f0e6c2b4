"""What opening and reading one file may cost, measured by its size on disk.

A file that was made to do harm is small: it makes its reader do the work, with counts, references and compressed
bytes that stand for far more than they take. So a reader pays for everything that a file makes it create from one
budget, which is made when the file is opened. A budget has two accounts. `charge` is for the memory that opening takes:
containers, names, records and bytes that are unpacked for parsing. `announce` is for the values of arrays, which may be
allocated when they are read: arrays that repeat a few bytes, chunks that are absent, and compressed bytes.

What programs write is far within the budget, because an array takes about as many bytes in a file as in memory. A
file of compressed zeros may not be, and its owner can raise the limit.
"""

from __future__ import annotations

from varstore.errors import FormatError, UnsafeContent
from varstore.formats.binary.source import Source
from varstore.text.hints import plural

__all__ = ["ARRAY", "Budget"]

_FREE = 64 << 20
_SHOWN = 100
_MEMORY, _VALUES = 64, 4
_FEWEST_ABSENT, _ABSENT = 1 << 16, 64

ARRAY = 2000
"""The bytes of memory that one lazy array takes, with what it needs to read its values."""


class Budget:
    """The budget of a file of `size` bytes, or of a folder of `files` files; `limit` raises what its values may take.

    `size` counts the bytes on disk, whether they are compressed or not.
    """

    __slots__ = (
        *("_absent", "_beside", "_memory", "_unpacked", "_values"),
        *("absent_chunks", "limit", "path", "refuses_absent", "size"),
    )

    def __init__(
        self, path: str, size: int, *, files: int = 1, limit: int | None = None, refuses_absent: bool = False
    ) -> None:
        self.path = path
        self.size = size
        self._beside: set[str] = set()
        self.limit = max(_FREE + _VALUES * size, limit or 0)
        self._memory = max(_FREE + _MEMORY * size, limit or 0)
        self._values = self._unpacked = self.limit
        self.refuses_absent = refuses_absent
        self.absent_chunks: dict[str, int] = {}
        """How many chunks are absent, of each array that has such chunks."""
        self.allow_absent(files)

    def allow_absent(self, files: int) -> None:
        """Set how many chunks may be absent, by the number of files."""
        self._absent = max(_FEWEST_ABSENT, _ABSENT * files)

    @classmethod
    def of(cls, source: Source, *, limit: int | None = None, folder: Budget | None = None) -> Budget:
        """Return the budget of a file: its own, or that of the folder that it is opened with, which grows by it."""
        if folder is None:
            return cls(source.path, source.size, limit=limit)
        folder.include(source)
        return folder

    def include(self, file: Source) -> None:
        """Count the size of another file that this one refers to, once."""
        if str(file.identity) not in self._beside:
            self._beside.add(str(file.identity))
            self.size += file.size
            self.limit += _VALUES * file.size
            self._memory += _MEMORY * file.size
            self._values += _VALUES * file.size
            self._unpacked += _VALUES * file.size

    def charge(self, nbytes: int, *, variable: str | None = None) -> None:
        """Pay for memory that the file makes its reader use.

        Raises:
            UnsafeContent: the budget is used up.
        """
        self._memory -= nbytes
        if self._memory < 0:
            raise UnsafeContent(
                "opening this file would use memory out of proportion to its size",
                path=self.path,
                variable=variable and variable[:_SHOWN],
                found=f"a file of {plural(self.size, 'byte')}",
            )

    def announce(self, nbytes: int, *, variable: str | None = None) -> None:
        """Pay for values that the file announces: what an array takes in memory.

        Raises:
            UnsafeContent: the arrays of the file take more than the limit.
        """
        self._values -= nbytes
        if self._values < 0:
            raise self.exceeded(self.limit - self._values, variable=variable)

    def unpack(self, nbytes: int) -> None:
        """Pay for compressed bytes that are unpacked as a whole when a part of them is read.

        Raises:
            UnsafeContent: they take more than the limit.
        """
        self._unpacked -= nbytes
        if self._unpacked < 0:
            raise self.exceeded(self.limit - self._unpacked)

    def exceeded(self, nbytes: int, *, variable: str | None = None) -> UnsafeContent:
        """Return the error that says that values take `nbytes`, which is more than the limit."""
        return UnsafeContent(
            "the values in this file are out of proportion to its size",
            path=self.path,
            variable=variable and variable[:_SHOWN],
            found=f"{plural(nbytes, 'byte')} or more from {self.size:,} on disk",
            expected=f"at most the limit of {plural(self.limit, 'byte')}",
            hint=f"if you trust the file, read it with a higher limit, such as limit={2 * nbytes}",
        )

    def absent(self, chunks: int, *, variable: str) -> None:
        """Pay for chunks that are not in the file, and mean its fill value.

        Raises:
            UnsafeContent: too many chunks are absent.
            FormatError: chunks are absent, which the caller does not accept.
        """
        if not chunks:
            return
        if self.refuses_absent:
            raise FormatError(
                "chunks of the array are absent",
                path=self.path,
                variable=variable[:_SHOWN],
                found=plural(chunks, "absent chunk"),
                hint='they are lost, or all fill value, which zarr does not write; absent="fill" takes them for that',
            )
        self.absent_chunks[variable] = self.absent_chunks.get(variable, 0) + chunks
        self._absent -= chunks
        if self._absent < 0:
            raise UnsafeContent(
                "too many chunks of the arrays are absent",
                path=self.path,
                variable=variable[:_SHOWN],
                found=f"{chunks:,}",
            )
