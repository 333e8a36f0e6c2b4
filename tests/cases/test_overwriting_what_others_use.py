"""Overwriting a checkpoint with other people's files in it, and one that lies in a lower layer of an overlay."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import varstore as vs
from varstore.errors import CheckpointExists, UsageError

W = {"w": np.arange(4.0)}


@pytest.fixture
def path(tmp_path):
    vs.save(tmp_path / "c", {"w": np.zeros(4), "deep/v": np.ones(2)})
    return tmp_path / "c"


FOREIGN = ["config.json", "logs/tb", "w/notes.txt", "deep/v/notes.txt", ".hidden"]


def put(path, name):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("mine")


@pytest.mark.parametrize("name", FOREIGN)
def test_other_peoples_files_make_an_overwrite_an_error(path, name):
    put(path, name)
    with pytest.raises(CheckpointExists, match=name.split("/")[0]):
        vs.save(path, W, overwrite=True)
    assert (path / name).read_text() == "mine"
    assert vs.load(path)["w"].sum() == 0
    assert os.listdir(path.parent) == ["c"]


def test_a_checkpoint_in_a_checkpoint_makes_an_overwrite_an_error(path):
    vs.save(path / "nested", {"precious": np.arange(3)})
    with pytest.raises(CheckpointExists, match="nested"):
        vs.save(path, W, overwrite=True)
    assert vs.load(path / "nested")["precious"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", FOREIGN)
def test_other_peoples_files_go_by_request(path, name):
    put(path, name)
    vs.save(path, W, overwrite=True, foreign="delete")
    assert sorted(os.listdir(path)) == ["manifest", "snapshot_done", "w"]


@pytest.mark.parametrize("name", [".DS_Store", "._x", ".nfs0001", "Thumbs.db", "desktop.ini", "lost+found/x"])
def test_files_that_systems_drop_do_not_count(path, name):
    put(path, name)
    vs.save(path, W, overwrite=True)
    assert vs.load(path)["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("names", [["src/train.py", "notes.txt"], ["w/out", "mine.txt"]], ids=["project", "no marker"])
def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path, names):
    for name in names:
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("12345678")
    with pytest.raises(CheckpointExists, match="not a checkpoint"):
        vs.save(tmp_path / "p", W, overwrite=True)
    assert all((tmp_path / "p" / name).read_text() == "12345678" for name in names)


def test_a_step_that_is_trimmed_keeps_other_peoples_files(tmp_path):
    manager = vs.CheckpointManager(tmp_path / "run", keep_parts={"opt/*": vs.Latest(1)})
    manager.save(1, {"w": np.ones(2), "opt": {"m": np.ones(2)}})
    (tmp_path / "run" / "step-1" / "eval.json").write_text("mine")
    manager.save(2, {"w": np.ones(2), "opt": {"m": np.ones(2)}})
    manager.wait()
    assert list(vs.load(tmp_path / "run" / "step-1")) == ["w"]
    assert (tmp_path / "run" / "step-1" / "eval.json").exists()


def test_a_seal_keeps_other_peoples_files(path):
    put(path, "config.json")
    vs.seal(path)
    assert (path / "config.json").read_text() == "mine"
    assert vs.verify(path).ok


@pytest.mark.parametrize("name", ["llama-3.1", "v1.0", "run.v2"])
def test_a_name_with_a_number_after_its_dot_is_a_checkpoint(tmp_path, name):
    vs.write(tmp_path / name, W)
    assert vs.load(tmp_path / name)["w"].tolist() == [0, 1, 2, 3]


def test_a_name_with_an_unknown_suffix_says_how_to_write_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="format='varstore'"):
        vs.write(tmp_path / "model.d", W)
    vs.write(tmp_path / "model.d", W, format="varstore")
    assert vs.load(tmp_path / "model.d")["w"].tolist() == [0, 1, 2, 3]


def test_a_dot_in_a_parent_says_nothing(tmp_path):
    vs.write(tmp_path / "a.b" / "c", W)
    assert vs.load(tmp_path / "a.b" / "c")["w"].tolist() == [0, 1, 2, 3]


# --- an overlay --------------------------------------------------------------------------------------------------

MOUNTED = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/lower" "$1/upper" "$1/work" "$1/merged"
"$2" -c "$3" "$1/lower"
mount -t overlay overlay -o "$5lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" "$1/merged"
echo mounted
exec "$2" -c "$4" "$1/merged"
"""
LOWER = """
import os, sys
import numpy as np, varstore as vs
os.chdir(sys.argv[1])
vs.save("model", {"w": np.arange(4.0)})
for step in (1, 2, 3):
    vs.CheckpointManager("run").save(step, {"w": np.full(2, step)})
vs.write("f.safetensors", {"w": np.arange(4.0)})
"""
UPPER = """
import json, os, sys
import numpy as np, varstore as vs
os.chdir(sys.argv[1])
def save(path, value, **options):
    vs.save(path, {"w": np.full(2, value)}, **options)
def load(path):
    return vs.load(path)["w"].tolist()
def steps(manager):
    return [saved.step for saved in manager.all()]
def said():
    ACTION
try:
    told = ["returned", said()]
except vs.VarstoreError as error:
    told = ["VarstoreError", str(error)]
except BaseException as error:
    told = [type(error).__name__, str(error)]
left = [name for place in (".", "run") for name in os.listdir(place) if name.startswith(".")]
print("\\n" + json.dumps([*told, left]))
"""


def overlaid(tmp_path, user, action):
    """Run Python in a directory whose checkpoints lie in a lower layer, as in an image of a container."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("mounts as root")
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    (tmp_path / "mnt").mkdir()
    options = "redirect_dir=off," if user == "root" else ""  # in a user namespace it is off, and cannot be named
    namespace = {"root": ["--mount"], "mapped": ["--user", "--map-root-user", "--mount"]}[user]
    script = [
        "bash",
        "-c",
        MOUNTED,
        "bash",
        tmp_path / "mnt",
        sys.executable,
        LOWER,
        UPPER.replace("ACTION", action),
        options,
    ]
    done = subprocess.run(["unshare", *namespace, *script], capture_output=True, text=True, check=False, timeout=60)
    if "mounted" not in done.stdout:
        pytest.skip(f"no overlay can be mounted here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ACTIONS = {
    "load": ("return load('model')", [0, 1, 2, 3]),
    "overwrite": ("save('model', 5, overwrite=True); return load('model')", [5, 5]),
    "overwrite twice": ("[save('model', i, overwrite=True) for i in (5, 6)]; return load('model')", [6, 6]),
    "manager": ("m = vs.CheckpointManager('run', keep=vs.Latest(2)); m.save(4, {}); return steps(m)", [3, 4]),
    "base": ("save('new', 3, base='run/step-3'); return vs.verify('new').ok", True),
    "write": ("vs.write('f.safetensors', {'x': np.ones(1)}); return list(vs.read('f.safetensors'))", ["x"]),
    "seal": ("vs.seal('model'); return vs.verify('model').ok", True),
    "clean": ("return vs.clean('.')", []),
}


@pytest.mark.parametrize("user", ["root", "mapped"])
@pytest.mark.parametrize("name", ACTIONS)
def test_checkpoints_in_a_lower_layer_of_an_overlay(tmp_path, user, name):
    action, expected = ACTIONS[name]
    assert overlaid(tmp_path, user, action) == ["returned", expected, []]
