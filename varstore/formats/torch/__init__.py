"""PyTorch's files: zip (since 1.6), the older chain of pickles, and distributed checkpoint folders.

Reading needs no torch and runs nothing of the file; what is written is torch's zip format in its plainest
form, which `torch.load` takes with weights_only and with mmap.
"""

from __future__ import annotations

import os

from varstore.errors import FormatError
from varstore.formats.binary.magic import is_tar
from varstore.formats.binary.source import Source
from varstore.formats.binary.zip import is_zip
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.torch.distributed import read_distributed
from varstore.formats.torch.legacy import read_legacy
from varstore.formats.torch.write import write
from varstore.formats.torch.zip import read_zip

__all__ = ["read", "write"]


def read(path: str | os.PathLike[str]) -> ForeignCheckpoint:
    """Read a PyTorch file or distributed checkpoint folder; whole modules become their state dict.

    Raises:
        UnsafeContent: the file asks for code.
        FormatError: it is torn, no PyTorch file, a TorchScript program or a tar of before 0.1.10.
    """
    if os.path.isdir(path):
        return read_distributed(os.fspath(path))
    source = Source(path)
    if is_zip(source):
        return read_zip(source)
    if is_tar(source.bytes(0, min(512, source.size))):
        raise FormatError(
            "this is PyTorch's tar format of before version 0.1.10, which is not read",
            path=source.path,
            hint="load it with torch and save it again",
        )
    return read_legacy(source)
