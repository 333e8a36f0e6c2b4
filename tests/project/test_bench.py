"""The bench: what it keeps and prints, and that it measures what it says."""

import io
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from rich.console import Console
from support import ROOT

import varstore as vs

sys.path.insert(0, str(ROOT))

from tools import readme
from tools.bench import figures, measure, packing, records, report, targets, tasks, trained, workloads
from tools.bench.kinds import KINDS
from tools.bench.packed import PACKED
from tools.bench.peers import PEERS, Safetensors, Varstore
from tools.bench.records import Figure, Record, Row
from tools.bench.worker import Worker

KEPT = [(kind, path) for kind, (at, _) in figures.kept(records.RESULTS).items() for path in sorted(at.glob("*.json"))]
FACTS = {"system", "processor", "processors", "memory GiB", "file system"}


def test_readme_has_the_figures_of_the_newest_record():
    text = readme.README.read_text(encoding="utf-8")
    for name, (folder, shown) in figures.kept(records.RESULTS).items():
        if folder.is_dir():
            wanted = shown(records.newest(folder))
            assert readme.quoted(name, text) == wanted, "run `python -m tools.bench.figures RECORD`"


@pytest.mark.parametrize(("kind", "path"), KEPT, ids=str)
def test_a_kept_record_is_of_a_whole_run(kind, path):
    record = Record.parse(path.read_text(encoding="utf-8"))
    assert record.version == path.stem
    assert record.scale == 1
    assert record.rounds >= 3
    assert set(record.machine) <= FACTS
    assert set(record.rows) <= set(KINDS[kind].tasks)


def test_a_new_record_is_kept_and_quoted_by_one_command(tmp_path):
    """That of a later version takes the place of what README quotes; other figures in README stay."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "0.9.0.json").write_text(a_record(version="0.9.0").as_json())
    (tmp_path / "README.md").write_text("<!-- bench:begin -->\nold\n<!-- bench:end -->\nold\n")
    record = a_record(machine={"system": "Linux", "processors": 2})
    (tmp_path / "run.json").write_text(record.as_json())
    figures.main([str(tmp_path / "run.json")], results=tmp_path / "results", quoting=tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert readme.quoted("bench", text) == figures.figures(record)
    assert text.endswith("<!-- bench:end -->\nold\n")
    assert records.newest(tmp_path / "results") == record


def test_every_row_and_column_of_readme_is_measured():
    assert {*figures.ROWS, *tasks.SLOW} <= set(tasks.TASKS)
    assert set(figures.BESIDE) <= {target.what for target in targets.TARGETS}
    assert set(figures.COLUMNS) <= {peer.name for peer in PEERS}
    assert set(figures.SHARDED_ROWS) == set(KINDS["distributed"].tasks)
    assert set(figures.SHARDED_COLUMNS) == {peer.name for peer in KINDS["distributed"].peers}


def test_no_record_can_be_of_two_kinds():
    every = [task for kind in KINDS.values() for task in kind.tasks]
    assert len(every) == len(set(every))


def test_the_newest_record_is_that_of_the_highest_version(tmp_path):
    for version in ("0.9.0", "0.10.0", "0.2.11"):
        (tmp_path / f"{version}.json").write_text(a_record(version=version).as_json())
    assert records.newest(tmp_path).version == "0.10.0"


def a_record(**fields):
    row = Row(unit="s", figures={"varstore": Figure.of([1.0, 3.0, 2.0])})
    given = {"version": "1.0.0", "date": "2026-01-01", "scale": 1.0, "rounds": 3, "machine": {}, "python": "3.11.7"}
    return Record(**{**given, "packages": {}, "rows": {"save large": row}, "targets": [], **fields})


seconds = st.floats(1e-7, 1e4)
names = st.text(max_size=8)
rows = st.builds(
    Row,
    unit=st.sampled_from(["s", "B"]),
    figures=st.dictionaries(names, st.lists(seconds, min_size=1, max_size=5).map(Figure.of), max_size=4),
)


@given(st.dictionaries(names, rows, max_size=3), st.dictionaries(names, names | st.integers(), max_size=3))
def test_a_record_survives_json(rows, machine):
    record = a_record(rows=rows, machine=machine)
    assert Record.parse(record.as_json()) == record


def test_a_record_with_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="host"):
        Record.parse(a_record().as_json().replace('"date"', '"host": "x", "date"', 1))


def test_a_row_that_got_slower_is_named():
    def row(now, before, unit="s"):
        return Row(unit=unit, figures={"varstore": Figure.of([now]), "varstore, before": Figure.of([before])})

    printed = io.StringIO()
    rows = {"save a": row(1.2, 1.0), "load b": row(1.05, 1.0), "memory c": row(2000.0, 1.0, "B")}
    report.print_comparison(Console(file=printed, width=120), rows)
    lines = {line.split("│")[1].strip(): line for line in printed.getvalue().splitlines() if line.startswith("│")}
    assert "1.20" in lines["save a"]
    assert [name for name, line in lines.items() if "slower" in line] == ["save a"]
    assert "1 of 3 rows more than 10% above" in printed.getvalue()


def test_what_takes_no_time_is_repeated_and_what_takes_long_is_not():
    calls = []
    measure.seconds(lambda: lambda: calls.append("short"), repeats=True)
    assert len(calls) > 1
    calls.clear()
    measure.seconds(lambda: lambda: calls.append("once"), repeats=False)
    assert len(calls) == 1


def test_bytes_are_counted_as_they_are_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(300_000))
    assert 300_000 <= measure.bytes_read((tmp_path / "file").read_bytes) < 310_000


def test_a_process_that_is_timed_finds_its_modules_compiled(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    cache = tmp_path / "cache"
    measure.whole_process(str(cache), "-c", "import module")
    assert list(cache.rglob("module.*.pyc"))
    (tmp_path / "was_compiled.py").write_text("import os, module\nos.stat(module.__cached__)")
    measure.whole_process(str(cache), "-m", "was_compiled")


@pytest.fixture
def bench(tmp_path):
    place = measure.Place(str(tmp_path))
    return tasks.Bench(place=place, scale=0.01, peers=[Varstore()], readies_memory=False, log=print)


def test_save_async_has_its_buffer_before_the_clock_runs(bench, monkeypatch):
    bench._arrays["large"] = {"a": workloads.small(0.01)["layer00000.weight"]}
    begun, save_async = [], vs.save_async
    monkeypatch.setattr(vs, "save_async", lambda *a, **k: begun.append(save_async(*a, **k)) or begun[-1])
    race = tasks.save_async(bench, "large")
    assert [pending.done() for pending in begun] == [True]
    bench.measure(race, "varstore")
    assert len(begun) == 2


def test_four_kibibytes_of_a_foreign_tensor_are_what_they_are_called(bench):
    pytest.importorskip("safetensors")
    path = tasks._foreign(bench, {"a": (3, 2), "weight": (1001, 1024)})
    ours, theirs = (peer.foreign_row(path, "weight", 1000) for peer in (Varstore(), Safetensors()))
    assert ours.nbytes == 4096
    assert ours.tobytes() == theirs.tobytes()
    assert Varstore().foreign_names(path) == ["a", "weight"]


def test_the_models_are_as_large_as_is_said():
    arrays = workloads.resnet(1.0)
    assert len(arrays) == 626
    assert round(sum(array.nbytes for array in arrays.values()) / 1e6) == 16
    assert {name for name, array in arrays.items() if array.shape == ()} == {
        name for name in arrays if name.endswith("num_batches_tracked")
    }


AN_EARLIER_VARSTORE = """
import os
__version__ = "0.0.9"
def save(path, arrays, durable=True): os.mkdir(path)
def load(path): return os.listdir(path)
"""


def test_an_earlier_version_does_the_same_tasks_in_turn(tmp_path):
    """The other side uses its own varstore, although this checkout's lies beside the bench that it runs."""
    package = tmp_path / "site" / "varstore"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(AN_EARLIER_VARSTORE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}/site" exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    printed = run_bench(tmp_path, "--against", str(python), "--task", "load resnet", "--task", "4 KiB")
    record = Record.parse((tmp_path / "run.json").read_text())
    assert record.version == vs.__version__
    assert record.against is not None
    assert record.against["version"] == "0.0.9"
    assert set(record.rows["load resnet"].figures) == {"varstore", "varstore, before"}
    assert set(record.rows["4 KiB of safetensors, bytes read"].figures) == {"varstore"}
    assert "left out: 4 KiB of safetensors: AttributeError" in printed
    assert "of 1 rows more than 10% above the earlier version's" in printed


def test_a_first_look_runs_with_limits_and_peers(tmp_path):
    run_bench(tmp_path, "--peer", "numpy.savez", "--peer", "plain loop", "--task", "resnet", "--task", "ls small")
    record = Record.parse((tmp_path / "run.json").read_text())
    limits = {"save resnet": "system calls", "save resnet, durable": "system calls + one sync"}
    limits["load resnet"] = "system calls"
    for task, limit in limits.items():
        assert set(record.rows[task].figures) == {"varstore", "numpy.savez", "plain loop", f"limit: {limit}"}
    assert set(record.rows["ls small"].figures) == {"varstore ls"}
    assert {target["what"] for target in record.targets} == {
        "save resnet / limit: system calls",
        "varstore ls of small, whole process",
    }
    assert set(record.machine) == FACTS
    assert record.packages["numpy"]
    assert not list(tmp_path.glob("varstore-bench-*"))


def run_bench(directory, *arguments):
    options = ["--quick", "--scale", "0.01", "--directory", str(directory), "--json", str(directory / "run.json")]
    command = [sys.executable, "-m", "tools.bench", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_takes_long_is_measured_in_one_round():
    values = measure.alternate({"slow": lambda: 5.0, "quick": lambda: 0.1}, 3)
    assert values == {"slow": [5.0], "quick": [0.1] * 3}


def packed_record():
    """A record of packed checkpoints in which everything takes 2 s, or half of the 10 GB of the values."""
    rows = {}
    for task in packing.PACKING:
        found = {peer.name: Figure.of([5e9 if "size" in task else 2.0]) for peer in PACKED}
        if "size" in task:
            found[packing.RAW] = Figure.of([1e10])
        elif "slice" in task:
            del found["ZipNN"]
        rows[task] = Row(unit="B" if "size" in task else "s", figures=found)
    return a_record(rows=rows, machine={"system": "Linux", "processors": 2})


def test_a_record_of_packed_checkpoints_is_kept_and_quoted_apart(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "0.9.0.json").write_text(
        a_record(version="0.9.0", machine={"system": "Linux", "processors": 2}).as_json()
    )
    (tmp_path / "README.md").write_text("<!-- packed:begin -->\nold\n<!-- packed:end -->\n")
    (tmp_path / "run.json").write_text(packed_record().as_json())
    figures.main([str(tmp_path / "run.json")], results=tmp_path / "results", quoting=tmp_path / "README.md")
    assert records.newest(tmp_path / "results").version == "0.9.0"
    shown = readme.quoted("packed", (tmp_path / "README.md").read_text())
    assert "--packed --rounds 3" in shown
    assert "|varstore, fast|0.50, 0.50, 0.50|5.00, 5.00, 5.00|5.00, 5.00, 5.00|2000.0, 2000.0, 2000.0|" in shown
    assert "|ZipNN|0.50, 0.50, 0.50|5.00, 5.00, 5.00|5.00, 5.00, 5.00|–, –, –|" in shown


def test_a_record_of_distributed_checkpoints_is_kept_and_quoted_apart(tmp_path):
    found = {"torch DCP": Figure.of([4.0]), "varstore": Figure.of([2.0]), "limit: bare calls": Figure.of([1.0])}
    record = a_record(rows={"load shards": Row(unit="s", figures=found)}, machine={"system": "Linux", "processors": 2})
    (tmp_path / "README.md").write_text("<!-- distributed:begin -->\nold\n<!-- distributed:end -->\n")
    (tmp_path / "run.json").write_text(record.as_json())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "1.0.0.json").write_text(record.as_json())
    figures.main([str(tmp_path / "run.json")], results=tmp_path / "results", quoting=tmp_path / "README.md")
    assert records.newest(tmp_path / "results" / "distributed") == record
    shown = readme.quoted("distributed", (tmp_path / "README.md").read_text())
    assert "--distributed --rounds 3" in shown
    assert "|load 3,000 variables of 4 KiB|2.000|4.000|1.000|" in shown


def test_what_packing_is_to_reach_is_checked():
    medians = {task: {name: f.median for name, f in row.figures.items()} for task, row in packed_record().rows.items()}
    medians["load trained, packed"]["varstore, fast"] = 2.1
    found = {target["what"]: target["met"] for target in targets.check(medians)}
    assert found.pop("size of trained, packed / Orbax")
    assert {what for what, met in found.items() if not met} == {
        f"load trained, packed / {peer.name}" for peer in PACKED if not peer.name.startswith("varstore")
    }
    assert len(found) == 6 * len(trained.TRAINED) - 1


@pytest.mark.filterwarnings("default")  # other people's packages deprecate each other
def test_packed_checkpoints_are_measured(bench, monkeypatch):
    """Each peer that is here gives back what it packed, and a region of it."""
    pytest.importorskip("numcodecs")
    ramp = np.repeat(np.arange(60_000), 4).reshape(4, 300, 200)
    arrays = {"a": ramp.astype(np.float32), "b": ramp.astype(ml_dtypes.bfloat16), "c": np.ones((), np.float32)}
    monkeypatch.setitem(workloads.WORKLOADS, "ramp", lambda _: arrays)
    bench.peers = [peer() for peer in PACKED if not peer.missing()]
    sizes = packing.size(bench, "ramp").candidates
    raw = sizes.pop(packing.RAW)()()
    assert raw == sum(array.nbytes for array in arrays.values())
    assert {"varstore, fast", "varstore, small"} <= {*sizes}
    assert all(0 < size()() < raw for size in sizes.values())
    for name, load in packing.load_packed(bench, "ramp").candidates.items():
        for title, values in ({} if name.startswith("limit") else load()()).items():
            assert np.asarray(values).tobytes() == arrays[title].tobytes()
    for read in packing.slice_packed(bench, "ramp").candidates.values():
        assert np.asarray(read()()).tobytes() == arrays["a"][2, 150].tobytes()
    assert packing.pack(bench, "ramp").candidates.keys() == sizes.keys()


def test_without_the_weights_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("VARSTORE_ENVS", str(tmp_path))
    for name, value in {"PIP_INDEX_URL": "file:///nowhere", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    options = {"path": str(tmp_path), "scale": 1, "peers": [], "kind": "packed", "readies_memory": False}
    worker = Worker(options)
    for task in packing.PACKING:
        assert worker.start(task)["candidates"] == []
    reasons = [line for line in worker.log() if "cannot download" in line]
    assert len(reasons) == len(packing.PACKING)
    assert "left out: pack trained: RuntimeError: pip cannot download the weights: " in reasons[1]
