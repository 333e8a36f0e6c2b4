"""The layers of the package: the floor of each folder, and the order of the files in each folder.

A module imports only from lower floors and, within its folder, only from files that are listed before it.
``tests/project/test_floors.py`` checks the code against these tables.
"""

from __future__ import annotations

__all__ = ["FLOORS", "ORDER"]

FLOORS: dict[str, int] = {
    "_gen": 0,
    "version": 0,
    "text": 0,
    "errors": 1,
    "layout": 2,
    "values": 3,
    "storage": 3,
    "disk": 4,
    "model": 5,
    "training": 6,
    "interfaces": 7,
    "formats": 7,
    "inspection": 8,
    "live": 8,
    "loading": 8,
    "adapters": 9,
    "__init__": 10,
    "cli": 11,
    "view": 11,
    "__main__": 12,
}
"""Folders and files of the package's top level; those of one floor do not import each other."""

ORDER: dict[str, tuple[str, ...]] = {
    "text": ("escape", "hints", "table"),
    "layout": (
        "collector",
        "names",
        "pointers",
        "staged",
        "dtypes",
        "meta",
        "encodings",
        "keys",
        "location",
        "manifest",
        "readable",
        "difference",
    ),
    "values": ("nodes", "opaque", "arguments", "select", "methods", "parts", "lazy", "arrays", "casting", "plan"),
    "storage": (
        "syscalls",
        "forks",
        "memory",
        "failures",
        "looking",
        "containment",
        "directory",
        "claims",
        "removing",
        "appearing",
    ),
    "disk": ("progress", "threads", "blocks", "encodings", "save", "read", "seal", "relink"),
    "disk/encodings": ("raw", "table"),
    "disk/save": (
        *("space", "durability", "leftovers", "foreign", "staging"),
        *("folders", "large_file", "small_files", "links", "incremental", "writer"),
    ),
    "disk/read": (
        "checks",
        "digests",
        "batches",
        "whole",
        "parts",
        "variable",
        "scan",
        "content",
        "advice",
        "checkpoint",
    ),
    "model": ("options", "match", "report", "refusal", "store", "moves", "ties", "into"),
    "training": ("tensors", "tree", "chosen", "state", "background", "policies", "series", "retention", "manager"),
    "interfaces": ("oneflow", "mindspore"),
    "interfaces/oneflow": ("config", "dtypes", "initializers", "session", "checkpoint"),
    "formats": (
        *("binary", "opened", "state", "pickles"),
        *(
            "safetensors",
            "torch",
            "numpy",
            "oneflow",
            "paddle",
            "megengine",
            "mindspore",
            "onnx",
            "zarr",
            "native",
            "oneflow_legacy",
            "huggingface",
            "strangers",
        ),
        *("detect", "registry", "verbs"),
    ),
    "formats/binary": (
        *("magic", "source", "budget", "metadata", "folder"),
        *("packing", "slices", "wire", "zip", "zipped", "patched"),
    ),
    "formats/pickles": ("code", "names", "tape", "machine", "arrays", "tree", "emit"),
    "formats/state": ("flat", "nested"),
    "formats/torch": ("tensors", "names", "legacy", "script", "zip", "export", "rewrite", "distributed", "write"),
    "formats/paddle": ("program", "rewrite", "states"),
    "formats/mindspore": ("cipher", "program", "messages"),
    "formats/onnx": ("tensors", "model"),
    "formats/zarr": ("codecs", "arrays", "tree", "orbax"),
    "inspection": ("storage", "verify", "diff"),
    "adapters": ("torch", "jax", "lightning", "transformers", "mindspore", "paddle"),
    "adapters/torch": ("survey", "modules", "optimizers"),
    "cli": ("output", "statistics", "listing", "show", "check", "repair", "convert", "demo"),
}
"""Every file and folder of each folder, `__init__` aside; each imports only from those before it."""
