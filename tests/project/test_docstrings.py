"""Every example in a public docstring runs and prints what it shows, each docstring's in an empty directory."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import io
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import varstore as vs

ADAPTERS = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("varstore.adapters").__path__))
FINDER = doctest.DocTestFinder(exclude_empty=True)


def documented(name: str) -> Any:
    """Return what carries the docstring of a public name; None for a constant of another package's type."""
    value = getattr(vs, name)
    if isinstance(value, ModuleType) or inspect.isclass(value) or inspect.isroutine(value):
        return value
    return type(value) if type(value).__module__.startswith("varstore") else None


def examples(value: Any, name: str) -> list[doctest.DocTest]:
    """Return the examples of a docstring and of those within its class or module."""
    return [test for test in FINDER.find(value, name, globs={"np": np, "vs": vs}) if test.examples]


def of_the_face() -> Iterator[doctest.DocTest]:
    for name in (*vs.__all__, "open"):
        yield from examples(documented(name), name)


FOUND = pkgutil.walk_packages(vs.__path__, "varstore.", onerror=lambda _: None)  # adapters need their frameworks
PACKAGES = ["varstore"] + [
    module.name for module in FOUND if module.ispkg and not module.name.startswith("varstore.adapters.")
]


def of_the_guides() -> Iterator[doctest.DocTest]:
    for name in PACKAGES:
        text = importlib.import_module(name).__doc__ or ""
        yield doctest.DocTestParser().get_doctest(text, {"np": np, "vs": vs}, name, None, None)


def run(test: doctest.DocTest) -> None:
    printed = io.StringIO()
    with vs.Session():
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=printed.write)
    assert result.failed == 0, printed.getvalue()


def can_run(test: doctest.DocTest) -> bool:
    """Return whether the packages that an adapter's example imports are there: a few need more than its framework."""
    imported = [example.source.split()[1] for example in test.examples if example.source.startswith("import ")]
    return all(importlib.util.find_spec(name.partition(".")[0]) for name in imported)


PUBLIC = [test for test in (*of_the_face(), *of_the_guides()) if test.examples]
NEEDED = {"pack": "numcodecs", "unpack": "numcodecs"}
"""What an example needs that is not a dependency."""


@pytest.mark.parametrize("test", PUBLIC, ids=[test.name for test in PUBLIC])
def test_an_example_prints_what_it_shows(test, tmp_path, monkeypatch):
    if test.name in NEEDED:
        pytest.importorskip(NEEDED[test.name])
    monkeypatch.chdir(tmp_path)
    run(test)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_examples_of_an_adapter_print_what_they_show(adapter, tmp_path, monkeypatch):
    module = pytest.importorskip(f"varstore.adapters.{adapter}", reason="its framework is not installed")
    found = [test for name in module.__all__ for test in examples(getattr(module, name), name)]
    assert found
    for test in filter(can_run, found):
        (tmp_path / test.name).mkdir()
        monkeypatch.chdir(tmp_path / test.name)
        run(test)


def test_every_public_name_has_an_example():
    assert not {name for name in (*vs.__all__, "open") if documented(name) and not examples(documented(name), name)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">>> print(1)\n2\n", r"Expected:\s+2\s+Got:\s+1"),
        (">>> vs.nothing\n", "AttributeError"),
        (">>> open('file', 'w').close()\n>>> vs.load('file').keys()\n", "CheckpointNotFound"),
    ],
)
def test_an_example_that_is_wrong_fails(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(text, {"vs": vs}, "wrong", None, None)
    with pytest.raises(AssertionError, match=message):
        run(test)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_guide_names_is_there(package):
    named = re.findall(r"`(varstore(?:\.\w+)+)(?:\(\))?`", importlib.import_module(package).__doc__ or "")
    for name in named:
        if not name.startswith("varstore.adapters."):  # these need their frameworks
            pkgutil.resolve_name(name)
