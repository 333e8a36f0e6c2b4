"""Folders as Hugging Face's libraries write them: weights in files of safetensors or PyTorch, beside a ``config.json``.

A folder is one of these:

- a model of `save_pretrained` (transformers, diffusers, peft): one file, or an index with several;
- a pipeline of diffusers, with ``model_index.json``: the names of each model begin with the name of its folder;
- the repository of a model in the Hub's cache, ``models--OWNER--NAME``: the snapshot of ``main``, or the only one.

The files of a snapshot are links; which links are followed says `varstore.storage.containment`.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from varstore.errors import FormatError, UsageError
from varstore.formats import safetensors, torch
from varstore.formats.binary.budget import Budget
from varstore.formats.binary.source import Source
from varstore.formats.opened import ForeignCheckpoint
from varstore.formats.pickles.machine import Unknown
from varstore.storage.appearing import new_folder
from varstore.storage.containment import inside
from varstore.storage.failures import translated
from varstore.storage.looking import kind_of
from varstore.text.hints import listed

__all__ = ["holds_weights", "read", "write"]

_INDEX = ".index.json"
_WEIGHTS = tuple(
    f"{stem}{end}"
    for stem, ends in (
        ("model.safetensors", ("", _INDEX)),
        ("diffusion_pytorch_model.safetensors", ("", _INDEX)),
        ("adapter_model.safetensors", ("",)),
        ("pytorch_model.bin", ("", _INDEX)),
        ("diffusion_pytorch_model.bin", ("", _INDEX)),
        ("adapter_model.bin", ("",)),
    )
    for end in ends
)
"""The files of weights in the order in which they are preferred, which is that of transformers."""
_PIPELINE = "model_index.json"
_MODEL = ("model.safetensors", "config.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_OF_ADAPTERS = "peft_type"
"""What each configuration of an adapter has."""
_WRITTEN = re.compile(
    r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json|config\.json"
    r"|adapter_model\.safetensors|adapter_config\.json"
)
_LONGEST_REVISION = 100
_SHOWN = 5


def holds_weights(names: Iterable[str]) -> bool:
    """Tell whether a folder with these names in it is one that `read` opens, or explains."""
    names = {*names}
    return {"blobs", "snapshots"} <= names or _PIPELINE in names or bool(_candidates(names))


def read(
    path: str, *, limit: int | None = None, encoding: str = "utf-8", unknown: Unknown = "opaque"
) -> ForeignCheckpoint:
    """Open a folder; if it has weights in several formats, those of safetensors.

    `encoding` is that of strings of Python 2 in files of PyTorch, and `unknown` says what becomes of names in them that
    varstore does not know: see `varstore.read`.

    Raises:
        FormatError: there are no weights in it, or several files of them without an index; see `safetensors.read` and
            `torch.read`.
        UnsafeContent: a link or an index leads out of the folder; see `safetensors.read` and `torch.read`.
    """
    budget = Budget(path, 0, limit=limit)
    open_torch = partial(torch.opened, folder=budget, encoding=encoding, unknown=unknown)
    folder = _snapshot(path)
    names = _names_in(folder)
    if _PIPELINE not in names:
        return _model(folder, names, budget, open_torch, shown=path)
    parts = {}
    for name in sorted(names):
        if (place := _real_folder(folder, name)) and _candidates(inner := _names_in(place)):
            parts[name] = _model(place, inner, budget, open_torch, shown=place)
    if not parts:
        raise FormatError("no folder of this pipeline holds weights", path=path, found=listed(sorted(names), _SHOWN))
    tree = {name: part.tree for name, part in parts.items()}
    whole = Budget(path, budget.size, limit=limit)
    return ForeignCheckpoint(path, "huggingface", tree, budget=whole, unknown=_all_unknown(parts))


def write(
    path: str,
    state: Any,
    *,
    config: Any = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a folder for `from_pretrained`: ``model.safetensors``, or an index with several files, and ``config.json``.

    With the configuration of an adapter of PEFT, they are ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        path: where to write; it must not exist, unless it is such a folder that is to be replaced.
        state: names and arrays, as in a state dict; see `safetensors.write`.
        config: the content of ``config.json``: a mapping, or a configuration that has ``to_dict()``. Without it,
            `from_pretrained` needs the configuration as an argument.
        metadata, shard_bytes: see `safetensors.write`; one file is written if the tensors fit into it.
        overwrite: replace a folder at `path` in one step, if there is nothing in it but what this function writes.

    Raises:
        CheckpointExists: the path exists, and may not be replaced.
        UsageError: `config` is not JSON data.
        UnsupportedDtype, UsageError, InvalidName, StorageError: see `safetensors.write`.
    """
    given = None if config is None else _given(config)
    is_adapter = given is not None and _OF_ADAPTERS in given
    weights, described = _ADAPTER if is_adapter else _MODEL
    text = None if given is None else _text_of(given)
    with new_folder(path, may_replace=_is_written if overwrite else None) as staging:
        safetensors.write(
            os.path.join(staging, weights), state, metadata=metadata, shard_bytes=shard_bytes, shards=not is_adapter
        )
        if text is not None:
            with open(os.path.join(staging, described), "wb") as file:
                file.write(text)


def _model(
    folder: str, names: set[str], budget: Budget, open_torch: Callable[[Source], ForeignCheckpoint], *, shown: str
) -> ForeignCheckpoint:
    chosen = _candidates(names)
    if len(chosen) != 1:
        raise FormatError(
            "several files hold weights, and no index says which belong together"
            if chosen
            else "there are no weights in this folder that can be opened",
            path=shown,
            found=listed(chosen or sorted(names), _SHOWN) or None,
            hint=f"open one of them, such as {os.path.join(folder, chosen[0])!r}" if chosen else None,
        )
    name = chosen[0]
    source = Source(inside(folder, name), shown=os.path.join(folder, name))
    if not name.endswith(f".bin{_INDEX}"):
        if name.endswith(".bin"):
            opened = open_torch(source)
        else:
            opened = safetensors.opened(source, folder=budget)
        opened.path, opened.format = shown, "huggingface"
        return opened
    budget.include(source)
    parts: dict[str, ForeignCheckpoint] = {}

    def open_part(file: Source) -> tuple[ForeignCheckpoint, dict[str, Any]]:
        opened = parts[file.path] = open_torch(file)
        return opened, {}

    arrays, metadata = safetensors.read_index(source, open_part)
    whole = Budget(shown, budget.size, limit=budget.limit)
    return ForeignCheckpoint(shown, "huggingface", arrays, metadata, budget=whole, unknown=_all_unknown(parts))


def _all_unknown(parts: Mapping[str, ForeignCheckpoint]) -> tuple[tuple[str, str, int], ...]:
    return tuple(row for part in parts.values() for row in part.unknown)


def _candidates(names: set[str]) -> list[str]:
    """Return the file of weights in a folder with these names; several if it cannot be told which one is meant."""
    for name in _WEIGHTS:
        if name in names:
            return [name]
    indices = sorted(name for name in names if name.endswith(safetensors.INDEX_SUFFIX))
    return indices or sorted(name for name in names if name.endswith(".safetensors"))


def _snapshot(path: str) -> str:
    """Return the folder of the files: the path, or in the repository of a cache its snapshot."""
    snapshots = _real_folder(path, "snapshots")
    if not snapshots or not _real_folder(path, "blobs"):
        return path
    revisions = _names_in(snapshots)
    main = os.path.join(path, "refs", "main")
    if kind_of(main) == stat.S_IFREG and os.path.getsize(main) < _LONGEST_REVISION:
        source = Source(inside(path, "refs", "main"))
        revisions &= {source.bytes(0, source.size).decode("ascii", "replace").strip()}
    if len(revisions) != 1 or not (place := _real_folder(snapshots, revisions.pop())):
        raise FormatError(
            "it cannot be told which snapshot of this repository is meant",
            path=path,
            found=listed(sorted(_names_in(snapshots)), _SHOWN) or None,
            hint="open one of the folders in 'snapshots'",
        )
    return place


def _real_folder(folder: str, name: str) -> str:
    """Return the path of a folder in a folder, empty if it is something else or a link."""
    place = os.path.join(folder, name)
    return place if kind_of(place) == stat.S_IFDIR and not os.path.islink(place) else ""


def _names_in(folder: str) -> set[str]:
    with translated(folder, "reading failed"):
        return {*os.listdir(folder)}


def _given(config: Any) -> dict[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    given = to_dict() if callable(to_dict) else config
    if not isinstance(given, Mapping):
        raise _not_a_config(f"it is of the type {type(given).__name__}")
    return dict(given)


def _text_of(config: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False, default=_as_list)
        return text.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise _not_a_config(str(error)) from None


def _as_list(value: Any) -> list[Any]:
    """Return a set as PEFT writes it."""
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _not_a_config(found: str) -> UsageError:
    return UsageError(
        "must be the content of config.json",
        field="config",
        found=found,
        expected="a mapping of JSON data, or a configuration that has to_dict()",
    )


def _is_written(path: str) -> bool:
    return os.path.isdir(path) and all(map(_WRITTEN.fullmatch, os.listdir(path)))
