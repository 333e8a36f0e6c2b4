"""The house of DESIGN: a module imports only from floors below, and in its folder only from files listed above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, run_python

import varstore

PACKAGE = ROOT / "varstore"

FLOORS = {
    "errors": 0,
    "_gen": 0,
    "spec": 1,
    "disk": 2,
    "model": 3,
    "training": 4,
    "formats": 5,
    "adapters": 5,
    "__init__": 6,
    "cli": 7,
    "view": 7,
    "__main__": 8,
}

# Every file of these folders, each importing only from those before it. To add a file, add it here.
ORDER = {
    "spec": (
        *("version", "collector", "names", "dtypes", "dtype_names", "html", "select"),
        *("meta", "manifest", "arrays", "plan"),
    ),
    "disk": (
        *(
            "syscalls",
            "failures",
            "workers",
            "progress",
            "ring",
            "beneath",
            "blocks",
            "staging",
            "outfile",
            "links",
            "space",
        ),
        *("unchanged", "writer", "agree", "small", "values", "rows", "variable", "walk", "reader", "check"),
    ),
    "training": (
        *("tensors", "tree", "state", "background"),
        *("policies", "series", "manager", "model_checkpoint"),
    ),
    "adapters": ("torch", "jax", "lightning", "transformers"),
    "model": ("match", "report", "initializers", "store", "into", "session", "flow_checkpoint"),
}

# Packages that a folder's modules may import, the standard library aside; the core is what pyproject requires.
ALLOWED = {
    "errors": set(),
    "_gen": {"google"},
    "spec": {"google", "ml_dtypes", "numpy", "xxhash"},
    "disk": {"numpy", "rich", "xxhash"},
    "model": {"ml_dtypes", "numpy", "xxhash"},
    "training": {"ml_dtypes", "numpy"},
    "formats": {"ml_dtypes", "numpy"},
    "adapters": {"ml_dtypes", "numpy"},
    "__init__": set(),
    "__main__": set(),
    "cli": {"click", "numpy", "rich"},
    "view": {"numpy", "rich"},
}
# One module, one framework: these import more than that, and an adapter what it is named for.
OWN_FRAMEWORK = {
    "adapters/transformers": {"safetensors", "torch"},
    "cli/demo": {"sklearn"},
    "formats/cipher": {"cryptography"},
    "formats/orbax": {"tensorstore"},
    "formats/zarr": {"zarr"},
    "formats/zarr_store": {"zarr"},
}
IMPURE = {"asyncio", "fcntl", "multiprocessing", "os", "pathlib", "shutil", "socket", "subprocess", "threading", "time"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
LINES = 400

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


def place_of(module: str) -> tuple[str, str]:
    """Return folder and file of a module; a file of the top level is its own folder."""
    folder, _, file = module.partition("/")
    return folder, file


def own_imports(module: str) -> list[tuple[str, str]]:
    """Return (folder, file) of everything that a module imports from varstore; the face is ``("__init__", "")``."""
    places = [parts[1:] or ("__init__",) for parts in imports_of(module) if parts[0] == "varstore"]
    return [(parts[0], "/".join(parts[1:])) for parts in places]


def test_every_module_has_a_floor():
    assert {place_of(module)[0] for module in MODULES} <= set(FLOORS)
    assert {place_of(module)[0] for module in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    folder, _ = place_of(module)
    for other, file in own_imports(module):
        if other != folder:
            assert FLOORS[other] < FLOORS[folder], f"{module} imports {other}/{file} from a floor that is not below it"


@pytest.mark.parametrize("folder", ORDER)
def test_a_listed_folder_is_listed_whole(folder):
    files = {place_of(module)[1] for module in MODULES if module.startswith(f"{folder}/")} - {"__init__"}
    assert files == set(ORDER[folder])
    assert len(ORDER[folder]) == len(files)


@pytest.mark.parametrize("module", [module for module in MODULES if place_of(module)[0] in ORDER])
def test_imports_go_up_the_list_of_their_folder(module):
    folder, file = place_of(module)
    order = ("__init__", *ORDER[folder])
    for other, other_file in own_imports(module):
        if other == folder and other_file:
            assert order.index(other_file) < order.index(file), f"{module} imports {other_file}, listed below it"


def test_writer_and_reader_never_meet():
    def reached(module: str, seen: set[str]) -> set[str]:
        for folder, file in own_imports(module):
            path = f"{folder}/{file}" if file else folder
            if path in MODULES and path not in seen:
                seen.add(path)
                reached(path, seen)
        return seen

    assert "disk/reader" not in reached("disk/writer", set())
    assert "disk/writer" not in reached("disk/reader", set())
    assert {"spec/manifest", "disk/beneath"} <= reached("disk/writer", set()) & reached("disk/reader", set())


@pytest.mark.parametrize("module", MODULES)
def test_other_packages_only_where_they_belong(module):
    folder, file = place_of(module)
    own = OWN_FRAMEWORK.get(module, set()) | ({file} if folder == "adapters" else set())
    imported = {parts[0] for parts in imports_of(module)} - sys.stdlib_module_names - {"varstore"}
    assert imported <= ALLOWED[folder] | own


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("spec/")])
def test_spec_is_pure(module):
    assert not {parts[0] for parts in imports_of(module)} & IMPURE


def test_only_meta_and_manifest_read_the_generated_code():
    readers = {module for module in MODULES if any(folder == "_gen" for folder, _ in own_imports(module))}
    assert {module for module in readers if not module.startswith("_gen/")} == {"spec/manifest", "spec/meta"}


@pytest.mark.parametrize("module", [module for module in MODULES if place_of(module)[0] in ("cli", "view")])
def test_the_windows_see_only_what_a_user_sees(module):
    folder, _ = place_of(module)
    assert {other for other, _ in own_imports(module)} <= {"__init__", "errors", folder}
    tree = tree_of(module)
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    faces = {alias.asname or alias.name for alias in imported if alias.name == "varstore"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in faces
    }
    assert used <= set(varstore.__all__)


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("_gen/")])
def test_a_file_is_one_idea(module):
    assert Path(module).name not in FORBIDDEN_NAMES
    lines = (PACKAGE / f"{module}.py").read_text().splitlines()
    assert len(lines) <= LINES, f"{module} has {len(lines)} lines: it is two ideas"
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
    assert not loaded & (unwanted | frameworks)
