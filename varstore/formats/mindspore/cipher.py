"""Decrypt MindSpore's encrypted checkpoints: blocks of AES-GCM, AES-CBC or SM4-CBC.

A block consists of ``uint32 magic``, for GCM a 16-byte tag, then ``uint32 total, uint32 ivlen, iv, uint32 clen`` and
the cipher text. GCM uses the first 12 bytes of its 16-byte iv. The plain text is kept in memory and never written to
disk.

Source: https://github.com/mindspore-ai/mindspore/blob/master/mindspore/core/utils/crypto.cc
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from varstore.errors import DigestMismatch, FormatError, MissingDependency, UsageError
from varstore.formats.binary.slices import MemoryContent
from varstore.formats.binary.source import Source
from varstore.text.hints import plural

__all__ = ["decrypted", "is_encrypted"]

_GCM, _CBC, _SM4 = 0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA
_MODES = {_GCM: ("AES-GCM", (16, 24, 32)), _CBC: ("AES-CBC", (16, 24, 32)), _SM4: ("SM4-CBC", (16,))}
_TAG, _IV, _GCM_IV = 16, 16, 12


def is_encrypted(source: Source) -> bool:
    """Return whether a file starts like an encrypted checkpoint."""
    return source.size >= 4 and int.from_bytes(source.bytes(0, 4), "little") in _MODES


def decrypted(source: Source, key: bytes | None) -> MemoryContent:
    """Return the plain text of a whole file.

    Raises:
        UsageError: there is no key, or the cipher does not accept its length.
        DigestMismatch: the key is not the one that the file was written with, or the file is damaged.
        FormatError: a block is damaged.
        MissingDependency: the package `cryptography` is not installed.
    """
    magic = int.from_bytes(source.bytes(0, 4), "little")
    mode, lengths = _MODES[magic]
    if key is None:
        raise UsageError(f"the file is encrypted ({mode})", path=source.path, hint="pass its key: read(path, key=…)")
    if not isinstance(key, bytes) or len(key) not in lengths:
        raise UsageError(
            f"not a key for {mode}",
            path=source.path,
            found=plural(len(key), "byte") if isinstance(key, bytes) else type(key).__name__,
            expected=f"{' or '.join(map(str, lengths))} bytes",
        )
    decrypt = _decrypter(source.path, magic, key)
    plain, position = bytearray(), 0
    while position < source.size:
        block_magic = _number(source, position)
        tag = b""
        position += 4
        if block_magic != magic:
            raise _damaged(source, position, f"the number {block_magic:#x}", f"{magic:#x}")
        if magic == _GCM:
            tag, position = _bytes(source, position, _TAG), position + _TAG
        total, iv_size = _number(source, position), _number(source, position + 4)
        size = total - 8 - iv_size
        if iv_size != _IV or size < 0 or _number(source, position + 8 + iv_size) != size:
            raise _damaged(
                source,
                position,
                f"lengths {total} and {iv_size}",
                f"an iv of {_IV} bytes and a matching length of the text",
            )
        iv = _bytes(source, position + 8, _IV)
        plain += decrypt(iv, tag, _bytes(source, position + 12 + _IV, size))
        position += 12 + _IV + size
    return MemoryContent(source.path, memoryview(plain))


def _decrypter(path: str, magic: int, key: bytes) -> Callable[[bytes, bytes, bytes], bytes]:
    try:
        from cryptography.exceptions import InvalidTag  # type: ignore[import-not-found, unused-ignore]
        from cryptography.hazmat.primitives.ciphers import (  # type: ignore[import-not-found, unused-ignore]
            Cipher,
            algorithms,
            modes,
        )
        from cryptography.hazmat.primitives.padding import PKCS7  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingDependency(
            "reading an encrypted checkpoint needs the package cryptography",
            path=path,
            hint="install it: pip install cryptography",
        ) from error
    algorithm: Any = algorithms.SM4(key) if magic == _SM4 else algorithms.AES(key)

    def decrypt(iv: bytes, tag: bytes, text: bytes) -> bytes:
        mode = modes.GCM(iv[:_GCM_IV], tag) if magic == _GCM else modes.CBC(iv)
        decryptor = Cipher(algorithm, mode).decryptor()
        try:
            plain: bytes = decryptor.update(text) + decryptor.finalize()
            if magic != _GCM:
                padding = PKCS7(128).unpadder()
                plain = padding.update(plain) + padding.finalize()
        except (InvalidTag, ValueError) as error:
            raise DigestMismatch(
                "the file cannot be decrypted with this key", path=path, hint="the key is wrong, or the file is damaged"
            ) from error
        return plain

    return decrypt


def _bytes(source: Source, offset: int, size: int) -> bytes:
    if offset + size > source.size:
        raise _damaged(source, offset, f"{size} bytes claimed", f"at most {source.size - offset}")
    return source.bytes(offset, size)


def _number(source: Source, offset: int) -> int:
    return int.from_bytes(_bytes(source, offset, 4), "little")


def _damaged(source: Source, position: int, found: str, expected: str) -> FormatError:
    return FormatError(
        "an encrypted block is damaged",
        path=source.path,
        field=f"byte {position}",
        found=found,
        expected=expected,
        hint="the file is truncated or was changed",
    )
