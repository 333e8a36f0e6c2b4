"""The report in a real browser: what a person does with it, what a stranger's names do to it, and what it may cost."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings, strategies as st
from support import ROOT
from support.attacks import ATTACKS

import varstore as vs
from tools.browser import CHROMIUM, browser as running
from varstore.cli import main
from varstore.view.page import document
from varstore.view.report import write_report
from varstore.view.survey import survey

AXE = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs"), "axe-core/node_modules/axe-core/axe.min.js")
PAGE = Path(vs.__file__).parent / "view" / "page"
OPEN = "document.querySelector('#detail h2')?.textContent"
ROWS = "[...document.querySelectorAll('#rows [role=row]')].map((row) => row.querySelector('.text')?.textContent)"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the path of a checkpoint with something of everything."""
    rng = np.random.default_rng(0)
    variables = {
        f"blocks/{block}/{name}": rng.normal(size=shape).astype(np.float32) * (block + 1)
        for block in range(12)
        for name, shape in {"attention/qkv": (70, 90), "mlp/up": (16, 100), "mlp/bias": (16,)}.items()
    }
    variables["blocks/3/mlp/bias"][:] = 0
    variables["blocks/4/attention/qkv"][5, 7] = np.nan
    variables["blocks/5/attention/qkv"][1] = 0
    variables["head"] = np.ones((4, 4), ml_dtypes.bfloat16)
    variables["tied"] = variables["blocks/0/attention/qkv"]
    path = tmp_path_factory.mktemp("report") / "model"
    about = {"blocks/0/mlp/up": {"unit": "ä"}}
    return vs.save(path, variables, attributes={"epoch": 3}, variable_attributes=about).path


@pytest.fixture(scope="module")
def report(model):
    target = f"{model}.html"
    write_report(model, target)
    return f"file://{target}"


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """Return the report on a later checkpoint beside the first."""
    variables = vs.load(model)
    for block, by in ((11, 0.5), (1, 0.1), (7, 0.01)):
        for name in (f"blocks/{block}/attention/qkv", f"blocks/{block}/mlp/up"):
            variables[name] = variables[name] * np.float32(1 + by)
    variables["extra"] = np.zeros(2)
    del variables["head"]
    later = tmp_path_factory.mktemp("report") / "later"
    vs.save(later, variables, base=model, attributes={"epoch": 4})
    write_report(os.fspath(later), f"{later}.html", compare_with=model)
    return f"file://{later}.html"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the report on a run whose metrics have names of strangers."""
    folder = tmp_path_factory.mktemp("report") / "run"
    frozen, moving = np.ones((30, 30)), np.zeros(8)
    with vs.CheckpointManager(folder, durable=False) as manager:
        for step in range(0, 60, 10):
            moving = moving + 1
            metrics = {
                "loss": 1 / (step + 1),
                "odd": np.nan if step == 30 else step,
                **dict.fromkeys(ATTACKS[::5], step),
            }
            manager.save(step, {"frozen": frozen, "moving": moving}, metrics=metrics)
    write_report(os.fspath(folder), f"{folder}.html", steps=4)
    return f"file://{folder}.html"


def data_in(path):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text(), re.DOTALL)
    return json.loads(text[1])


def ends_well(page, url):
    """Check that a page said nothing, and asked for nothing but itself and what it has in it."""
    assert page.complaints() == []
    assert [address for address in page.requests() if not address.startswith("data:")] == [url]
    page.close()


@needs_browser
def test_a_person_finds_what_they_look_for(browser, report):
    page = browser.page(report)
    assert page("document.title") == "model – varstore"
    assert "38" in page("document.querySelector('#totals').textContent")
    assert page("document.querySelector('#count').textContent") == "38 variables"

    page.click("#fold")
    assert page(ROWS) == ["blocks", "head", "tied"]
    page.click("#rows .twist")
    assert page(ROWS)[:4] == ["blocks", "0", "1", "2"]
    page.click("#unfold")
    assert page(ROWS)[:6] == ["blocks", "0", "attention/qkv", "mlp", "up", "bias"]

    page.click("#search")
    page.press(*"7/MLP")
    assert page(ROWS) == ["blocks", "7", "mlp", "up", "bias"]
    assert page("document.querySelector('#count').textContent") == "2 of 38 variables"
    page.press("Escape")
    assert page("document.querySelector('#search').value") == ""

    page.click("#as-list")
    page.click("[data-key=norm]")
    assert page("document.querySelector('[aria-sort=descending]').textContent") == "Norm"
    assert page(ROWS)[0] == "blocks/11/attention/qkv"
    page.click("[data-key=norm]")
    assert page(ROWS)[0] == "blocks/3/mlp/bias"

    page.click(".chips .bad")
    assert page(ROWS) == ["blocks/4/attention/qkv"]
    page.click("#rows .line")
    assert page(OPEN) == "blocks/4/attention/qkv"
    assert "1 nan" in page("document.querySelector('#detail').textContent")
    before = page("document.querySelector('#detail .bars').getAttribute('d')")
    page.click("#log")
    assert page("document.querySelector('#log').getAttribute('aria-pressed')") == "true"
    assert page("document.querySelector('#detail .bars').getAttribute('d')") != before
    pixels = "document.querySelector('.heat').toDataURL()"
    assert page("document.querySelector('.heat').width") == 64
    means = page(pixels)
    page.click("#heat-magnitudes")
    assert page(pixels) != means
    light = page("getComputedStyle(document.body).backgroundColor")
    magnitudes = page(pixels)
    page.click("#theme")
    page.click("#theme")
    assert page("document.querySelector('#theme').textContent") == "Theme: dark"
    assert page("getComputedStyle(document.body).backgroundColor") != light
    assert page(pixels) != magnitudes
    ends_well(page, report)


@needs_browser
def test_the_keyboard_is_enough(browser, report):
    page = browser.page(report)
    page.press("/", *"5/att", "Enter")
    assert page("document.activeElement.id") == "tree"
    page.press("End", "Enter")
    assert page(OPEN) == "blocks/5/attention/qkv"
    assert "1 dead row" in page("document.querySelector('#detail').textContent")
    active = "document.getElementById(document.querySelector('#tree').getAttribute('aria-activedescendant'))"
    assert page(f"{active}.querySelector('.text').textContent") == "attention/qkv"
    page.press("Escape")
    assert page("document.querySelector('#detail').hidden")
    page.press("/", "Escape", "Home", "ArrowLeft")
    assert page(ROWS) == ["blocks", "head", "tied"]
    page.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft")
    assert page(f"{active}.querySelector('.text').textContent") == "0"
    page.press("PageDown", "PageDown", "End")
    assert page(f"{active}.querySelector('.text').textContent") == "tied"
    box = page(f"(({{top, bottom}}) => [top, bottom, innerHeight])({active}.getBoundingClientRect())")
    assert 0 < box[0] < box[1] <= box[2]
    page.press("Enter", "t", "l")
    assert "tied to blocks/0/attention/qkv" in page("document.querySelector('#detail').textContent")
    assert page("document.querySelector('#log').getAttribute('aria-pressed')") == "true"
    page("document.activeElement.blur(); document.body.focus(); scrollTo(0, 0)")
    reached = set()
    for _ in range(60):
        page.press("Tab")
        reached.add(
            page("document.activeElement.id || document.activeElement.dataset.key || document.activeElement.tagName")
        )
    assert {"search", "as-list", "fold", "theme", "tree", "params", "log", "heat-means"} <= reached
    ends_well(page, report)


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_a_phone_gets_a_sheet(browser, report, width):
    page = browser.page(report, width=width, height=844, touch=width < 500)
    page.click("#rows .line:nth-child(3)")
    assert page("getComputedStyle(document.querySelector('#detail')).position") == (
        "fixed" if width < 500 else "sticky"
    )
    assert page("document.documentElement.scrollWidth") == width
    page.press("Escape")
    assert page("document.documentElement.scrollWidth") == width
    ends_well(page, report)


@needs_browser
def test_what_moved_most_comes_first(browser, compared):
    page = browser.page(compared)
    said = page("document.querySelector('#comparison').textContent")
    assert "6 variables of 37 that both have moved" in said
    assert "Only in later: 1" in said
    assert "Only in model: 1" in said
    movers = page("[...document.querySelectorAll('.movers .text')].map((found) => found.textContent)")
    assert movers == ["blocks/11", "blocks/1", "blocks/7"]
    assert page("document.querySelector('.strip').width") == len(movers)
    page.click("#fold")
    page.click(".movers button")
    assert page(OPEN).startswith("blocks/11/")
    assert page("document.querySelector('#rows .chosen .moved').textContent") == "0.5000"
    assert page("document.querySelectorAll('#detail .ghost').length") == 1
    page.click(".strip")
    assert page(OPEN).startswith("blocks/1/")
    page.click("[data-key=moved]")
    page.click("#as-list")
    page("scrollTo(0, 0)")
    page.settle()
    assert [name.split("/")[1] for name in page(ROWS)[:6]] == ["11", "11", "1", "1", "7", "7"]
    ends_well(page, compared)


@needs_browser
def test_a_run_has_curves(browser, run):
    page = browser.page(run)
    charts = page("[...document.querySelectorAll('#run figure')].map((found) => found.textContent)")
    assert len(charts) == 2 + len(ATTACKS[::5]) + 2
    assert charts[-1].startswith("disk7.58 kB of 43.6 kB")
    loss, odd = (page(f"document.querySelectorAll('#run .curve')[{at}].getAttribute('d')") for at in (0, 1))
    assert (loss.count("M"), loss.count("L"), odd.count("M"), odd.count("L")) == (1, 5, 2, 3)
    page.click("#rows .line:last-child")
    assert page("document.querySelectorAll('#detail .curve').length") == 1
    page.click("#run summary")
    assert page("document.querySelectorAll('#run tbody tr').length") == 6
    rows = {row["name"]: row["norms"] for row in data_in(run.removeprefix("file://"))["variables"]}
    assert rows["frozen"] == [30.0] * 4
    assert rows["moving"] == pytest.approx([8**0.5 * step for step in (1, 3, 4, 6)], rel=1e-5)
    ends_well(page, run)


@needs_browser
@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: bash tools/make_envs.sh axe-core")
@pytest.mark.parametrize(("what", "dark"), [("report", False), ("report", True), ("compared", False), ("run", True)])
def test_there_is_no_serious_accessibility_fault(browser, request, what, dark):
    page = browser.page(request.getfixturevalue(what), dark=dark)
    page("for (const box of document.querySelectorAll('details')) box.open = true")
    page.click("#rows .line:last-child")
    page(AXE.read_text() + "; 0")
    found = page(
        "axe.run().then((found) => found.violations.map(({id, impact, nodes}) => [id, impact, nodes[0].html]))"
    )
    assert [fault for fault in found if fault[1] in ("serious", "critical")] == []
    page.close()


@needs_browser
def test_what_strangers_wrote_stays_text(browser, tmp_path):
    assert len(set(ATTACKS)) == 200
    source, target = tmp_path / "<b>x&lt;.safetensors", tmp_path / "report.html"
    vs.write(source, dict.fromkeys(ATTACKS, np.ones((2, 2))), metadata={text: text for text in ATTACKS})
    write_report(os.fspath(source), os.fspath(target))
    page = browser.page(f"file://{target}")
    page.click("#unfold")
    page.click("#as-list")
    names = page(
        "Array.from({length: 200}, () => { for (const key of ['Enter', 'ArrowDown'])"
        "document.querySelector('#tree').dispatchEvent(new KeyboardEvent('keydown', {key}));"
        "return document.querySelector('#detail h2').textContent })"
    )
    assert {text for text in ATTACKS if text.isprintable()} <= set(names)
    assert len(set(names)) == 200
    assert not re.search("[\u2028-\u202e\u2066-\u2069]", page("document.documentElement.outerHTML"))
    page("for (const box of document.querySelectorAll('details')) box.open = true")
    page.click("#search")
    page.press(*"<script>")
    page.settle()
    assert page("document.title").startswith("<b>x&lt;.safetensors")
    assert page("document.querySelectorAll('script, style, img, iframe, a[href^=j], svg script, base').length") == 3
    assert page("({}).polluted === undefined")
    ends_well(page, f"file://{target}")


@settings(max_examples=50)
@given(st.text(), st.text())
@example("</script>", "<!--<script>\u2028&lt;")
def test_no_text_ends_the_data(name, value):
    page = document({"name": name, "value": value})
    inside = re.search(r'id="data">([^<>&\u2028\u2029]*)</script>\n<script>', page)
    assert inside
    assert json.loads(inside[1]) == {"name": name, "value": value}


def test_the_page_parses_no_html_and_asks_nobody():
    scripts = "".join(path.read_text() for path in PAGE.glob("*.js"))
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "http:",
        "https:",
    ):
        assert way not in scripts.replace("http://www.w3.org/2000/svg", "")
    markup = (PAGE / "page.html").read_text() + (PAGE / "page.css").read_text()
    addresses = re.findall(r"(?:src|href|url|@import)\s*[=( ]\s*[\"']?([^\"'>]+)", markup)
    assert sorted(addresses) == ["#tree", "data:,"]
    assert " style=" not in markup
    assert not re.search(r"\son\w+=", markup)


def test_the_policy_lets_only_the_page_itself_run(report):
    text = Path(report.removeprefix("file://")).read_text()
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", rules[kind]) for kind in ("script-src", "style-src"))


@needs_browser
def test_ten_thousand_variables_cost_little(browser, tmp_path):
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    variables = {f"layers/{number // 4}/block/part_{number % 4}": vector + number for number in range(9500)}
    variables |= {f"layers/{number}/attention/matrix": matrix * (number + 1) for number in range(500)}
    source, target = tmp_path / "many.safetensors", tmp_path / "many.html"
    vs.write(source, variables)
    count, nbytes = write_report(os.fspath(source), os.fspath(target))
    assert (count, nbytes) == (10_000, target.stat().st_size)
    assert nbytes <= 20_000_000
    assert sum("map" in variable for variable in data_in(target)["variables"]) == 500
    page = browser.page(f"file://{target}", height=2000)
    (painted,) = page("performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)")
    assert painted < 2000
    page.click("#unfold")
    page("scrollTo(0, 100000)")
    page.settle()
    page.click("#rows .line:nth-child(20)")
    assert page("document.querySelectorAll('*').length") <= 2000
    assert page("document.querySelectorAll('#rows .line').length") > 50
    ends_well(page, f"file://{target}")


def test_the_data_are_what_stats_says(model, tmp_path):
    data = survey(model, vs.read(model))
    rows = {row["name"]: row for row in data["variables"]}
    found = vs.stats(model)
    for name, row in rows.items():
        assert {key: row[key] for key in ("zeros", "nan", "inf", "min", "max", "mean", "std", "norm")} == {
            key: getattr(found[name], key) for key in ("zeros", "nan", "inf", "min", "max", "mean", "std", "norm")
        }
        assert row["marks"] == list(found[name].marks)
        assert sum(row["bins"][2]) == row["count"] - row["nan"] - row["inf"]
    assert data["variables"][rows["tied"]["tied"]]["name"] == "blocks/0/attention/qkv"
    assert json.loads(data["attributes"]) == {"epoch": 3}
    assert json.loads(rows["blocks/0/mlp/up"]["attributes"]) == {"unit": "ä"}
    assert rows["blocks/0/mlp/up"]["map"]["blocks"] == [16, 64]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".zarr", ""])
def test_whatever_read_opens_has_a_report(tmp_path, suffix):
    source = tmp_path / f"model{suffix}"
    values = {
        "a.w": np.eye(3),
        "big": np.array([2**60, np.iinfo(np.int64).min]),
        "empty": np.zeros((0, 2)),
        "one": np.array(True),
    }
    vs.write(source, values)
    target = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", str(source), "-o", str(target)], prog_name="varstore")
    assert (done.exit_code, done.output) == (0, f"{target}: 4 variables, {target.stat().st_size:,} bytes\n")
    rows = {row["name"].replace("/", "."): row for row in data_in(target)["variables"]}
    assert rows["big"]["max"] == str(2**60)
    assert rows["empty"]["min"] is None
    assert rows["a.w"]["bins"] == [0.0, 1 / 32, [6, *([0] * 31), 3]]


def test_values_that_are_no_numbers_are_said_so(tmp_path):
    np.savez(tmp_path / "text.npz", text=np.array(["a", "b"]), numbers=np.arange(3))
    try:
        rows = survey("text.npz", vs.read(tmp_path / "text.npz"))["variables"]
    except vs.VarstoreError:
        pytest.skip("not read at all")
    assert [("left" in row) for row in rows] == [True, False]


def test_a_report_replaces_a_file_whole_or_not_at_all(model, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("before")
    with monkeypatch.context() as patched:
        patched.delattr(os, "replace")
        with pytest.raises(AttributeError):
            write_report(model, os.fspath(target))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "before"
    write_report(model, os.fspath(target))
    assert target.read_text().startswith("<!doctype html>")
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    done = CliRunner().invoke(main, ["report", str(tmp_path / "nothing"), "-o", str(target)], prog_name="varstore")
    assert done.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with monkeypatch.context() as patched:
        patched.setattr("varstore.view.report.survey", None)  # nothing is read for a report that cannot be written
        done = CliRunner().invoke(main, ["report", model, "-o", str(tmp_path / "no" / "r.html")], prog_name="varstore")
    assert (done.exit_code, done.stderr) == (3, f"varstore: {tmp_path / 'no'}: there is no such directory\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", _full)
        done = CliRunner().invoke(main, ["report", model, "-o", str(target)], prog_name="varstore")
    assert (done.exit_code, done.stderr) == (3, f"varstore: {target}: writing failed: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def _full(temporary, target):
    raise OSError(28, os.strerror(28), temporary)


def _umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
