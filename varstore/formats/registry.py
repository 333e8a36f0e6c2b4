"""The table of formats.

To add a format, add a row. The format of an existing file is determined by its content and, if that is not sufficient,
by its suffix. The format of a file to be written is determined by its suffix.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from varstore.errors import UsageError
from varstore.formats import detect as recognise
from varstore.formats.binary.source import Held
from varstore.formats.detect import Probe
from varstore.storage.looking import kind_of

__all__ = ["FORMATS", "Format", "detect", "named", "refuse_stranger", "target_format"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row of the table; formats with `is_nested` keep scalars and the structure of nested state, and ties.

    Files of those with `is_pickle` can name what varstore does not know. Formats with `packs` store values of less than
    a byte packed.

    `folder` says which of its checkpoints are folders, which no file object can hold: those that are written, or all.
    """

    name: str
    suffixes: tuple[str, ...]
    recognises: Callable[[Probe], bool]
    writes: bool = True
    is_nested: bool = False
    is_pickle: bool = False
    packs: bool = False
    folder: Literal["", "written", "always"] = ""

    @property
    def module(self) -> Any:
        """The module with the functions `read` and `write`, which is imported on first use."""
        return importlib.import_module(f"varstore.formats.{_MODULES.get(self.name, self.name)}")


FORMATS: tuple[Format, ...] = (
    Format(name="varstore", suffixes=("",), recognises=recognise.is_native, is_nested=True, folder="always"),
    Format(
        name="safetensors",
        suffixes=(".safetensors", ".safetensors.index.json"),
        recognises=recognise.is_safetensors,
        packs=True,
    ),
    Format(
        name="torch",
        suffixes=(".pt", ".pth", ".bin", ".tar", ".pt2"),
        recognises=recognise.is_torch,
        is_nested=True,
        is_pickle=True,
    ),
    Format(name="numpy", suffixes=(".npz", ".npy"), recognises=recognise.is_numpy),
    Format(
        name="oneflow",
        suffixes=(".of",),
        recognises=recognise.is_oneflow,
        is_nested=True,
        is_pickle=True,
        folder="written",
    ),
    Format(name="oneflow-legacy", suffixes=(), recognises=lambda _: False, folder="always"),
    Format(
        name="paddle",
        suffixes=(".pdparams", ".pdopt", ".pdckpt", ".pdiparams"),
        recognises=recognise.is_paddle,
        is_nested=True,
        is_pickle=True,
    ),
    Format(
        name="megengine", suffixes=(".mge", ".pkl"), recognises=recognise.is_megengine, is_nested=True, is_pickle=True
    ),
    Format(name="mindspore", suffixes=(".ckpt", ".mindir"), recognises=recognise.is_mindspore),
    Format(name="onnx", suffixes=(".onnx",), recognises=recognise.is_onnx, packs=True),
    Format(name="orbax", suffixes=(".orbax",), recognises=recognise.is_orbax, writes=False, folder="always"),
    Format(
        name="huggingface",
        suffixes=(),
        recognises=recognise.is_huggingface,
        is_pickle=True,
        packs=True,
        folder="always",
    ),
    Format(name="zarr", suffixes=(".zarr",), recognises=recognise.is_zarr, folder="written"),
)
"""The formats, in the order in which they are tried on a file."""

_VERSION = re.compile(r"\.v?[0-9].*")
"""What looks like a suffix in the name of a directory, as in ``llama-3.1`` and ``run.v2``."""
_OF_LIGHTNING = "pytorch-lightning_version"
"""What each checkpoint of Lightning has."""
_MODULES = {"varstore": "native", "oneflow-legacy": "oneflow_legacy", "orbax": "zarr.orbax"}
_BY_NAME = {format.name: format for format in FORMATS}


def detect(path: str | os.PathLike[str], *, allow_empty: bool = False) -> Format:
    """Return the format of a file or folder, by its content, or by its suffix if the content is not sufficient.

    With `allow_empty`, an empty file or folder has the format of its suffix.

    Raises:
        CheckpointNotFound: there is nothing at the path.
        FormatError: it is known not to be a checkpoint.
        UsageError: the format is unknown.
    """
    if not os.path.lexists(path) and _is_prefix_of_paddle(os.fspath(path)):
        return _BY_NAME["paddle"]
    probe = Probe.of(os.fspath(path))
    for format in FORMATS:
        if format.recognises(probe):
            return format
    if not (allow_empty and probe.is_empty):
        probe.refuse_stranger()
    by_suffix = _by_suffix(probe.path)
    if by_suffix is None and probe.damage is not None:
        raise probe.damage
    if by_suffix is None or (by_suffix.name == "varstore" and not probe.is_folder):
        raise UsageError(
            "the format is unknown",
            path=probe.path,
            found=f"a folder of {sorted(probe.entries)[:5]}"
            if probe.is_folder
            else f"a file that starts with {probe.head[:12]!r}",
            expected=f"one of {', '.join(_BY_NAME)}",
            hint="if it has one of these formats, name it",
        )
    return by_suffix


def _is_prefix_of_paddle(path: str) -> bool:
    from varstore.formats.paddle.program import is_prefix

    return is_prefix(path)


def named(name: str) -> Format:
    """Return the format of this name.

    Raises:
        UsageError: there is no such format.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UsageError(
            "there is no such format", found=repr(name), expected=f"one of {', '.join(_BY_NAME)}"
        ) from None


def refuse_stranger(path: str) -> None:
    """Raise FormatError if what its reader refused is known not to be a checkpoint at all."""
    if kind_of(path) == stat.S_IFREG or isinstance(path, Held):
        Probe.of(path).refuse_stranger(unknown=False)


def _by_suffix(path: str) -> Format | None:
    name = os.path.basename(path.rstrip("/")).lower()
    fitting = [
        (len(suffix), format) for format in FORMATS for suffix in format.suffixes if suffix and name.endswith(suffix)
    ]
    if fitting:
        return max(fitting, key=lambda item: item[0])[1]
    suffix = os.path.splitext(name)[1]
    is_file = suffix and not _VERSION.fullmatch(suffix) and not path.endswith("/")
    return None if is_file else _BY_NAME["varstore"]


def target_format(path: str, format: str | None, state: Any = None) -> Format:
    """Return the format in which to write to a path: the named one, or that of the suffix.

    Files of Lightning and of MindSpore have the same suffix: a `state` that Lightning made is not for MindSpore.

    Raises:
        UsageError: the format is unknown, or can only be read.
    """
    row = _by_suffix(path) if format is None else named(format)
    if format is None and path.lower().endswith(".ckpt") and isinstance(state, Mapping) and _OF_LIGHTNING in state:
        return _BY_NAME["torch"]
    if row is None and os.path.isdir(path):
        return _BY_NAME["varstore"]
    if row is None:
        known = [suffix for format in FORMATS if format.writes for suffix in format.suffixes if suffix]
        raise UsageError(
            "the format to write cannot be determined from the suffix",
            path=path,
            expected=f"one of {', '.join(known)}",
            hint="use one of these suffixes, or name the format; format='varstore' is a checkpoint directory",
        )
    if not row.writes:
        raise UsageError(f"{row.name} can be read, but not written", path=path, hint="write another format")
    return row
