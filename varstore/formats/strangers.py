"""Name what is not a checkpoint, or is one that cannot be opened, so that the error says what to do with it.

Nothing is parsed here: a few bytes at the start or the end of a file, or the names in a folder, tell what it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import NoReturn

from varstore.errors import FormatError
from varstore.layout.pointers import FETCH, is_pointer, size_behind
from varstore.text.hints import listed, plural

__all__ = ["is_training_state", "refuse_strange_file", "refuse_strange_folder"]

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_HDF5 = "convert it in Python: read its arrays with h5py, and give them to varstore.write"
_TENSORFLOW = "convert it in Python: load it with TensorFlow, and give the values of its variables to varstore.write"
_SHOWN = 5

Row = tuple[Callable[[bytes, bytes, str], bool], str, str | None]

_FILES: tuple[Row, ...] = (
    (
        lambda head, _, __: head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")),
        "this is an HTML page, not a checkpoint: what a download leaves that failed, or that asks to log in",
        "download the file again, and look at the page for the reason",
    ),
    (
        lambda head, _, __: head.startswith(b"GGUF"),
        "this is a GGUF file of llama.cpp, which varstore does not read",
        "convert the model that it was made of, or read it with the package gguf",
    ),
    (lambda head, _, __: head.startswith(b"\x89HDF\r\n\x1a\n"), "this is an HDF5 file, such as Keras writes", _HDF5),
    (
        lambda head, _, __: head[4:8] == b"TFL3",
        "this is a model of TensorFlow Lite, which varstore does not read",
        _TENSORFLOW,
    ),
    (
        lambda _, tail, name: tail.endswith(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb") or ".data-0" in name,
        "this is a part of a checkpoint of TensorFlow, which varstore does not read",
        _TENSORFLOW,
    ),
    (lambda _, __, name: name == "saved_model.pb", "this is the graph of a SavedModel of TensorFlow", _TENSORFLOW),
)
"""What tells a file: its first bytes, its last ones and its name."""


def refuse_strange_file(
    path: str, head: bytes, tail: bytes, size: int, members: Collection[str] = (), *, unknown: bool = True
) -> None:
    """Raise FormatError if a file is one that is known not to be a checkpoint.

    Args:
        path: the file, for the error and for the suffix.
        head: its first bytes.
        tail: its last bytes.
        size: how long it is.
        members: the names in it, if it is a zip archive.
        unknown: whether no format recognised it, so that text and an unknown archive are refused as well.
    """
    name = os.path.basename(path).lower()
    if not size:
        raise FormatError("the file is empty", path=path, hint="copy or download it again")
    if is_pointer(head):
        raise FormatError(
            "this is a pointer of Git LFS, not the file itself",
            path=path,
            found=plural(size, "byte"),
            expected=size_behind(head),
            hint=FETCH,
        )
    for is_such, what, hint in _FILES:
        if is_such(head, tail, name):
            raise FormatError(what, path=path, hint=hint)
    for magic, (packer, unpacker) in _PACKED.items():
        if head.startswith(magic):
            raise FormatError(
                f"the file is compressed with {packer}", path=path, hint=f"unpack it first, with {unpacker} or tar"
            )
    if "model.weights.h5" in members:
        raise FormatError("this is a model of Keras, an archive with an HDF5 file in it", path=path, hint=_HDF5)
    if unknown and head.lstrip()[:1] in (b"{", b"[") and head.lstrip()[:200].isascii() and b"\0" not in head:
        raise FormatError(
            "this is JSON text, not a checkpoint: a configuration, or what a download leaves that failed",
            path=path,
            found=repr(head[:100].decode("ascii", "replace")),
        )
    if unknown and members:
        names = listed(sorted(members)[:_SHOWN], _SHOWN)
        raise FormatError("this zip archive is not a checkpoint of a format that is known", path=path, found=names)


def refuse_strange_folder(path: str, names: Collection[str]) -> None:
    """Raise FormatError if a folder with these names in it is known not to be one checkpoint."""
    if not names:
        raise FormatError("the folder is empty", path=path)
    if is_training_state(names):
        _refuse_training_state(path, names)
    if "saved_model.pb" in names:
        raise FormatError(
            "this is a SavedModel of TensorFlow, which varstore does not read", path=path, hint=_TENSORFLOW
        )
    if any(".data-00000-of-" in name for name in names):
        raise FormatError(
            "these are checkpoints of TensorFlow, which varstore does not read", path=path, hint=_TENSORFLOW
        )


def is_training_state(names: Collection[str]) -> bool:
    """Tell whether a folder holds the state of a whole run in several files, of accelerate or DeepSpeed."""
    return _is_of_accelerate(names) or _is_of_deepspeed(names)


def _is_of_accelerate(names: Collection[str]) -> bool:
    return any(name.startswith("random_states_") and name.endswith(".pkl") for name in names)


def _is_of_deepspeed(names: Collection[str]) -> bool:
    return "zero_to_fp32.py" in names or any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names)


def _refuse_training_state(path: str, names: Collection[str]) -> NoReturn:
    is_deepspeed = _is_of_deepspeed(names)
    files = [name for name in sorted(names) if name.endswith((".safetensors", ".bin", ".pt", ".index.json"))]
    folders = [name for name in sorted(names) if os.path.isdir(os.path.join(path, name))] if is_deepspeed else []
    hint = f"open one of its parts, such as {os.path.join(path, (files + folders)[0])!r}" if files or folders else ""
    if is_deepspeed:
        hint += f"{'; ' if hint else ''}zero_to_fp32.py in the folder of the run joins the parts of all processes"
    raise FormatError(
        f"this is the state of a run that {'DeepSpeed' if is_deepspeed else 'accelerate'} saved, in several files",
        path=path,
        found=listed(files + folders, _SHOWN) if files or folders else None,
        hint=hint or None,
    )
