"""The model of a power cut finds each sync that is left out, and each step that comes too early."""

import pytest

from tools.faults.jobs import Unavailable
from tools.faults.power import Data, Names, Sync, Trace, cut, jobs, record
from tools.faults.scenarios import SCENARIOS

HOME, STAGING, OUT, MARKER = 1, 2, 3, 4
STEPS = {
    "make staging": Names(((HOME, ".c.saving-01234567", STAGING),)),
    "create out": Names(((STAGING, "out", OUT),)),
    "write out": Data(OUT),
    "sync out": Sync(OUT),
    "create marker": Names(((STAGING, "snapshot_done", MARKER),)),
    "sync staging": Sync(STAGING),
    "rename": Names(((HOME, ".c.saving-01234567", None), (HOME, "c", STAGING))),
    "sync home": Sync(HOME),
}


def losses_of(*names, **options):
    steps = [STEPS[name] for name in names]
    outcome = cut(Trace(root=HOME, before={HOME: {}}, steps=steps), **options)
    return {loss for point in outcome.lost for loss in point.losses}


def without(name):
    return [step for step in STEPS if step != name]


def test_the_right_order_survives():
    assert losses_of(*STEPS) == set()


@pytest.mark.parametrize(
    ("left_out", "losses"),
    [("sync out", {"TORN", "FORGOTTEN"}), ("sync staging", {"TORN", "FORGOTTEN"}), ("sync home", {"FORGOTTEN"})],
)
def test_a_sync_that_is_left_out_is_found(left_out, losses):
    assert losses_of(*without(left_out)) == losses


def test_a_sync_of_everything_stands_for_the_others():
    steps = [*(STEPS[name] for name in STEPS if not name.startswith("sync"))]
    steps.insert(-1, Sync(None))
    assert cut(Trace(root=HOME, before={HOME: {}}, steps=[*steps, Sync(HOME)])).lost == []


def test_a_rename_that_comes_too_early_is_found():
    early = [*without("rename")]
    early.insert(early.index("sync out"), "rename")
    assert losses_of(*early) == {"TORN"}


def test_what_is_replaced_goes_only_when_the_new_name_is_durable():
    old, before = 9, {HOME: {"c": 9}, 9: {"out": 8}}
    exchange = Names(((HOME, ".c.saving-01234567", old), (HOME, "c", STAGING)))
    written = [STEPS[name] for name in STEPS if name not in ("rename", "sync home")]
    remove = Names(((old, "out", None),))

    def losses(*last):
        outcome = cut(Trace(root=HOME, before=before, steps=[*written, exchange, *last]))
        return {loss for point in outcome.lost for loss in point.losses}

    assert losses(Sync(HOME), remove) == set()
    assert losses(remove, Sync(HOME)) == {"TORN"}


def test_in_place_the_marker_comes_last():
    target = {"before": {HOME: {"c": STAGING}}, "root": HOME}
    written = [STEPS[name] for name in ("create out", "write out", "sync out", "sync staging", "create marker")]
    ordered = Trace(**target, steps=[*written, STEPS["sync staging"]])
    unordered = Trace(**target, steps=[step for step in ordered.steps if step != Sync(OUT)])
    assert cut(ordered, is_in_place=True).lost == []
    assert cut(unordered, is_in_place=True).lost != []


def test_shards_that_no_index_lists_are_harmless():
    index, shard, old_shard = 5, 6, 7
    steps = [
        *(Names(((HOME, "m-1.safetensors", shard),)), Data(shard), Sync(shard), Sync(HOME)),
        *(Names(((HOME, "m.index.json", index),)), Sync(HOME), Names(((HOME, "m-0.safetensors", None),))),
    ]
    before = {HOME: {"m.index.json": 4, "m-0.safetensors": old_shard}}
    assert cut(Trace(root=HOME, before=before, steps=steps), harmless=r"m-\d\.safetensors").lost == []
    too_early = [*steps[:5], steps[6], steps[5]]
    assert cut(Trace(root=HOME, before=before, steps=too_early), harmless=r"m-\d\.safetensors").lost != []


def recorded(name, place):
    (scenario,) = (scenario for scenario in SCENARIOS if scenario.name == name)
    try:
        return record(scenario, place)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


def test_each_sync_of_a_save_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = recorded("new, durable", tmp_path)
    assert cut(trace).lost == []
    assert cut(trace).points > 300
    changed = {step.file for step in trace.steps if isinstance(step, Data)}
    changed |= {folder for step in trace.steps if isinstance(step, Names) for folder, _, _ in step.changes}
    for synced in {step for step in trace.steps if isinstance(step, Sync) and step.of in changed}:
        steps = [step for step in trace.steps if step != synced]
        assert cut(Trace(root=trace.root, before=trace.before, steps=steps)).lost, synced


def test_a_part_takes_the_small_scenarios():
    part = [job.scenario for job in jobs(whole=False)]
    assert part
    assert len(part) < len([job.scenario for job in jobs(whole=True)])
