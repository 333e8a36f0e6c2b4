"""A variable as a TensorStore spec: TensorStore opens the file ``out`` itself, as the only chunk of an array."""

from __future__ import annotations

import os
from typing import Any

from varstore.disk.read.variable import Variable
from varstore.errors import UsageError
from varstore.layout.readable import readable
from varstore.layout.shards import array_document, bytes_codec
from varstore.values.arguments import checked

__all__ = ["tensorstore_spec"]


@checked
def tensorstore_spec(variable: Variable) -> dict[str, Any]:
    """Return a spec with which `tensorstore.open` opens a variable, read-only.

    TensorStore reads the whole variable, also for a slice, and does not compare it with its digests; `verify` does.
    A file that is missing is an error, not zeros.

    Raises:
        UsageError: the bytes of ``out`` are not the values as they are in memory.

    Example:
        >>> import tensorstore
        >>> from varstore.adapters.zarr import tensorstore_spec
        >>> checkpoint = vs.save("lenet", {"fc/weight": np.arange(6.0).reshape(2, 3)})
        >>> tensorstore.open(tensorstore_spec(checkpoint["fc/weight"])).result()[1, 1:].read().result()
        array([4., 5.])
    """
    known = readable(variable.entry, path=variable.root)
    if not known.encoding.is_plain or known.stored != known.dtype:
        raise UsageError(
            "TensorStore cannot read this variable from its file",
            path=variable.path,
            variable=variable.name,
            found=f"encoding {known.encoding.name!r}, {known.stored} on disk",
            expected=f"encoding 'raw', {known.dtype} on disk",
            hint="save it again as raw values: varstore.save(path, varstore.load(source))",
        )
    chunk = tuple(max(extent, 1) for extent in known.shape)
    key = "/".join(["c", *("0" * len(chunk))])
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "kvstack",
            "layers": [
                {"base": {"driver": "file", "path": os.path.join(os.path.abspath(variable.path), "out")}, "exact": key}
            ],
        },
        "metadata": array_document(
            known.shape, known.dtype, chunk=chunk, separator="/", codec=bytes_codec(known.dtype), attributes={}
        ),
        "open": True,
        "assume_metadata": True,
        "fill_missing_data_reads": False,
    }
