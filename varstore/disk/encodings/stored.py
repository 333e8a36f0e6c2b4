"""The stored bytes of a variable, as those who decode them ask for them."""

from __future__ import annotations

from varstore.storage import syscalls

__all__ = ["Stored"]


class Stored:
    """An open ``out``: its descriptor, and its bytes as they lie there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, nbytes: int, offset: int) -> bytes | memoryview:
        """Return so many bytes from this offset on.

        Raises:
            OSError: the file ends before.
        """
        found = syscalls.pread(self.fd, nbytes, offset)
        if len(found) != nbytes:
            raise OSError("the file became shorter while it was read")
        return found
