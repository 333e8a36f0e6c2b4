"""The attached files of a save: each is linked to an equal one of another checkpoint, or written from its source."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping

import numpy as np

from varstore.disk.blocks import copy_file, digest_block, digest_file_block, spans, write_out
from varstore.disk.save.links import Links
from varstore.disk.save.staging import Staging
from varstore.errors import StorageError, VarstoreError
from varstore.storage import syscalls
from varstore.values.attached import PlannedFile, SourceFile, StoredFile, identity_of
from varstore.values.plan import SavePlan

__all__ = ["AttachedFiles", "link_equal"]


def link_equal(plan: SavePlan, base: Mapping[str, StoredFile]) -> SavePlan:
    """Return the plan with base's files to be linked in place of those that equal them in size and digest.

    Raises:
        StorageError: a source changed since the plan was made.
    """
    return plan._replace(files=tuple(_equal_in(base, file) for file in plan.files))


def _equal_in(base: Mapping[str, StoredFile], file: PlannedFile) -> PlannedFile:
    stored = base.get(file.name)
    if file.stored is not None or stored is None or stored.entry.nbytes != file.nbytes:
        return file
    return file._replace(stored=stored) if _digests_of(file) == stored.entry.digests else file


def _digests_of(file: PlannedFile) -> bytes:
    if isinstance(file.source, np.ndarray):
        values = file.source
        return b"".join(digest_block(values, start, stop) for start, stop in spans(file.nbytes))
    assert isinstance(file.source, SourceFile)
    fd = _opened(file.source)
    try:
        return b"".join(digest_file_block(fd, start, stop) for start, stop in spans(file.nbytes))
    finally:
        os.close(fd)


def _opened(source: SourceFile) -> int:
    """Open a source, if it is still the file that the plan was made for."""
    fd = syscalls.open_fd(source.path, syscalls.READ_WITHOUT_WAITING)
    try:
        if not _is_same(fd, source):
            raise _changed(source)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_same(fd: int, source: SourceFile) -> bool:
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and identity_of(status) == source.identity


def _changed(source: SourceFile) -> StorageError:
    return StorageError(
        "the file changed while it was being saved", path=source.path, hint="save again when nobody writes to it"
    )


class AttachedFiles:
    """Writes attached files into the root of the staging folder; their digests go to `digests`, by name."""

    def __init__(
        self, staging: Staging, links: Links, digests: dict[str, bytes], advance: Callable[[int], None] | None
    ) -> None:
        self._fd = staging.fd
        self._sync = staging.durability.each
        self._links = links
        self._digests = digests
        self._advance = advance

    def write(self, file: PlannedFile) -> None:
        """Link or write one file; a base that went meanwhile is done without.

        Raises:
            StorageError: the source changed since the plan was made.
            VarstoreError: it is a file of a checkpoint that is no longer there, or damaged.
        """
        if file.stored is not None:
            try:
                self._links.add_file(file, file.stored)
            except (VarstoreError, OSError):
                if file.stored is file.source:
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name, dir_fd=self._fd)
            else:
                return
        if isinstance(file.source, np.ndarray):
            self._digests[file.name] = write_out(file.name, file.source, self._fd, sync=self._sync)
        else:
            assert isinstance(file.source, SourceFile)
            self._copy(file, file.source)
        if self._advance:
            self._advance(file.nbytes)

    def _copy(self, file: PlannedFile, source: SourceFile) -> None:
        fd = _opened(source)
        try:
            self._digests[file.name] = copy_file(file.name, fd, file.nbytes, self._fd, sync=self._sync)
            if not _is_same(fd, source):
                raise _changed(source)
        finally:
            os.close(fd)
