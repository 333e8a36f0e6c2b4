"""The command line as a shell sees it: what it prints, where, and its exit status."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from support.crafted import torch_file

import varstore as vs
from varstore.cli import main

COMMANDS = (
    "ls",
    "show",
    "stats",
    "verify",
    "diff",
    "seal",
    "salvage",
    "clean",
    "links",
    "pack",
    "unpack",
    "check-storage",
    "convert",
    "merge",
    "export",
    "check",
    "log",
    "du",
    "report",
    "view",
    "demo",
    "completion",
    "help",
)
MODEL = {
    "encoder/weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "encoder/bias": np.zeros(2, np.float64),
    "step": np.array([7], np.int64),
}


@pytest.fixture
def model(tmp_path):
    return vs.save(tmp_path / "model", MODEL, attributes={"epoch": 3}, variable_attributes={"step": {"unit": "ä"}}).path


def run(*arguments, **options):
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="varstore", **options)


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "NO_COLOR")}
    return {**kept, **changes}


def shell(*arguments, **options):
    """Run the command line as a process of its own, its output in pipes."""
    command = [sys.executable, "-m", "varstore", *map(str, arguments)]
    options.setdefault("env", environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def terminal(*arguments, **changes):
    """Run the command line with a terminal as its stdout and stderr; return what the terminal gets."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "varstore", *map(str, arguments)]
    env = environment(**{"TERM": "xterm-256color", "COLUMNS": "100", **changes})
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    received = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux's way of saying that nobody holds the other end any more
            break
        if not data:
            break
        received += data
    os.close(leader)
    return process.wait(timeout=120), received.decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# ls


def test_ls_prints_plain_columns_into_a_pipe(model):
    result = shell("ls", model)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "name            shape   type     bytes\n"
        "encoder/weight  [2, 3]  float32     24\n"
        "encoder/bias    [2]     float64     16\n"
        "step            [1]     int64        8\n"
        "3 variables                         48\n"
    )


def test_ls_prints_a_coloured_tree_on_a_terminal(model):
    status, text = terminal("ls", model)
    assert status == 0
    assert "\x1b[" in text
    assert plain(text).splitlines() == [
        "name       shape        type     params  share  size",
        "encoder/   2 variables                8  88.9%  40 B",
        "├─ weight  [2, 3]       float32       6  66.7%  24 B",
        "└─ bias    [2]          float64       2  22.2%  16 B",
        "step       [1]          int64         1  11.1%   8 B",
        "3 variables, 9 parameters, 48 B",
        "  float32  1 variable, 6 parameters, 24 B",
        "  float64  1 variable, 2 parameters, 16 B",
        "  int64    1 variable, 1 parameter, 8 B",
    ]


def test_a_terminal_gets_only_the_colours_signs_and_columns_that_it_has(model):
    _, text = terminal("ls", model, NO_COLOR="1", PYTHONIOENCODING="ascii", COLUMNS="30")
    assert text.splitlines()[:5] == [
        "name       type     size",
        "encoder/            40 B",
        "|- weight  float32  24 B",
        "`- bias    float64  16 B",
        "step       int64     8 B",
    ]
    _, text = terminal("stats", model, TERM="dumb", COLUMNS="60")
    assert "\x1b[3" not in text
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["name", *MODEL]
    assert all(len(line) <= 60 for line in text.splitlines()[-4:])


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["encoder*"], ["encoder/weight", "encoder/bias"]),
        (["*bias", "step"], ["encoder/bias", "step"]),
        (["st?p"], ["step"]),
    ],
)
def test_ls_filters_by_patterns(model, patterns, names):
    assert [line.split()[0] for line in run("ls", model, *patterns).output.splitlines()[1:-1]] == names


def test_ls_json_says_all_that_is_known(model):
    listing = json.loads(run("ls", "--json", model).output)
    assert listing["path"] == model
    assert listing["nbytes"] == 48
    assert listing["damaged"] == {}
    step = listing["variables"][2]
    assert step == {
        "name": "step",
        "shape": [1],
        "dtype": "int64",
        "nbytes": 8,
        "path": os.path.join(model, "step"),
        "tied_to": None,
        "attributes": {"unit": "ä"},
        "digests": list(vs.open(model)["step"].digests),
        "regions": [],
    }
    assert [variable["name"] for variable in listing["variables"]] == list(MODEL)


def test_ls_counts_tied_variables_once(tmp_path):
    shared = np.arange(8, dtype=np.int8)
    vs.save(tmp_path / "tied", {"embed": shared, "head": shared})
    assert run("ls", tmp_path / "tied").output.splitlines()[1:] == [
        "embed        [8]    int8      8",
        "head         [8]    int8      8  tied to embed",
        "2 variables                   8",
    ]
    assert json.loads(run("ls", "--json", tmp_path / "tied").output)["variables"][1]["tied_to"] == "embed"


def test_ls_of_one_variables_folder(model):
    folder = os.path.join(model, "encoder", "bias")
    assert [line.split()[0] for line in run("ls", folder).output.splitlines()] == ["name", "encoder/bias", "1"]
    assert run("ls", folder, "*").exit_code == 2
    assert run("ls", "--allow-incomplete", folder).output == run("ls", folder).output
    (Path(model) / "snapshot_done").unlink()
    assert run("ls", "--allow-incomplete", folder).exit_code == 3


def test_ls_of_a_checkpoint_without_manifest_and_without_meta(tmp_path):
    vs.save(tmp_path / "old", MODEL, manifest=False)
    (tmp_path / "old" / "step" / "meta").unlink()
    assert "step            ?       ?            8\n" in run("ls", tmp_path / "old").output
    listed = json.loads(run("ls", "--json", tmp_path / "old").output)["variables"][-1]
    assert (listed["shape"], listed["dtype"]) == (None, None)


def test_ls_salvages_an_unfinished_checkpoint_when_told(model):
    (Path(model) / "snapshot_done").unlink()
    assert run("ls", model).exit_code == 3
    whole = run("ls", model, "--allow-incomplete")
    assert (whole.exit_code, whole.stderr) == (0, "")
    (Path(model) / "step" / "out").unlink()
    result = run("ls", model, "--allow-incomplete")
    assert result.exit_code == 1
    assert "encoder/bias" in result.stdout
    assert "step" not in result.stdout
    assert result.stderr.startswith("damaged: step: ")
    assert list(json.loads(run("ls", "--json", "--allow-incomplete", model).stdout)["damaged"]) == ["step"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "model"
    value = np.zeros(2, np.float32)
    return vs.save(path, {f"layer{i:05}": value.copy() for i in range(10_000)}, durable=False).path


def test_ls_of_ten_thousand_variables_without_importing_rich(large):
    code = (
        "import sys; from varstore.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(any(name.split('.')[0] in ('rich', 'sklearn') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, "ls", large]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 10_002
    assert lines[-1].split() == ["10,000", "variables", "80000"]


def test_a_long_list_is_folded_on_a_terminal(large):
    status, text = terminal("ls", large)
    assert status == 0
    assert plain(text).splitlines()[1:] == [
        "layer{00000..09999}  10,000 × [2]  float32  20,000  100.0%  80.0 kB",
        "10,000 variables, 20,000 parameters, float32, 80.0 kB",
    ]


def test_a_reader_that_closes_the_pipe_is_no_error(large):
    command = [sys.executable, "-m", "varstore", "ls", large]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout.readline().startswith(b"name")
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


# show


def test_show_prints_everything_about_a_variable(model):
    output = shell("show", model, "encoder/weight").stdout
    digest = vs.open(model)["encoder/weight"].digests[0]
    quantiles = vs.stats(model)["encoder/weight"].rows()[-8:]
    assert [label for label, _ in quantiles][::7] == ["q 0.01", "q ±"]
    assert output.splitlines() == [
        "name        encoder/weight",
        "shape       [2, 3]",
        "type        float32 (kFloat in meta)",
        "bytes       24",
        f"folder      {model}/encoder/weight",
        f"xxh3-128    {digest}",
        "count       6",
        "zeros       1",
        "nan         0",
        "inf         0",
        "min         0",
        "max         5",
        "mean        2.5",
        "std         1.70783",
        "norm        7.4162",
        *(f"{label:<12}{value}" for label, value in quantiles),
        "histogram   0 [█   █   █   █   █   █] 5.125",
        "values      0.0 1.0 2.0",
        "            3.0 4.0 5.0",
    ]


def test_show_takes_the_variables_own_folder(model):
    result = run("show", os.path.join(model, "step"))
    assert "name        step\n" in result.output
    assert 'attributes  {"unit": "ä"}\n' in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["{model}/step", "step"], "NAME cannot be given"), ([], "Missing argument")],
)
def test_show_without_the_right_arguments_is_a_usage_error(model, arguments, message):
    result = run("show", *(argument.format(model=model) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


TYPES = [
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float6_e2m3fn),
    *(ml_dtypes.float4_e2m1fn, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2),
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
]


@pytest.mark.parametrize("scalar", TYPES, ids=lambda scalar: np.dtype(scalar).name)
@pytest.mark.parametrize("shape", [(), (0, 3), (4,)], ids=str)
def test_show_works_for_every_type(tmp_path, scalar, shape):
    value = np.resize(np.array([0, 1, 1, 1]).astype(scalar), shape)
    vs.save(tmp_path / "c", {"v": value}, durable=False)
    result = run("show", tmp_path / "c", "v")
    assert result.exit_code == 0, result.output
    facts = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert facts["shape"] == str(list(shape))
    assert facts["type"].startswith(np.dtype(scalar).name)
    assert facts["count"] == str(value.size)
    if value.size == 4:
        assert (facts["zeros"], facts["min"], facts["max"], facts["mean"]) == ("1", "0", "1", "0.75")
        assert len(facts["values"].split()) == 4


def test_show_reads_a_large_variable_with_bounded_memory(tmp_path):
    vs.save(tmp_path / "c", {"one_row": np.ones((1, 32 << 20), np.float32)}, durable=False)
    code = (
        "import resource, sys; from varstore.cli import main; import varstore.cli.show\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "show", str(tmp_path / "c"), "one_row"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "count       33554432" in result.stdout
    assert int(result.stderr) < 64 << 10, f"{result.stderr} KiB more for 128 MiB of values"


def test_show_of_an_oneflow_type_that_numpy_lacks_is_one_line(tmp_path):
    vs.save(tmp_path / "c", {"v": np.zeros(2, np.int8)}, manifest=False)
    meta = tmp_path / "c" / "v" / "meta"
    meta.unlink()
    meta.write_text("shape { dim: 2 } data_type: kTensorBuffer")
    assert ["v", "[2]", "kTensorBuffer", "2"] in [
        line.split() for line in run("ls", tmp_path / "c").output.splitlines()
    ]
    result = run("show", tmp_path / "c", "v")
    assert result.exit_code == 3
    assert "kTensorBuffer" in result.stderr


# verify, diff, seal, clean


def damage(path):
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_answers_with_its_exit_status(model, tmp_path):
    other = vs.save(tmp_path / "other", {"a": np.ones(3)}).path
    result = shell("verify", model, other)
    assert result.returncode == 0
    assert [line.split(": ")[:2] for line in result.stdout.splitlines()] == [[model, "ok"], [other, "ok"]]
    damage(Path(model) / "step" / "out")
    result = shell("verify", model, other)
    assert result.returncode == 1
    assert f"{model}: 1 problem in" in result.stdout
    assert f"{other}: ok" in result.stdout
    assert "'step'" in result.stdout
    result = shell("verify", model, f"{tmp_path}/nothing", other)
    assert result.returncode == 3
    assert f"{model}: 1 problem in" in result.stdout
    assert f"{other}: ok" in result.stdout
    assert result.stderr.startswith(f"varstore: {tmp_path}/nothing: there is no checkpoint here")
    assert result.stderr.count("\n") == 1


def test_verify_reports_a_torn_manifest_and_a_missing_marker(model):
    manifest = Path(model) / "manifest"
    damage(manifest)
    assert run("verify", model).exit_code == 1
    os.remove(Path(model) / "snapshot_done")
    result = run("verify", model)
    assert result.exit_code == 1
    assert "snapshot_done" in result.output


def test_verify_shows_progress_and_colour_on_a_terminal_only(model):
    status, text = terminal("verify", model)
    assert status == 0
    assert "verifying" in plain(text)
    assert "\x1b[32m" in text
    assert "verifying" not in shell("verify", model).stderr
    damage(Path(model) / "step" / "out")
    status, text = terminal("verify", model)
    assert status == 1
    assert "\x1b[31m" in text


def test_diff_lists_names_and_answers_with_its_exit_status(model, tmp_path):
    same = vs.save(tmp_path / "same", vs.open(model)).path
    result = shell("diff", model, same)
    assert (result.returncode, result.stdout) == (0, f"{model} -> {same}: 3 unchanged\n")
    changed = {"encoder/weight": MODEL["encoder/weight"] + 1, "encoder/bias": np.zeros(3), "new": np.ones(1)}
    other = vs.save(tmp_path / "other", changed, attributes={"epoch": 3}).path
    result = shell("diff", model, other)
    assert result.returncode == 1
    assert [line.strip() for line in result.stdout.splitlines()[1:]] == [
        "added    new",
        "removed  step",
        "changed  encoder/weight: values",
        "changed  encoder/bias: [2] float64 -> [3] float64",
    ]


def test_seal_records_a_change_by_hand(model):
    for file in (Path(model) / "step").iterdir():
        file.unlink()
    (Path(model) / "step").rmdir()
    assert run("verify", model).exit_code == 1
    result = shell("seal", model)
    assert result.returncode == 0
    assert "removed  step" in result.stdout
    assert run("verify", model).exit_code == 0


def test_clean_removes_what_a_killed_save_left(tmp_path):
    code = (
        "import os, sys, numpy as np, varstore as vs\n"
        "vs.save(sys.argv[1], {'a': np.ones(9)}, progress=lambda done, total: done and os._exit(9))"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False, timeout=120)
    assert died.returncode == 9
    (left,) = tmp_path.iterdir()
    result = shell("clean", tmp_path)
    assert (result.returncode, result.stdout) == (0, f"removed {left}\n")
    assert list(tmp_path.iterdir()) == []
    assert shell("clean", tmp_path).stdout == ""


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{there}/nothing"], "there is no checkpoint here"),
        (["ls", "{there}"], "no 'snapshot_done'"),
        (["ls", "{model}", "decoder*"], "decoder*"),
        (["show", "{model}", "encoder/wieght"], "Did you mean 'encoder/weight'"),
        (["verify", "{there}/nothing"], "there is no checkpoint here"),
        (["seal", "{there}"], "no 'snapshot_done'"),
        (["diff", "{model}", "{there}/nothing"], "there is no checkpoint here"),
        (["clean", "{there}/nothing"], "no such directory"),
        (["ls", "{model}/manifest"], "the format is unknown"),
        (["ls", "x" * 300], "File name too long"),
        (["demo", "{model}/manifest"], "manifest"),
    ],
)
def test_errors_are_one_line_on_stderr(model, tmp_path, arguments, message):
    result = shell(*(argument.format(model=model, there=tmp_path) for argument in arguments))
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("varstore: ")
    assert message in line


def hole(path):
    """Make a checkpoint of a variable that is a hole, which would take minutes to read."""
    vs.save(path, {"v": np.zeros(1, np.int8)}, manifest=False)
    for name, text in (("out", ""), ("meta", f"shape {{ dim: {1 << 40} }} data_type: kInt8")):
        file = path / "v" / name
        file.unlink()
        file.write_text(text)
    os.truncate(path / "v" / "out", 1 << 40)


@pytest.mark.parametrize("arguments", [["nonsense"], ["ls"], ["diff", "one"], ["ls", "--colour", "x"], ["verify"]])
def test_wrong_usage_is_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: varstore" in result.stderr


@pytest.mark.parametrize("arguments", [["seal"], ["stats"], ["show", "v"]], ids=lambda given: given[0])
def test_interrupting_is_130_without_a_traceback(tmp_path, arguments):
    hole(tmp_path / "c")
    command = [sys.executable, "-m", "varstore", arguments[0], str(tmp_path / "c"), *arguments[1:]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment())
    while str(tmp_path / "c" / "v" / "out") not in open_files(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == b""
    process.stderr.close()


def open_files(pid):
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    return found


def test_names_cannot_send_control_codes_to_a_terminal(tmp_path):
    name = "evil\x1b[31m\nname[red]"
    path = vs.save(tmp_path / "c", {name: np.zeros(1)}).path
    shown = r"evil\x1b[31m"
    for text in (terminal("ls", path)[1], run("ls", path).output, run("show", path, name).output):
        assert shown in text
        assert "evil\x1b" not in text
    damage(vs.open(path)[name].path + "/out")
    assert "\x1b[31mname" not in run("verify", path).output


def test_a_terminal_without_the_character_gets_its_escape(tmp_path):
    path = vs.save(tmp_path / "c", {"权重": np.zeros(1)}).path
    result = shell("ls", path, env=environment(PYTHONIOENCODING="latin-1"))
    assert (result.returncode, result.stderr) == (0, "")
    assert r"\u6743\u91cd" in result.stdout


# help


def test_help_lists_every_command_and_the_exit_codes():
    output = shell("--help").stdout
    listed = re.findall(r"^  ([\w-]+) {2,}", output.partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS
    assert "Exit status: 0 if" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command):
    result = run(command, "-h")
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert f"  varstore {command} " in result.output


def test_version():
    assert shell("--version").stdout == run("-V").stdout == f"varstore, version {vs.__version__}\n"


def test_convert_goes_through_other_formats_and_back(tmp_path, model):
    there = shell("convert", model, tmp_path / "m.safetensors")
    assert there.returncode == 0, there.stderr
    assert there.stdout == f"{model} (varstore) -> {tmp_path}/m.safetensors (safetensors): 3 tensors, 48 bytes\n" + (
        "left out, because safetensors holds nothing of an array but its values: step: unit\n"
    )
    back = run("convert", tmp_path / "m.safetensors", tmp_path / "back", "--include", "enc*", "--rename", "encoder=e")
    assert back.exit_code == 0
    np.testing.assert_array_equal(vs.load(tmp_path / "back")["e/weight"], MODEL["encoder/weight"])
    assert set(vs.open(tmp_path / "back")) == {"e/weight", "e/bias"}


def test_convert_says_what_was_left_out(tmp_path):
    vs.write(tmp_path / "m.pt", {"epoch": 3, "w": np.ones(2, np.float32)})
    result = run("convert", tmp_path / "m.pt", tmp_path / "m.npz", "--dtype", "float16")
    assert result.exit_code == 0
    assert result.stdout.endswith(
        "1 tensor, 4 bytes\nchanged type, float32 -> float16: w\nleft out, because numpy holds only arrays: epoch\n"
    )
    assert vs.read(tmp_path / "m.npz")["w"].dtype == np.float16


def test_convert_names_the_classes_that_it_does_not_know_on_one_line(tmp_path):
    torch_file(tmp_path / "m.pt", b"}(X\1\0\0\0acfoo\nBar\n)RX\1\0\0\0bcfoo\nBar\n)\x81X\1\0\0\0ccx\ty\nB\x1b\nu")
    result = run("convert", tmp_path / "m.pt", tmp_path / "m")
    assert result.exit_code == 0
    assert "unknown to varstore, and not imported: foo.Bar (2), x\\ty.B\\x1b (1)\n" in result.stdout
    assert "left out, because varstore does not know its class: a, b, c\n" in result.stdout


def test_convert_of_many_zeros_says_which_flag_permits_it(tmp_path):
    np.savez_compressed(tmp_path / "z.npz", w=np.zeros(70_000_000, np.uint8))
    refused = run("convert", tmp_path / "z.npz", tmp_path / "z.npy")
    flag = re.search(r"--limit \d+", refused.stderr)[0]
    assert run("convert", tmp_path / "z.npz", tmp_path / "z.npy", *flag.split()).exit_code == 0


def test_convert_refuses_what_it_cannot_do(tmp_path, model):
    assert run("convert", model, tmp_path / "x.npz", "--rename", "encoder").exit_code == 2
    taken = shell("convert", model, model)
    assert taken.returncode == 3
    assert taken.stderr == f"varstore: {model}: source and target are the same\n"
    unknown = shell("convert", model, tmp_path / "x.h5")
    assert unknown.returncode == 3
    assert "the format to write cannot be determined from the suffix" in unknown.stderr
    assert not (tmp_path / "x.h5").exists()
