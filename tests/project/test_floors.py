"""A module imports only from floors below its own, and in its folder only from what is listed before it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, run_python

import varstore
from tools.house import FLOORS, ORDER

PACKAGE = ROOT / "varstore"

# Packages that a folder's modules may import, the standard library aside; the core is what pyproject requires.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_gen": {"google"},
    "version": set(),
    "text": set(),
    "layout": {"google", "ml_dtypes", "numpy", "xxhash"},
    "values": {"ml_dtypes", "numpy"},
    "storage": set(),
    "disk": {"numpy", "rich", "xxhash"},
    "model": {"numpy"},
    "training": {"ml_dtypes", "numpy"},
    "interfaces": {"ml_dtypes", "numpy", "xxhash"},
    "formats": {"ml_dtypes", "numpy"},
    "inspection": {"numpy"},
    "adapters": {"ml_dtypes", "numpy"},
    "bundles": {"numpy"},
    "live": set(),
    "loading": {"numpy"},
    "__init__": set(),
    "__main__": set(),
    "view": {"numpy"},
    "cli": {"click", "numpy", "rich"},
}
# One module, one framework: these import more than that, and an adapter what it is named for.
OWN_FRAMEWORK = {
    "adapters/onnx": {"onnxruntime"},
    "adapters/transformers": {"safetensors", "torch"},
    "cli/demo": {"sklearn"},
    "formats/mindspore/cipher": {"cryptography"},
    "formats/zarr/orbax": {"tensorstore"},
    "formats/zarr/tree": {"zarr"},
    "disk/encodings/codecs": {"crc32c", "google_crc32c", "numcodecs"},
}
IMPURE = {"asyncio", "fcntl", "multiprocessing", "os", "pathlib", "shutil", "socket", "subprocess", "threading", "time"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if "__pycache__" not in path.parts
)


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports_of(module: str) -> Iterator[tuple[str, ...]]:
    """Yield every imported dotted name as its parts: at the top, in functions, under TYPE_CHECKING, everywhere."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full"
            parts = tuple((node.module or "").split("."))
            yield from (_named(parts, alias.name) for alias in node.names)


def _named(parts: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return ``from a.b import c`` as a.b.c where c is itself a module or folder of varstore, else as a.b."""
    below = PACKAGE.joinpath(*parts[1:], name)
    is_module = parts[0] == "varstore" and (below.is_dir() or below.with_suffix(".py").exists())
    return (*parts, name) if is_module else parts


def top_of(module: str) -> str:
    """Return the folder or file of the package's top level that a module is, or is in."""
    return module.partition("/")[0]


def own_imports(module: str) -> list[str]:
    """Return every module or folder of varstore that a module imports; the face is ``__init__``."""
    places = [parts[1:] or ("__init__",) for parts in imports_of(module) if parts[0] == "varstore"]
    return ["/".join(parts) for parts in places]


def parting(module: str, other: str) -> tuple[str, str, str]:
    """Return the folder in which the ways to two modules part, and the file or folder in it that leads to each."""
    ways = (module.split("/"), other.split("/"))
    shared = next((i for i, (a, b) in enumerate(zip(*ways, strict=False)) if a != b), min(map(len, ways)))
    heads = ["".join(way[shared : shared + 1]) or "__init__" for way in ways]
    return "/".join(ways[0][:shared]), heads[0], heads[1]


def test_every_module_has_a_floor():
    assert {top_of(module) for module in MODULES} <= set(FLOORS)
    assert {top_of(module) for module in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("folder", sorted({path.rpartition("/")[0] for path in MODULES} - {"", "_gen"}))
def test_every_folder_is_listed_whole(folder):
    below = {
        module.removeprefix(f"{folder}/").partition("/")[0] for module in MODULES if module.startswith(folder + "/")
    }
    assert sorted(ORDER[folder]) == sorted(below - {"__init__"})


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for other in own_imports(module):
        folder, here, there = parting(module, other)
        if not folder:
            assert FLOORS[there] < FLOORS[here], f"{module} imports {other} from a floor that is not below it"
        elif here != "__init__":  # the face of a folder shows what the folder holds
            order = ORDER[folder]
            assert there in order, f"{module} imports the face of its own folder, {folder}"
            assert order.index(there) < order.index(here), f"{module} imports {other}, which is listed after it"


def test_writer_and_reader_never_meet():
    def reached(module: str, seen: set[str]) -> set[str]:
        for path in own_imports(module):
            if path in MODULES and path not in seen:
                seen.add(path)
                reached(path, seen)
        return seen

    saving, reading = (reached(module, set()) for module in ("disk/save/writer", "disk/read/checkpoint"))
    assert not any(module.startswith("disk/read/") for module in saving)
    assert not any(module.startswith("disk/save/") for module in reading)
    assert {"layout/manifest", "storage/directory"} <= saving & reading


@pytest.mark.parametrize("module", MODULES)
def test_other_packages_only_where_they_belong(module):
    folder = top_of(module)
    name = module.split("/")[1] if folder == "adapters" else ""  # torch_distributed is an adapter of torch
    own = OWN_FRAMEWORK.get(module, set()) | {name.partition("_")[0]}
    imported = {parts[0] for parts in imports_of(module)} - sys.stdlib_module_names - {"varstore"}
    assert imported <= ALLOWED[folder] | own


@pytest.mark.parametrize("module", [module for module in MODULES if top_of(module) in ("layout", "text")])
def test_layout_is_pure(module):
    assert not {parts[0] for parts in imports_of(module)} & IMPURE


def test_only_meta_and_manifest_read_the_generated_code():
    readers = {module for module in MODULES if any(top_of(other) == "_gen" for other in own_imports(module))}
    assert {module for module in readers if not module.startswith("_gen/")} == {"layout/manifest", "layout/meta"}


@pytest.mark.parametrize("module", [module for module in MODULES if top_of(module) in ("cli", "view")])
def test_the_windows_see_only_what_a_user_sees(module):
    shown_by = {"adapters", "view"} if top_of(module) == "cli" else set()
    assert {top_of(other) for other in own_imports(module)} <= {"__init__", "errors", "text", top_of(module)} | shown_by
    tree = tree_of(module)
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    faces = {alias.asname or alias.name for alias in imported if alias.name == "varstore"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in faces
    }
    assert used <= {*varstore.__all__, "open"}


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("_gen/")])
def test_a_file_states_its_law(module):
    assert Path(module).name not in FORBIDDEN_NAMES
    lines = (PACKAGE / f"{module}.py").read_text().splitlines()
    assert not lines or ast.get_docstring(tree_of(module)), f"{module} does not state its law"


def test_importing_the_face_imports_no_framework():
    loaded = set(run_python("import sys, varstore; print(*sys.modules)").stdout.split())
    assert {"varstore", "numpy", "ml_dtypes"} <= loaded
    unwanted = {"click", "google.protobuf.text_format", "rich", "zarr", "tensorstore", "safetensors", "onnx", "orbax"}
    frameworks = {
        "torch",
        "jax",
        "jaxlib",
        "flax",
        "paddle",
        "mindspore",
        "oneflow",
        "megengine",
        "tensorflow",
        "keras",
    }
    slow = {"ctypes.util", "hashlib", "inspect", "random", "secrets", "shutil", "subprocess", "tempfile", "zipfile"}
    slow -= set(run_python("import sys, numpy, ml_dtypes, xxhash; print(*sys.modules)").stdout.split())
    assert not loaded & (unwanted | frameworks | slow)
