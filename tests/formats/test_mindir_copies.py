"""Programs of MindSpore with other values: all else is the same bytes, and MindSpore itself runs the copy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import FIXTURES, ROOT

import varstore as vs
from varstore.errors import FormatError, UsageError, VariableMismatch, VariableNotFound, VarstoreError
from varstore.formats.binary.wire import bytes_field, int_field

MODEL = FIXTURES / "formats/mindspore/net.mindir"
RUN = """
import json, sys, numpy as np, mindspore as ms
from mindspore import nn, Tensor
net = nn.GraphCell(ms.load(sys.argv[1]))
print(json.dumps(net(Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))).asnumpy().tolist()))
"""


def test_a_copy_without_changes_is_the_same_bytes(tmp_path):
    for values in ({}, vs.read(MODEL)):
        vs.write(tmp_path / "copy.mindir", values, model=MODEL)
        assert (tmp_path / "copy.mindir").read_bytes() == MODEL.read_bytes()


def test_mindspore_runs_the_copy(tmp_path):
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / "mindspore/bin/python"
    if not python.exists():
        pytest.skip("no environment mindspore: run tools/make_envs.sh mindspore")
    weight, scale = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2], np.float16)
    vs.save(tmp_path / "c", {"fc.weight": weight, "scale": scale, "epoch": np.ones(1)})
    done = vs.convert(tmp_path / "c", tmp_path / "copy.mindir", model=MODEL, ignore_extra=True)
    assert (done.format, done.left_out) == ("mindspore", ("epoch",))
    now = {name: np.asarray(array) for name, array in vs.read(tmp_path / "copy.mindir").items()}
    np.testing.assert_array_equal(now["fc.weight"], weight)
    environ = {**os.environ, "GLOG_v": "3"}
    ran = subprocess.run(
        [python, "-c", RUN, tmp_path / "copy.mindir"], capture_output=True, text=True, timeout=300, env=environ
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = (weight @ weight.T + now["fc.bias"]) * np.float32([1, 2]) + now["n"]
    np.testing.assert_allclose(json.loads(ran.stdout.splitlines()[-1]), expected, rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    for values, error in (
        ({"fc": np.zeros(2, np.float32)}, VariableNotFound),
        ({"fc.bias": np.zeros(3, np.float32)}, VariableMismatch),
        ({"scale": np.zeros(2, np.float32)}, VariableMismatch),
    ):
        with pytest.raises(error):
            vs.write(tmp_path / "copy.mindir", values, model=MODEL)
    with pytest.raises(UsageError, match="as a copy"):
        vs.write(tmp_path / "copy.mindir", {})
    assert not (tmp_path / "copy.mindir").exists()


def program(*parameters: bytes) -> bytes:
    graph = b"".join(bytes_field(3, parameter) for parameter in parameters)
    return bytes_field(1, b"1.1") + bytes_field(2, b"MindSpore") + bytes_field(7, graph)


def parameter(*, dims=(2,), kind=1, raw=bytes(8), name=b"w", rest=b""):
    head = b"".join(int_field(1, extent) for extent in dims) + int_field(2, kind)
    return head + bytes_field(9, raw) + bytes_field(13, name) + rest


@pytest.mark.parametrize(
    "content",
    [
        program(parameter(raw=bytes(7))),
        program(parameter(dims=(1 << 40,))),
        program(parameter(dims=(-1,))),
        program(parameter(dims=(1,) * 33)),
        program(parameter(kind=18)),
        program(parameter(), parameter()),
        program(parameter(rest=bytes_field(12, b"\x0a\x09../secret"))),
        program(parameter(rest=int_field(16, 1))),
        program(parameter()) + bytes_field(7, b""),
        program(parameter(name=b"\xff")),
    ],
)
def test_hostile_programs_are_refused(tmp_path, content):
    (tmp_path / "a.mindir").write_bytes(program(parameter()))
    assert vs.read(tmp_path / "a.mindir")["w"].tolist() == [0, 0]
    (tmp_path / "a.mindir").write_bytes(content)
    with pytest.raises(VarstoreError):
        vs.read(tmp_path / "a.mindir")


def test_a_program_that_was_cut_off_is_refused(tmp_path):
    whole = MODEL.read_bytes()
    for size in (30, 2000, 3600, len(whole) - 1):
        (tmp_path / "a.mindir").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"truncated|graphs"):
            vs.read(tmp_path / "a.mindir")
