"""Build the reference from the docstrings with pdoc, as static pages that work offline.

There is a page for the public names, for the errors, for each adapter, for each package whose docstring is a guide,
for the command line, and for each system of ``tools/documents.py``. Public names appear as in `varstore.save`, whatever
their module is. A name that a docstring cites, but that is not in the reference, is an error. Frameworks need not be
installed, because stand-ins replace them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.doc
import pdoc.render

from tools import command_line
from tools.documents import page_names as system_names, read_page

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {
    "jax",
    "lightning",
    "mindspore",
    "onnx",
    "onnxruntime",
    "paddle",
    "safetensors",
    "tensorstore",
    "torch",
    "transformers",
    "zarr",
}
NOT_IN_THE_REFERENCE = {"varstore._gen", "varstore.cli", "varstore.view"}

STYLE = """<style>
.sides {display: grid; grid-template-columns: repeat(auto-fit, minmax(24em, 1fr)); gap: 1em}
.side {min-width: 0}
</style>

"""
"""Puts the document's snippets left and varstore's right, or below where the page is narrow."""

_SEPARATOR = r"(?:\.|</span><span class=(?:\"|\\\")o(?:\"|\\\")>\.</span><span class=(?:\"|\\\")n(?:\"|\\\")>)"
_CITED = re.compile(r"(?<!\">)<code>(varstore(?:\.\w+)+)(?:\(\))?</code>")


class _StandIn(type):
    """A class that stands for any object of a framework that is not installed, and whose attributes do too."""

    def __getattr__(cls, name: str) -> _StandIn:
        return _stand_in(f"{cls.__module__}.{cls.__name__}", name)

    def __getitem__(cls, _: object) -> _StandIn:
        return cls


def _stand_in(module: str, name: str) -> _StandIn:
    if name.startswith("_"):
        raise AttributeError(name)
    return _StandIn(name, (), {"__module__": module})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stand-ins for the modules of frameworks that are not installed."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None, /
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in FRAMEWORKS:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = partial(_stand_in, module.__name__)  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="the folder for the pages; its contents are deleted")
    target: Path = parser.parse_args().target
    sys.meta_path.append(_StandIns())
    pages = {name: pdoc.doc.Module(_imported(name)) for name in page_names()}
    texts = [*map(_of_a_system, system_names()), ModuleType("varstore.command_line", command_line.page())]
    pages |= {module.__name__: pdoc.doc.Module(module) for module in texts}
    guides = pages["varstore.interfaces"]
    listed = "\n".join(f"- `varstore.coming_from_{name}`" for name in system_names())
    guides.__dict__["docstring"] = f"{guides.docstring}\n\n{listed}\n"
    for page in pages.values():
        page.__dict__["submodules"] = [
            below for name, below in pages.items() if name.rpartition(".")[0] == page.fullname
        ]
    files = render(pages)
    problems = [f"{name}: {problem}" for name, page in pages.items() for problem in faults(page, files[_file(name)])]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    shutil.rmtree(target, ignore_errors=True)
    for name, text in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    print(f"{len(pages)} pages in {target}: open {target / 'index.html'}")
    return 0


def page_names() -> list[str]:
    """Return the modules that have a page: the package, the errors, the adapters, and packages with a docstring."""
    packages = {module.name for module in pkgutil.iter_modules([str(ROOT / "varstore")], "varstore.") if module.ispkg}
    packages.add("varstore.formats.binary")
    guides = [name for name in sorted(packages - NOT_IN_THE_REFERENCE) if importlib.import_module(name).__doc__]
    adapters = [module.name for module in pkgutil.iter_modules([str(ROOT / "varstore/adapters")], "varstore.adapters.")]
    return sorted({"varstore", "varstore.errors", "varstore.adapters", *guides, *adapters})


def _of_a_system(name: str) -> ModuleType:
    """Return a module whose docstring is the guide for those who come from a system."""
    return ModuleType(f"varstore.coming_from_{name}", STYLE + read_page(name).as_markdown())


def _imported(name: str) -> ModuleType:
    """Import a module and its public names, which may be imported lazily."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
    return module


def render(pages: Mapping[str, pdoc.doc.Module]) -> dict[str, str]:
    """Return the files of the site by path."""
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"varstore {importlib.import_module('varstore').__version__}"
    )
    files = {_file(name): pdoc.render.html_module(page, pages) for name, page in pages.items()}
    files |= {"index.html": pdoc.render.html_index(pages), "search.js": pdoc.render.search_index(pages)}
    return {name: without_inner_modules(text, pages) for name, text in files.items()}


def without_inner_modules(text: str, pages: Mapping[str, pdoc.doc.Module]) -> str:
    """Return the page with classes whose module does not have a page under their bare names."""

    def bare(match: re.Match[str]) -> str:
        module = ".".join(re.split(_SEPARATOR, match["module"]))
        return match[0] if module in pages else match["name"]

    return re.sub(rf"(?P<module>\bvarstore(?:{_SEPARATOR}\w+)+){_SEPARATOR}(?P<name>\w+)", bare, text)


def faults(page: pdoc.doc.Module, text: str) -> list[str]:
    """Return a sentence for each public name that is not on its page, and for each cited name that does not exist."""
    public = {name: getattr(page.obj, name) for name in getattr(page.obj, "__all__", ()) if not name.startswith("__")}
    shown = [name for name, value in public.items() if not isinstance(value, ModuleType)]
    missing = [f"`{name}` is not on the page" for name in shown if f'id="{name}"' not in text]
    return missing + [f"`{name}` is cited and not in the reference" for name in sorted(set(_CITED.findall(text)))]


def _file(name: str) -> str:
    return f"{name.replace('.', '/')}.html"


if __name__ == "__main__":
    raise SystemExit(main())
