"""A wrong argument of any kind, given for any parameter of any public function, is an error of varstore's tree.

Every function is called rightly, and then with one argument replaced by each value of a table. What a caller's own
function raises is the caller's, so parameters that take functions are not given any here.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.onnx_models import linear
from support.wrong import FUNCTIONS, WRONG

import varstore as vs
from varstore.errors import UsageError, VarstoreError

KEYS = frozenset({"name", "old"})
"""Parameters that become keys of a dict, which takes what can be hashed."""
ELSEWHERE = {
    **dict.fromkeys(
        ("AtSteps", "Best", "EverySeconds", "EverySteps", "KeepEverySteps", "KeepIf", "Latest"), "training"
    ),
    **dict.fromkeys(("OnePerMinutes", "Pinned", "SaveIf", "CheckpointManager"), "training"),
    **dict.fromkeys(("AttachedFile", "DiffReport", "LinksReport", "Movement", "Statistics"), "made by us"),
    **dict.fromkeys(("History", "RunStep", "RunSteps", "SalvageReport", "StatsReport", "VerifyReport"), "made by us"),
    **dict.fromkeys(("VarstoreError", "Session", "clear_default_session", "get_all_variables"), "no arguments"),
}


MATRIX = np.ones((16, 16), np.float32)
GRAPH = linear({"w": MATRIX, "b": MATRIX[0]})


ALLOWED = {"Variable[]": IndexError, "PendingSave.wait": TimeoutError}


def values():
    return {"w": np.zeros((2, 3), np.float32), "b": np.ones(3)}


STORE = {
    "attributes": {"a": 1},
    "variable_attributes": None,
    "files": {"labels.txt": b"cat"},
    "base": None,
    "overwrite": True,
    "durable": False,
    "foreign": "error",
}
SAVE = {**STORE, "manifest": True, "links": True, "encoding": None, "threads": 1, "progress": None}
PACK = {"verify": True, "overwrite": False, "durable": True, "threads": 1, "progress": None}
CHOICE = {"include": "w", "exclude": "b", "rename": {"w": "v"}}
READ = {"verify": True, "threads": 1, "progress": None}


def declared(initializer):
    return lambda **given: vs.get_variable("v", (2, 2), initializer=initializer(**given)).numpy()


def wait(**given):
    pending = vs.save_async("new", values(), overwrite=True, durable=False)
    try:
        pending.wait(**given)
    finally:
        pending.wait()


def waited(save):
    return lambda **given: save(**given).wait(20)


CALLS = {
    "save": (vs.save, lambda: {"path": "new", "variables": values(), "tree": "", **SAVE}),
    "save_state": (vs.save_state, lambda: {"path": "new", "state": {"a": values(), "n": 1}, **SAVE}),
    "save_async": (waited(vs.save_async), lambda: {"path": "new", "variables": values(), **SAVE}),
    "save_state_async": (waited(vs.save_state_async), lambda: {"path": "new", "state": values(), **SAVE}),
    "bundle": (
        vs.bundle,
        lambda: {
            **dict(SAVE, path="new", variables={"w": MATRIX, "b": MATRIX[0]}, graphs={"forward": GRAPH}, rename=None),
            "on_difference": "error",
            "include_only_used": False,
        },
    ),
    "export": (vs.export, lambda: {"path": "bundled", "target": "m.onnx", "entry": None}),
    "open": (vs.open, lambda: {"path": "c", "allow_incomplete": False}),
    "load": (vs.load, lambda: {"path": "c", **CHOICE, "mmap": False, **READ}),
    "load_state": (
        vs.load_state,
        lambda: {
            "path": "s",
            "include": "m*",
            "exclude": None,
            "rename": None,
            "framework": None,
            "map_location": None,
            "types": None,
            **READ,
        },
    ),
    "load_into": (
        vs.load_into,
        lambda: {
            **dict(CHOICE, targets=values(), source="c", exclude=None, rename=None, strict=None),
            **dict(READ, on_mismatch="error", cast=False, missing=None, on_tied="error"),
        },
    ),
    "load_into from arrays": (vs.load_into, lambda: {"targets": values(), "source": values(), "cast": True}),
    "verify": (vs.verify, lambda: {"path": "c", "threads": 1, "progress": None}),
    "seal": (vs.seal, lambda: {"path": "c", "complete": False, "writer": "x", "progress": None}),
    "clean": (vs.clean, lambda: {"directory": ".", "name": None}),
    "links": (vs.links, lambda: {"directory": ".", "dry_run": False, "progress": None}),
    "check_storage": (vs.check_storage, lambda: {"directory": "."}),
    "diff": (
        vs.diff,
        lambda: (
            {"a": "c", "b": "s", "values": True, "rtol": 0.1, "atol": 0}
            | {"include": "w", "exclude": None, "threads": 1, "progress": None}
        ),
    ),
    "merge": (
        vs.merge,
        lambda: (
            {"target": "new", "sources": ["c"], **CHOICE, "last_wins": True, "average": True, "weights": [1]}
            | {"verify": True, "overwrite": True, "foreign": "error", "durable": False, "threads": 1, "progress": None}
        ),
    ),
    "salvage": (vs.salvage, lambda: {"source": "c", "target": "new", "threads": 1, "progress": None}),
    "history": (vs.history, lambda: {"run": "run", "name": "w", "prefix": None}),
    "stats": (
        vs.stats,
        lambda: (
            {"source": "c", "include": "w", "exclude": "b", "quantiles": True, "histograms": True, "heat_maps": 1}
            | {"threads": 1}
        ),
    ),
    "steps": (vs.steps, lambda: {"path": "run"}),
    "read": (vs.read, lambda: {"path": "m.npz", "format": None}),
    "read mindspore": (vs.read, lambda: {"path": "m.ckpt", "format": "mindspore", "key": None, "crc_check": True}),
    "read torch": (vs.read, lambda: {"path": "m.pt", "format": "torch", "encoding": "latin-1"}),
    "convert": (
        vs.convert,
        lambda: (
            {"source": "m.npz", "target": "new", "format": "varstore", "source_format": "numpy", **CHOICE}
            | {
                "dtype": "float16",
                "limit": 1 << 30,
                "encoding": None,
                "ignore_extra": False,
                "dry_run": False,
                "progress": None,
                "overwrite": True,
                "durable": False,
                "attributes": None,
            }
        ),
    ),
    **{
        f"write {name}": (
            vs.write,
            lambda name=name, options=options: {
                "path": "new",
                "variables_or_state": values(),
                "format": name,
                **options,
            },
        )
        for name, options in {
            "varstore": STORE,
            "numpy": {},
            "torch": {},
            "paddle": {},
            "megengine": {},
            "mindspore": {},
            "safetensors": {"metadata": None, "shard_bytes": 10**6},
            "zarr": {"zarr_format": 2},
            "onnx": {"model": "m.onnx"},
        }.items()
    },
    "load_checkpoint": (
        vs.load_checkpoint,
        lambda: {"ckpt_file_name": "c", "net": None, "strict_load": False, "filter_prefix": "b", "specify_prefix": "w"},
    ),
    "load_param_into_net": (
        vs.load_param_into_net,
        lambda: {"net": values(), "parameter_dict": values(), "strict_load": False},
    ),
    "CheckpointConfig": (
        vs.CheckpointConfig,
        lambda: (
            {"save_checkpoint_steps": 1, "save_checkpoint_seconds": 0, "keep_checkpoint_max": 5}
            | {"keep_checkpoint_per_n_minutes": 0}
        ),
    ),
    "ModelCheckpoint": (vs.ModelCheckpoint, lambda: {"prefix": "p", "directory": "m", "config": None}),
    "ModelCheckpoint.step_end": (
        lambda **given: vs.ModelCheckpoint("p", "m").step_end(**given),
        lambda: {"epoch": 1, "step": 1, "variables": values()},
    ),
    "pack": (vs.pack, lambda: {"source": "c", "target": "new", "level": "fast", **PACK}),
    "unpack": (vs.unpack, lambda: {"source": "c", "target": "new", **PACK}),
    "checkpoint.save": (vs.checkpoint.save, lambda: {"path": "new", "var_dict": values(), **SAVE}),
    "checkpoint.get": (vs.checkpoint.get, lambda: {"path": "c"}),
    "get_variable": (
        lambda **given: vs.get_variable(**given).numpy(),
        lambda: (
            {"name": "v", "shape": (2,), "dtype": None, "initializer": None, "regularizer": None}
            | {"trainable": None, "model_name": None, "random_seed": None, "distribute": None}
        ),
    ),
    "load_variables": (vs.load_variables, lambda: {"value_dict": values(), "ignore_mismatch": True}),
    "SessionVariable.assign": (
        lambda **given: vs.get_variable("v", (2,)).assign(**given),
        lambda: {"value": np.zeros(2, np.float32)},
    ),
    "config": (vs.config.enable_legacy_model_io, lambda: {"val": True}),
    **{
        name: (declared(getattr(vs, name)), lambda name=name: defaults(getattr(vs, name)))
        for name in vs.__all__
        if name.endswith("_initializer") or name == "truncated_normal"
    },
    "Checkpoint.select": (lambda **given: vs.open("c").select(**given), lambda: dict(CHOICE)),
    "Checkpoint.get": (lambda **given: vs.open("c").get(**given), lambda: {"key": "w"}),
    "Checkpoint.entry": (lambda **given: vs.open("c").entry(**given), lambda: {"name": "w"}),
    "Checkpoint[]": (lambda name: vs.open("c")[name], lambda: {"name": "w"}),
    "in Checkpoint": (lambda name: name in vs.open("c"), lambda: {"name": "w"}),
    "Variable.numpy": (lambda **given: vs.open("c")["w"].numpy(**given), lambda: {"mmap": False}),
    "Variable[]": (lambda index: vs.open("c")["w"][index], lambda: {"index": 0}),
    "read()[]": (lambda name: vs.read("m.npz")[name], lambda: {"name": "w"}),
    "in read()": (lambda name: name in vs.read("m.npz"), lambda: {"name": "w"}),
    "read().select": (lambda **given: vs.read("m.npz").select(**given), lambda: dict(CHOICE)),
    "PendingSave.wait": (wait, lambda: {"timeout": 20}),
    "LoadReport.raise_for": (
        lambda category: vs.load_into(values(), values()).raise_for(category),
        lambda: {"category": "missing"},
    ),
    "a value": (lambda value: vs.save("new", {"v": value}, overwrite=True), lambda: {"value": np.zeros(2)}),
    "a value of a state": (
        lambda value: vs.load_state(vs.save_state("new", {"v": [value]}, overwrite=True).path),
        lambda: {"value": np.zeros(2)},
    ),
    "a name": (lambda name: vs.save("new", {name: np.zeros(2)}, overwrite=True), lambda: {"name": "v"}),
    "a key of a state": (
        lambda name: vs.load_state(vs.save_state("new", {name: np.zeros(2)}, overwrite=True).path),
        lambda: {"name": "v"},
    ),
    "a value to write": (lambda value: vs.write("new.pt", {"v": value}), lambda: {"value": np.zeros(2)}),
    "an attribute": (
        lambda value: vs.save("new", {}, overwrite=True, attributes={"v": value}),
        lambda: {"value": 1},
    ),
    "an attribute of a variable": (
        lambda value: vs.save("new", values(), overwrite=True, variable_attributes={"w": value}),
        lambda: {"value": {"v": 1}},
    ),
    "a prefix": (lambda old, new: vs.load("c", rename={old: new}), lambda: {"old": "w", "new": "v"}),
    "a regex": (lambda old, new: vs.load("c", rename=[(old, new)]), lambda: {"old": "w", "new": "v"}),
    "a pattern": (lambda pattern: vs.load("c", include=[pattern]), lambda: {"pattern": "w"}),
}


def defaults(function):
    found = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {name: (2, 2) if value is inspect.Parameter.empty else value for name, value in found.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vs.save("c", values(), durable=False)
    vs.bundle("bundled", {"w": MATRIX, "b": MATRIX[0]}, graphs={"forward": GRAPH}, durable=False)
    vs.save_state("s", {"m": values(), "n": 3}, durable=False)
    for name in ("m.npz", "m.ckpt", "m.pt"):
        vs.write(name, values())
    vs.CheckpointManager("run").save(1, values()).wait()
    Path("file").touch()
    return tmp_path


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_an_error_of_varstore(name, folder):
    call, arguments = CALLS[name]
    kept = {path.name for path in folder.iterdir()}
    with contextlib.suppress(VarstoreError), vs.Session():  # a model for onnx, which is written with its names
        call(**arguments())
    foreign = []
    for parameter in arguments():
        for label, value in WRONG.items():
            if (callable(value) and parameter in FUNCTIONS) or (parameter in KEYS and type(value).__hash__ is None):
                continue
            try:
                with vs.Session(), contextlib.redirect_stderr(io.StringIO()):
                    call(**{**arguments(), parameter: value})
            except VarstoreError:
                pass
            except Exception as error:
                if isinstance(error, ALLOWED.get(name, ())) or "unexpected keyword argument" in str(error):
                    continue
                foreign.append(f"{parameter} = {label}: {type(error).__name__}: {error}"[:200])
            for path in [path for path in folder.iterdir() if path.name not in kept]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert foreign == []


@pytest.mark.parametrize("level", ["big", "", "Fast", None, ["fast"]])
def test_a_word_that_the_signature_does_not_list_is_refused(folder, level):
    with pytest.raises(UsageError, match=r"level: unknown mode: found .*, expected 'fast' or 'small'"):
        vs.pack("c", "new", level=level)
    assert not Path("new").exists()


def test_every_public_function_is_called():
    called = {name.split()[0].partition(".")[0] for name in CALLS}
    functions = {
        name for name in vs.__all__ if callable(getattr(vs, name)) and not isinstance(getattr(vs, name), np.dtype)
    }
    types = {
        name for name in functions if isinstance(getattr(vs, name), type) and issubclass(getattr(vs, name), np.generic)
    }
    assert functions - types - called == set(ELSEWHERE)


def test_every_parameter_is_given():
    for name, (call, arguments) in CALLS.items():
        if call is getattr(vs, name, None):
            parameters = inspect.signature(call).parameters.values()
            named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
            assert named - arguments().keys() <= FUNCTIONS, name
