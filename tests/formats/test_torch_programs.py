"""Programs and modules of PyTorch, and tensors in other pickles: the values by name, and nothing of the code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import FIXTURES, crafted, load_truth, run_python
from support.crafted import torch_file
from support.hostile_pickles import STOP, called, named, number, storage, tensor, text, torch_zip

import varstore as vs
from varstore.errors import FormatError, SizeMismatch, UnsafeContent, UnsupportedDtype, VarstoreError
from varstore.formats import torch

FILES = FIXTURES / "formats" / "torch"
CUT = (".pt", ".pt2", ".pkl")
PROGRAMS = sorted(path.name for path in FILES.glob("program_*.pt2"))


def rewritten(name: str, target: Path, change: Any, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy an archive; `change` maps the name and content of each member to others, or to None."""
    with zipfile.ZipFile(FILES / name) as source, zipfile.ZipFile(target, "w", compression) as copy:
        for member in source.namelist():
            changed = change(member, source.read(member))
            if changed is not None:
                copy.writestr(*changed)
    return target


# --- modes and detection -----------------------------------------------------------------------------------------

WHOLE = [
    *PROGRAMS,
    *("torchscript.pt", "torchscript_traced.pt", "torchscript_frozen.pt", "whole_module_legacy.pth"),
    *("torchscript_frozen_in_part.pt", "graph_module.pt"),
]


@pytest.mark.parametrize("name", WHOLE)
def test_programs_open_in_both_modes_and_are_detected(name, tmp_path):
    (tmp_path / "file").write_bytes((FILES / name).read_bytes())
    expected = load_truth(FILES / name)
    for unknown in ("opaque", "error"):
        opened = vs.read(tmp_path / "file", unknown=unknown)
        assert (opened.format, opened.unknown) == ("torch", ())
        assert set(opened) == set(expected)


@pytest.mark.parametrize("name", ["script_checkpoint.pt", "history_buffer.pth", "omegaconf.pt", "lightning.ckpt"])
def test_files_with_objects_are_refused_if_that_is_asked_for(name):
    assert vs.read(FILES / name).unknown
    with pytest.raises(UnsafeContent):
        vs.read(FILES / name, unknown="error")


def test_there_is_a_program_of_each_layout():
    assert PROGRAMS == ["program_2_13.pt2", "program_2_6.pt2", "program_2_8.pt2"]


@pytest.mark.parametrize("name", [*PROGRAMS, "torchscript.pt"])
def test_tied_weights_stay_tied(name):
    opened = vs.read(FILES / name)
    assert opened["fc.weight"].identity == opened["head.weight"].identity


def test_names_of_a_state_dict_load_into_a_module_of_the_program(tmp_path):
    done = vs.convert(FILES / "program_2_13.pt2", tmp_path / "a.safetensors")
    assert (set(done.names), done.left_out) == (set(load_truth(FILES / "program_2_13.pt2")), ())


# --- nothing of the code is touched ------------------------------------------------------------------------------


def test_a_module_that_a_file_names_is_not_imported(tmp_path):
    """It lies on the path, and would leave a canary when it is imported or its state is set."""
    (tmp_path / "stranger_module.py").write_text(
        "open('canary', 'w')\nclass Arguments:\n    def __setstate__(self, state):\n        open('canary', 'w')\n"
    )
    code = """
import os, sys
path = sys.argv[1]
os.chdir(sys.argv[2])
sys.path.insert(0, "")
import varstore as vs
vs.read(path).state()
modules, seen = set(sys.modules), []
sys.addaudithook(lambda event, given: event in ("open", "import", "exec", "compile") and seen.append((event, given[0])))
opened = vs.read(path)
arguments = opened.state()["model"]["args"]
assert arguments.state == {"lr": 0.1} and arguments.module == "stranger_module"
print(len([opened[name].numpy() for name in opened]))
assert set(sys.modules) == modules, set(sys.modules) - modules
assert {given for _, given in seen} == {path}, seen
"""
    assert int(run_python(code, FILES / "stranger.pt", tmp_path).stdout) == len(load_truth(FILES / "stranger.pt"))
    assert not (tmp_path / "canary").exists()
    run_python("import os, sys; os.chdir(sys.argv[1]); sys.path[0] = ''; import stranger_module", tmp_path)
    assert (tmp_path / "canary").exists()


def test_the_code_of_a_program_is_not_read(tmp_path):
    def torn(name: str, data: bytes) -> tuple[str, bytes] | None:
        return (name, os.urandom(len(data)) if "/code/" in name or name.endswith("model.json") else data)

    for name in ("torchscript.pt", "program_2_13.pt2"):
        opened = vs.read(rewritten(name, tmp_path / name, torn))
        for key, values in load_truth(FILES / name).items():
            assert opened[key].numpy().tobytes() == values.tobytes()


def test_source_records_are_neither_opened_nor_compiled(tmp_path):
    """The text of a class beside it may be anything, and its path too."""
    raw = (FILES / "whole_module_legacy.pth").read_bytes()
    at = raw.index(b"class Net(")
    path = tmp_path / "a.pth"
    path.write_bytes(raw[:at] + b"\xff\0(((" + raw[at + 5 :])
    assert set(vs.read(path)) == set(load_truth(FILES / "whole_module_legacy.pth"))


@pytest.mark.parametrize(
    "record",
    [
        b"(" + text("module") + text("Net") + text("a.py") + text("source") + b"tQ",
        b"(" + text("modules") + named("a", "B") + text("a.py") + text("source") + b"tQ",
        b"(" + text("module") + named("os", "system") + text("a.py") + text("source") + b"tQ" + text("x") + b"\x85R",
    ],
)
def test_source_records_of_other_things_are_refused(tmp_path, record):
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "a.pth").write_bytes(head + record + STOP + pickle.dumps([], 2))
    with pytest.raises(UnsafeContent):
        torch.read(tmp_path / "a.pth")


# --- TorchScript that lies ---------------------------------------------------------------------------------------


def script(body: bytes, constants: bytes = b").") -> bytes:
    return torch_zip(body + STOP, {"archive/data/0": bytes(16), "archive/constants.pkl": constants})


def test_attributes_of_script_modules_have_names_of_their_own(tmp_path):
    view = tensor(storage("torch.FloatStorage", "0", 4), 0, [4], [1])
    inner = named("__torch__", "A") + b")\x81}" + text("b") + view + b"sb"
    body = named("__torch__", "M") + b")\x81}(" + text("a") + inner + text("a.b") + view + text("n") + b"K\1"
    (tmp_path / "a.pt").write_bytes(script(body + text("list") + b"](" + view + view + b"eub"))
    assert list(vs.read(tmp_path / "a.pt")) == ["a.b", "a.b~2", "list.0", "list.1"]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        (b"N", b")."),
        (b"]", b")."),
        (named("__torch__", "M") + b")\x81}" + text("a") + called("os", "system", text("x")) + b"sb", b")."),
        (named("os", "system") + b"0" + named("__torch__", "M") + b")\x81}b", b")."),
        (named("__torch__", "M") + b")\x81}b", called("os", "system", text("x")) + STOP),
        (named("__torch__", "M") + b")\x81q\0}" + text("a") + b"h\0sb", b")."),
    ],
)
def test_scripts_that_are_not_modules_are_refused(tmp_path, body, constants):
    (tmp_path / "a.pt").write_bytes(script(body, constants))
    with pytest.raises(FormatError):
        vs.read(tmp_path / "a.pt")


def test_a_script_of_modules_that_repeat_is_refused(tmp_path):
    body = named("__torch__", "M") + b")\x81}" + text("w") + tensor(storage("torch.FloatStorage", "0", 4), 0, [4], [1])
    body += b"sb"
    for at in range(40):
        name = bytes([at])
        again = b"h" + name
        body += b"q" + name + b"0" + named("__torch__", "M")
        body += b")\x81}(" + text("a") + again + text("b") + again + b"ub"
    (tmp_path / "a.pt").write_bytes(script(body))
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(tmp_path / "a.pt")


# --- exported programs that lie ----------------------------------------------------------------------------------


def index_of(change: Any) -> Any:
    def changed(name: str, data: bytes) -> tuple[str, bytes]:
        if name.endswith("model_weights_config.json"):
            config = json.loads(data)
            change(config["config"]["fc.weight"])
            data = json.dumps(config).encode()
        return name, data

    return changed


def put(*path: str, value: Any) -> Any:
    def change(entry: dict[str, Any]) -> None:
        for part in path[:-1]:
            entry = entry[part]
        entry[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (put("path_name", value="weight_99"), FormatError),
        (put("path_name", value="../../secret"), FormatError),
        (put("path_name", value=["weight_0"]), FormatError),
        (put("path_name", value=None), FormatError),
        (put("use_pickle", value=True), FormatError),
        (put("tensor_meta", value=[]), UnsupportedDtype),
        (put("tensor_meta", "dtype", value=99), UnsupportedDtype),
        (put("tensor_meta", "dtype", value=[7]), UnsupportedDtype),
        (put("tensor_meta", "layout", value=1), UnsupportedDtype),
        (put("tensor_meta", "sizes", value=[{"as_int": 1 << 40}, {"as_int": 1 << 40}]), FormatError),
        (put("tensor_meta", "sizes", value=[{"as_int": -1}, {"as_int": 3}]), FormatError),
        (put("tensor_meta", "sizes", value=[{"as_expr": "s0"}, {"as_int": 3}]), FormatError),
        (put("tensor_meta", "sizes", value=[{"as_int": True}, {"as_int": 3}]), FormatError),
        (put("tensor_meta", "sizes", value=None), FormatError),
        (put("tensor_meta", "strides", value=[{"as_int": 1 << 50}, {"as_int": 1}]), SizeMismatch),
        (put("tensor_meta", "storage_offset", value={"as_int": 5}), SizeMismatch),
        (put("tensor_meta", "storage_offset", value="0"), FormatError),
    ],
)
def test_indexes_that_lie_are_refused(tmp_path, change, error):
    with pytest.raises(error):
        vs.read(rewritten("program_2_13.pt2", tmp_path / "a.pt2", index_of(change)))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"{}", b'{"config": 3}', b'{"config": {"w": 3}}', b"[" * 10**5])
def test_indexes_that_are_none_are_refused(tmp_path, content):
    change = lambda name, data: (name, content if name.endswith("_weights_config.json") else data)  # noqa: E731
    with pytest.raises(FormatError):
        vs.read(rewritten("program_2_13.pt2", tmp_path / "a.pt2", change))


def test_an_index_that_is_a_bomb_is_refused(tmp_path):
    change = lambda name, data: (name, b" " * (1 << 25) if name.endswith("_weights_config.json") else data)  # noqa: E731
    with pytest.raises(UnsafeContent, match="bomb"):
        vs.read(rewritten("program_2_13.pt2", tmp_path / "a.pt2", change, compression=zipfile.ZIP_DEFLATED))


def test_weights_that_repeat_a_few_bytes_are_refused(tmp_path):
    sizes = [{"as_int": 1 << 30}, {"as_int": 3}]
    meta = {"sizes": sizes, "strides": [{"as_int": 0}, {"as_int": 1}]}
    change = index_of(lambda entry: entry["tensor_meta"].update(meta))
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(rewritten("program_2_13.pt2", tmp_path / "a.pt2", change))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_without_weights_or_in_other_archives_say_so(tmp_path, name):
    without = lambda name, data: None if "weights" in name or "state_dict" in name else (name, data)  # noqa: E731
    with pytest.raises(FormatError, match="no weights"):
        vs.read(rewritten(name, tmp_path / "a.pt2", without))
    packed = rewritten(name, tmp_path / "b.pt2", lambda *member: member, compression=zipfile.ZIP_DEFLATED)
    if name == "program_2_13.pt2":
        assert set(vs.read(packed)) == set(load_truth(FILES / name))
    else:
        with pytest.raises(FormatError, match="compressed"):
            vs.read(packed)


def test_several_models_in_a_program_are_told_apart(tmp_path):
    def doubled(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data

    path = rewritten("program_2_13.pt2", tmp_path / "a.pt2", doubled)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        index = archive.read(f"{root}/data/weights/model_weights_config.json")
        archive.writestr(f"{root}/data/weights/decode_weights_config.json", index)
    names = load_truth(FILES / "program_2_13.pt2")
    assert set(vs.read(path)) == {f"{model}/{name}" for model in ("model", "decode") for name in names}


def pickled_weights(path: Path, names: dict[str, str], body: bytes) -> Path:
    """Write a program whose weights are files of `torch.save`; `names` maps each weight to its member."""
    root = "program/data/weights"
    config = {weight: {"path_name": member, "use_pickle": True} for weight, member in names.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/archive_format", "pt2")
        archive.writestr(f"{root}/model_weights_config.json", json.dumps({"config": config}))
        for member in set(names.values()):
            archive.writestr(f"{root}/{member}", torch_zip(body + STOP))
    return path


def test_unknown_names_of_pickled_weights_are_listed(tmp_path):
    path = pickled_weights(tmp_path / "a.pt2", {"w": "weight_0", "v": "weight_1"}, named("foo", "Bar") + b")\x81")
    opened = vs.read(path)
    assert opened.unknown == (("foo", "Bar", 1),) * 2
    assert sorted(opened.state()) == ["v", "w"]


def test_a_pickled_weight_that_several_names_share_is_refused(tmp_path):
    with pytest.raises(UnsafeContent, match="one pickle"):
        vs.read(pickled_weights(tmp_path / "a.pt2", {"w": "weight_0", "v": "weight_0"}, wrapper(b"}")))


# --- _load_from_bytes --------------------------------------------------------------------------------------------


def in_bytes(body: bytes, values: bytes, keys: Any = ("0",)) -> bytes:
    """Return the argument of _load_from_bytes: a file of one storage in the older format."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    raw = head + body + STOP + pickle.dumps(list(keys), 2) + struct.pack("<q", len(values) // 4) + values
    return b"B" + struct.pack("<I", len(raw)) + raw


ONE = storage("torch.FloatStorage", "0", 4)[:-2] + b"NtQ"
VALUES = np.arange(4, dtype=np.float32).tobytes()


def loaded(argument: bytes) -> bytes:
    return called("torch.storage", "_load_from_bytes", argument)


@pytest.mark.parametrize("unknown", ["opaque", "error"])
def test_a_storage_in_bytes_is_read_in_place(tmp_path, unknown):
    path = torch_file(tmp_path / "a.pt", tensor(loaded(in_bytes(ONE, VALUES)), 1, [2], [2]), storage=b"\0")
    opened = vs.read(path, unknown=unknown)
    assert opened.state().tolist() == [1, 3]
    assert opened.unknown == ()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_tensors_of_each_protocol(tmp_path, protocol):
    """Protocols below 3 keep bytes as text."""
    raw = in_bytes(ONE, VALUES)[5:]

    class Storage:
        def __reduce__(self) -> Any:
            return function, (raw,)

    def function() -> None: ...

    function.__module__, function.__qualname__, function.__name__ = "torch.storage", *["_load_from_bytes"] * 2
    with pytest.MonkeyPatch.context() as patch:
        fake = type(os)("torch.storage")
        fake._load_from_bytes = function  # type: ignore[attr-defined]
        patch.setitem(__import__("sys").modules, "torch", type(os)("torch"))
        patch.setitem(__import__("sys").modules, "torch.storage", fake)
        data = pickle.dumps({"w": Storage()}, protocol)
    (tmp_path / "a.pkl").write_bytes(data)
    assert torch.read(tmp_path / "a.pkl").state()["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "argument",
    [
        b"N",
        text("x"),
        b"C\4abcd",
        in_bytes(b"N", VALUES, ()),
        in_bytes(b"]", VALUES, ()),
        in_bytes(ONE, VALUES[:-4]),
        in_bytes(ONE, b""),
        in_bytes(ONE, VALUES, ("1",)),
        in_bytes(called("os", "system", text("x")), VALUES, ()),
        in_bytes(named("os", "system") + b"0" + ONE, VALUES),
        in_bytes(loaded(in_bytes(ONE, VALUES)), VALUES, ()),
        in_bytes(named("foo", "Bar") + b")R", VALUES, ()),
        in_bytes(tensor(ONE, 0, [4], [1]), VALUES),
        in_bytes(storage("torch.FloatStorage", "0", 1 << 40)[:-2] + b"NtQ", VALUES),
        in_bytes(b"N0" * (1 << 17) + ONE, VALUES),
    ],
)
@pytest.mark.parametrize("unknown", ["opaque", "error"])
def test_bytes_that_are_no_storage_are_refused(tmp_path, argument, unknown):
    for make in (torch_file, lambda path, body: path.write_bytes(body + STOP) and path):
        path = make(tmp_path / "a.pt", loaded(argument))
        with pytest.raises(UnsafeContent):
            vs.read(path, "torch", unknown=unknown)


def test_bytes_that_are_loaded_again_and_again_are_paid_for(tmp_path):
    once = in_bytes(b"N0" * 30_000 + ONE, VALUES)
    again = b"".join([named("torch.storage", "_load_from_bytes"), b"q\1h\0\x85R0" + b"h\1h\0\x85R0" * 100_000])
    path = torch_file(tmp_path / "a.pt", once + b"q\0" + b"0" + again + b"N", storage=b"\0")
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(path)


def test_other_frameworks_do_not_load_from_bytes(tmp_path):
    (tmp_path / "a.pdparams").write_bytes(loaded(in_bytes(ONE, VALUES)) + STOP)
    for format in ("paddle", "megengine"):
        with pytest.raises(UnsafeContent, match="_load_from_bytes"):
            vs.read(tmp_path / "a.pdparams", format)


# --- tensors without values of their own -------------------------------------------------------------------------


def wrapper(state: bytes) -> bytes:
    given = named("foo", "Wrapped") + b"(" + named("torch", "float32") + number(4) + b"\x85t"
    return called(
        "torch._tensor",
        "_rebuild_from_type_v2",
        named("torch._utils", "_rebuild_wrapper_subclass"),
        named("foo", "Wrapped"),
        b"(" + given + b"t",
        state,
    )


def test_a_wrapper_without_tensors_is_a_record(tmp_path):
    path = torch_file(tmp_path / "a.pt", wrapper(b"}" + text("scale") + b"K\1s"))
    assert repr(vs.read(path).state()) == "<Opaque foo.Wrapped>"
    with pytest.raises(UnsafeContent, match=r"foo\.Wrapped"):
        vs.read(path, unknown="error")


def test_attributes_of_a_wrapper_are_named(tmp_path):
    view = tensor(storage("torch.FloatStorage", "0", 4), 0, [4], [1])
    path = torch_file(tmp_path / "a.pt", wrapper(b"}(" + text("data") + view + text("n") + b"K\1u"), storage=VALUES)
    assert list(vs.read(path)) == ["data"]
    assert vs.read(path, unknown="error").state()["class"] == "foo.Wrapped"
    slots = wrapper(b"N}" + text("data") + view + b"s\x86")
    assert list(vs.read(torch_file(tmp_path / "b.pt", slots, storage=VALUES))) == ["data"]


@pytest.mark.parametrize("state", [b"N" + b"}" * 2 + b"\x87", b"}K\1\x86", b"K\1"])
def test_a_wrapper_with_a_state_of_its_own_is_a_record(tmp_path, state):
    view = text("data") + tensor(storage("torch.FloatStorage", "0", 4), 0, [4], [1])
    path = torch_file(tmp_path / "a.pt", wrapper(state.replace(b"}", b"}" + view + b"s")), storage=VALUES)
    assert repr(vs.read(path).state()) == "<Opaque foo.Wrapped>"


def test_attributes_of_a_wrapper_are_paid_for(tmp_path):
    """One dict may be the state of many objects."""
    state = b"}(" + b"".join(text(f"{i}") + b"N" for i in range(2000)) + b"u"
    again = wrapper(b"h\0") + b"0"
    path = torch_file(tmp_path / "a.pt", state + b"q\0" + b"0" + again * 2000 + b"N")
    with pytest.raises(UnsafeContent, match="out of proportion"):
        vs.read(path)


def test_attributes_and_slots_that_collide_are_refused(tmp_path):
    """Each of the two dicts is allowed, but not both in one."""
    pairs = crafted.colliding_pairs(128)
    dicts = (
        b"".join(b"J" + struct.pack("<i", a) + crafted.long1(b) + b"\x86N" for a, b in half)
        for half in (pairs[:64], pairs[64:])
    )
    path = torch_file(tmp_path / "a.pt", wrapper(b"".join(b"}(" + one + b"u" for one in dicts) + b"\x86"))
    with pytest.raises(UnsafeContent, match="same hashes"):
        vs.read(path)


@pytest.mark.parametrize("kept", [b"N", b"K\1", b"](" + text("a") + b"e"])
def test_what_is_not_a_set_of_buffers_leaves_none_out(tmp_path, kept):
    view = tensor(storage("torch.FloatStorage", "0", 4), 0, [4], [1])
    parts = text("_parameters") + b"}" + text("_modules") + b"}" + text("_buffers") + b"}" + text("a") + view + b"s"
    body = named("foo", "Net") + b")\x81}(" + parts + text("_non_persistent_buffers_set") + kept + b"ub"
    assert list(vs.read(torch_file(tmp_path / "a.pt", body, storage=VALUES))) == ["a"]


@pytest.mark.parametrize("hook", [named("os", "system"), named("builtins", "eval"), named("foo", "hook")])
def test_modules_that_keep_what_runs_code_are_refused(tmp_path, hook):
    """Other functions stay: a module keeps its hooks, and they are not in its state dict."""
    parts = b"".join(text(part) + b"}" for part in ("_parameters", "_buffers", "_modules"))
    module = named("foo", "Net") + b")\x81}(" + parts + text("_forward_hooks") + hook + b"ub"
    subclass = b"(" + named("torch._utils", "_rebuild_parameter") + hook + b"(K\1\x88}tNt"
    for body in (module, named("torch._tensor", "_rebuild_from_type_v2") + subclass + b"R"):
        path = torch_file(tmp_path / "a.pt", body)
        for unknown in ("opaque", "error"):
            if b"foo\nhook" in hook:
                assert vs.read(path, unknown=unknown).unknown == ()
            else:
                with pytest.raises(UnsafeContent, match="would import"):
                    vs.read(path, unknown=unknown)


def test_the_code_of_a_traced_module_is_not_compiled(tmp_path):
    body = called("torch.fx.graph_module", "reduce_graph_module", b"}" + text("_code") + text("(((") + b"s", text("("))
    path = torch_file(tmp_path / "a.pt", b"]" + body + b"a")
    assert repr(vs.read(path).state()) == "[<Opaque torch.fx.graph_module.GraphModule>]"
    with pytest.raises(UnsafeContent, match="GraphModule"):
        vs.read(path, unknown="error")


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir() if path.suffix in CUT))
def test_a_file_that_was_cut_is_an_error_that_names_it(tmp_path, name):
    raw = (FILES / name).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        path = tmp_path / name
        path.write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(VarstoreError, match=name):
            torch.read(path).state()


def test_a_file_object_is_read_as_a_file_is():
    for name in WHOLE:
        opened = vs.read(io.BytesIO((FILES / name).read_bytes()))
        assert set(opened) == set(load_truth(FILES / name))
