"""What the arguments of public functions are taken for, and how a wrong one is described."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from support import run_python

import varstore as vs
from varstore.errors import UsageError
from varstore.values.arguments import checked, checked_path


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (b"x", "path: a path must be text: found b'x'. Use os.fsdecode(path)"),
        (None, "path: a wrong value: found None (NoneType), expected a string or a pathlib.Path"),
        (3, "path: a wrong value: found 3 (int), expected a string or a pathlib.Path"),
        ("", "path: the path is empty"),
        ("a\0b", r"path: a path cannot contain NUL: found 'a\x00b'"),
        ("\ud800", r"path: a path must be valid Unicode: found a lone surrogate at character 0 of '\ud800'"),
        (
            "s3://bucket/x",
            "path: a URL is not a path: varstore reads and writes directories of this machine: found s3://bucket/x. "
            "Mount the store as a directory, or copy the files",
        ),
        (
            "file:///x",
            "path: a URL is not a path: varstore reads and writes directories of this machine: found file:///x. "
            "Leave the scheme out",
        ),
    ],
)
def test_what_is_not_a_path_is_described(path, says):
    for call in (vs.open, vs.load, vs.verify, vs.read, lambda path: vs.save(path, {})):
        with pytest.raises(UsageError) as caught:
            call(path)
        assert str(caught.value) == says


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_any_other_text_is_a_path(text):
    if "://" not in text and not text.startswith("~"):
        assert checked_path(text, "path") == text


def test_a_path_that_is_not_unicode_is_kept():
    path = os.fsdecode(b"\xff")
    assert checked_path(path, "path") == path


def test_the_home_directory_has_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    vs.save("~/a", {"w": np.zeros(1)})
    assert vs.save_async(Path("~/b"), vs.open(Path("~/a"))).result().path == str(tmp_path / "b")
    assert vs.load("~/b").keys() == vs.read("~/a").keys() == {"w"}
    assert vs.convert("~/b", "~/b.npz").names == ("w",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "b.npz"]


def test_a_flag_and_a_count_may_be_numpy_s(tmp_path):
    vs.save(tmp_path / "a", {"w": np.zeros(1)}, durable=np.bool_(0), threads=np.int64(2))


def test_a_checked_function_keeps_its_name_signature_and_defaults():
    @checked
    def function(path: str, *, flag: bool = False, value: int | None = None) -> tuple[str, bool, int | None]:
        """Return what was given."""
        return path, flag, value

    assert (function.__name__, function.__doc__) == ("function", "Return what was given.")
    assert str(inspect.signature(function)).startswith("(path: 'str', *, flag: 'bool' = False")
    assert function("x", flag=np.True_, value=np.uint8(3)) == ("x", True, 3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        function("x", flags=True)
    with pytest.raises(UsageError, match=r"^value: a wrong value: found 1\.5 \(float\), expected a whole number$"):
        function("x", value=1.5)


ENDING = """
import sys
import numpy as np
import varstore as vs

path, call = sys.argv[1:]
vs.save(path, {"w": np.ones(3)})
calls = {
    "load": lambda: vs.load(path), "open": lambda: vs.open(path), "read": lambda: vs.read(path),
    "write": lambda: vs.write(path + ".npz", {"w": np.ones(3)}),
    "load_into": lambda: vs.load_into({"w": np.ones(3)}, path),
}
for name in dir(vs):
    getattr(vs, name)

class Late:
    def __del__(self, act=calls[call], wrong=vs.errors.UsageError, is_finalizing=sys.is_finalizing):
        try:
            act()
        except wrong as error:
            print(is_finalizing(), error)

sys.modules["late"] = Late()
"""


@pytest.mark.parametrize("call", ["load", "open", "read", "write", "load_into"])
def test_an_interpreter_that_ends_and_imports_nothing_more(tmp_path: Path, call: str) -> None:
    said = run_python(ENDING, tmp_path / "c", call).stdout
    assert said.startswith("True the interpreter is ending, and loads no more modules")
