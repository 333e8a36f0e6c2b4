"""Variable names and the folders that hold them (FORMAT F6).

A name is any non-empty Unicode string without NUL. It is split at ``/``, and each part becomes a folder.
No name can lead out of the checkpoint's directory, and no two names share a folder.
"""

from __future__ import annotations

import re
from typing import NewType, TypeGuard

from varstore.errors import InvalidName
from varstore.text.hints import plural

__all__ = ["MARKER", "MANIFEST", "NAME_LIMIT", "Folder", "folder_of", "is_safe_folder", "name_of"]

MANIFEST = "manifest"
MARKER = "snapshot_done"

Folder = NewType("Folder", str)
"""A path relative to the checkpoint, with ``/`` between its parts, that cannot lead out of it."""

NAME_LIMIT = 4096
"""Bytes of the longest name that a manifest may list; a name that can be saved is a path, so it is shorter."""

_PART_LIMIT = 255
_FOLDER_LIMIT = 4096 - len("/zarr.json") - 1
_PARTS_LIMIT = 256
"""The maximum depth of nested folders; Python's `shutil.rmtree` fails at about a thousand."""
_RESERVED = frozenset({"out", "meta", "zarr.json"})
_RESERVED_FIRST = _RESERVED | {MANIFEST, MARKER, "pickled_data"}
_EMPTY_PART = "%00"
_ESCAPED = re.compile(r'[%\\:*?"<>|\x00-\x1f\x7f-\x9f]|[. ]\Z')
_ESCAPE = re.compile(r"(?:%[0-9A-F]{2})+")
_UNSAFE = re.compile(r"\0|(?:\A|/)\.{0,2}(?:/|\Z)")
_ORDINARY = re.compile(r"[A-Za-z0-9_.-]{,62}[A-Za-z0-9_-]\Z")
_PLAIN = re.compile(r'[^%\\:*?"<>|\x00-\x1f\x7f-\x9f/]+\Z', re.ASCII)


def folder_of(name: str) -> Folder:
    """Return the folder of a variable, relative to its checkpoint.

    Raises:
        InvalidName: the name is not a string, is empty, contains NUL or a lone surrogate, has more than 256 parts, is
            too long for a path, or has a part whose folder would exceed the 255 bytes that file systems allow.
    """
    if not isinstance(name, str):
        raise InvalidName(
            "a variable's name must be a string",
            found=f"{name!r} ({type(name).__name__})",
            hint="save nested state that has other keys with save_state",
        )
    if type(name) is str and _ORDINARY.match(name) and name not in _RESERVED_FIRST:
        return Folder(name)
    if not name:
        raise InvalidName("a variable's name must not be empty")
    if "\0" in name:
        raise InvalidName("a variable's name must not contain NUL", variable=name)
    parts = name.split("/")
    if len(parts) > _PARTS_LIMIT:
        raise InvalidName(
            "the name has too many parts", variable=name, found=len(parts), expected=f"at most {_PARTS_LIMIT}"
        )
    folder = "/".join([_part_folder(part, name, first=i == 0) for i, part in enumerate(parts)])
    if len(folder) * 4 > _FOLDER_LIMIT and len(folder.encode()) > _FOLDER_LIMIT:
        raise InvalidName(
            "the name is too long for a path",
            variable=name,
            found=plural(len(folder.encode()), "byte"),
            expected=f"at most {_FOLDER_LIMIT:,}",
        )
    return Folder(folder)


def name_of(folder: Folder) -> str:
    """Return the name for which `folder_of` returns this folder.

    The result is meaningful only for folders that `folder_of` can return. The format takes other folders literally.
    """
    parts = ("" if part == _EMPTY_PART else _ESCAPE.sub(_unescape, part) for part in folder.split("/"))
    return "/".join(parts)


def is_safe_folder(folder: str) -> TypeGuard[Folder]:
    """Return whether a folder that was read from disk stays below the checkpoint."""
    is_plain = folder != "" and folder[0] != "." and "/" not in folder and "\0" not in folder
    return is_plain or _UNSAFE.search(folder) is None


def _part_folder(part: str, name: str, *, first: bool) -> str:
    if not part:
        return _EMPTY_PART
    if part in (_RESERVED_FIRST if first else _RESERVED):
        part = _percent(part[0]) + part[1:]
    elif not _PLAIN.match(part) or part[-1] in ". ":
        part = _ESCAPED.sub(lambda match: _percent(match[0]), part)
    if len(part) * 4 > _PART_LIMIT or not part.isascii():
        _check_part_length(part, name)
    return part


def _check_part_length(part: str, name: str) -> None:
    try:
        size = len(part.encode())
    except UnicodeEncodeError as error:
        raise InvalidName(
            "a variable's name must be valid Unicode",
            variable=name,
            found=f"a lone surrogate at character {error.start}",
        ) from None
    if size > _PART_LIMIT:
        raise InvalidName(
            "a part of the name is too long for a folder",
            variable=name,
            found=f"{plural(size, 'byte')} in {part[:24]!r}…",
            expected=f"at most {_PART_LIMIT}",
            hint="split it with '/'",
        )


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def _unescape(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("%", "")).decode()
