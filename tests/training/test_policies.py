"""The policies against the dumbest statement of each, for random series of saves, metrics and clocks."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any

import pytest
from hypothesis import given, strategies as st

from varstore.errors import UsageError
from varstore.training.policies import (
    AtSteps,
    Best,
    EverySeconds,
    EverySteps,
    Keep,
    KeepEverySteps,
    KeepIf,
    Latest,
    OnePerMinutes,
    Pinned,
    Saved,
    SaveIf,
    retain,
)

pytestmark = pytest.mark.core

metrics = st.dictionaries(st.sampled_from(["loss", "acc"]), st.floats() | st.sampled_from([0.0, 1.0]), max_size=2)


@st.composite
def series(draw: Any) -> list[Saved]:
    steps = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    times = [draw(st.integers(0, 600)) for _ in steps]
    if draw(st.booleans()):
        times.sort()
    return [Saved(step=step, time=float(time), metrics=draw(metrics)) for step, time in zip(steps, times, strict=True)]


def model_best(saves: list[Saved], n: int, metric: str, mode: str, without: bool) -> set[int]:
    """Take the best n times: look at all that are left and find one that none beats."""

    def beats(a: Saved, b: Saved) -> bool:
        x, y = a.metrics[metric], b.metrics[metric]
        if math.isnan(x) or math.isnan(y):
            return (math.isnan(y) and not math.isnan(x)) or (math.isnan(x) and math.isnan(y) and a.step > b.step)
        if x == y:
            return a.step > b.step
        return x < y if mode == "min" else x > y

    left = [s for s in saves if metric in s.metrics]
    kept = set()
    while left and n:
        best = next(s for s in left if not any(beats(o, s) for o in left))
        kept.add(best.step)
        left.remove(best)
        n -= 1
    has_none = not any(metric in s.metrics for s in saves)
    return kept | ({s.step for s in saves if metric not in s.metrics} if without or has_none else set())


def model_windows(saves: list[Saved], minutes: float) -> set[int]:
    """Go through the steps; a clock that went back counts as enough time."""
    kept: list[Saved] = []
    for save in saves:
        if not kept or save.time < kept[-1].time or save.time >= kept[-1].time + minutes * 60:
            kept.append(save)
    return {save.step for save in kept}


small = st.integers(1, 5)
MODELS = st.one_of(
    small.map(lambda n: (Latest(n), lambda s: {x.step for x in s if sum(y.step > x.step for y in s) < n})),
    small.map(lambda n: (KeepEverySteps(n), lambda s: {x.step for x in s if x.step / n == x.step // n})),
    small.map(lambda n: (OnePerMinutes(n / 2), lambda s: model_windows(s, n / 2))),
    st.sets(st.integers(0, 60)).map(lambda p: (Pinned(p), lambda s: {x.step for x in s} & p)),
    small.map(lambda n: (KeepIf(lambda x: x.step > 10 * n), lambda s: {x.step for x in s if x.step > 10 * n})),
    st.tuples(small, st.sampled_from(["loss", "acc"]), st.sampled_from(["min", "max"]), st.booleans()).map(
        lambda a: (Best(a[1], a[0], a[2], a[3]), lambda s: model_best(s, *a))
    ),
)


@given(saves=series(), models=st.lists(MODELS, min_size=1, max_size=4))
def test_what_is_kept_is_the_union_of_what_each_says_and_the_latest(saves: list[Saved], models: Any) -> None:
    keep: Keep = reduce(or_, (policy for policy, _ in models))
    expected = set().union(*(model(saves) for _, model in models))
    expected |= {save.step for save in saves[-1:]}
    kept = retain(keep, reversed(saves))
    assert set(kept) == expected
    assert bool(kept) == bool(saves)
    for step, reasons in kept.items():
        said = [str(policy) for policy, model in models if step in model(saves)]
        assert list(reasons) == (said or ["the latest"])


@given(saves=series(), models=st.lists(MODELS, min_size=1, max_size=4))
def test_deleting_what_goes_changes_nothing_of_what_stays(saves: list[Saved], models: Any) -> None:
    keep: Keep = reduce(or_, (policy for policy, _ in models))
    kept = retain(keep, saves)
    left = [save for save in saves if save.step in kept]
    assert set(retain(keep, left)) == set(kept)


@given(saves=series())
def test_without_a_policy_all_stay(saves: list[Saved]) -> None:
    assert list(retain(None, saves)) == [save.step for save in saves]


WHEN = {
    "every 3 steps": (EverySteps(3), [0, 3, 6, 9]),
    "at steps": (AtSteps([2, 5, 99]), [2, 5]),
    "every 20 seconds": (EverySeconds(20), [0, 2, 4, 6, 8]),
    "every 25 seconds": (EverySeconds(25), [0, 3, 6, 9]),
    "a function": (SaveIf(lambda step, now, last: now >= 70), [7, 8, 9]),
    "any of": (AtSteps([1]) | EverySteps(4) | AtSteps([9]), [0, 1, 4, 8, 9]),
    "seconds after any": (EverySeconds(30) | AtSteps([4]), [0, 3, 4, 7]),
}


@pytest.mark.parametrize(("policy", "steps"), WHEN.values(), ids=WHEN.keys())
def test_when_in_a_loop_of_ten_seconds_a_step(policy: Any, steps: list[int]) -> None:
    last, saved = None, []
    for step in range(10):
        if policy.should_save(step, step * 10.0, last):
            last = Saved(step=step, time=step * 10.0)
            saved.append(step)
    assert saved == steps


WRONG: dict[str, Any] = {
    "EverySteps.n": [lambda: EverySteps(0), lambda: EverySteps(2.5), lambda: EverySteps("3")],
    "EverySeconds.seconds": [lambda: EverySeconds(-1), lambda: EverySeconds(math.nan), lambda: EverySeconds("60")],
    "AtSteps.steps": [lambda: AtSteps(5), lambda: AtSteps([1.5]), lambda: AtSteps("10")],
    "SaveIf.function": [lambda: SaveIf(3)],
    "Latest.n": [lambda: Latest(0), lambda: Latest(None), lambda: Latest(1.0)],
    "Best.n": [lambda: Best("loss", 0), lambda: Best("loss", "max")],
    "Best.metric": [lambda: Best(None), lambda: Best(["loss"])],
    "Best.mode": [
        *(lambda: Best("loss", mode="least"), lambda: Best("accuracy"), lambda: Best("f1"), lambda: Best("loss_scale")),
        *(lambda: Best("loss", mode=["min"]), lambda: Best("")),
    ],
    "KeepEverySteps.n": [lambda: KeepEverySteps(0), lambda: KeepEverySteps(0.5)],
    "OnePerMinutes.minutes": [lambda: OnePerMinutes(0), lambda: OnePerMinutes([1])],
    "Pinned.steps": [lambda: Pinned(1), lambda: Pinned([None])],
    "KeepIf.function": [lambda: KeepIf("loss < 1")],
}


@pytest.mark.parametrize(
    ("field", "make"), [pytest.param(field, make, id=field) for field, makes in WRONG.items() for make in makes]
)
def test_policies_that_mean_nothing_are_refused_by_the_name_of_the_argument(field: str, make: Any) -> None:
    with pytest.raises(UsageError) as refused:
        make()
    assert refused.value.field == field


@pytest.mark.parametrize(
    "name", ["loss", "eval/loss", "Val_Loss", "top1_error", "err", "ppl", "test-WER", "cer", "rmse"]
)
def test_a_metric_of_which_less_is_better_needs_no_mode(name: str) -> None:
    assert Best(name).mode == "min"
    assert Best(name, mode="max").mode == "max"
    assert str(Best(name)) == f"best 1 by min {name}"


@pytest.mark.parametrize("clock", ["back", "ahead and right again"])
def test_a_clock_that_is_set_does_not_stop_what_goes_by_time(clock: str) -> None:
    leap = {3: -1000.0} if clock == "back" else {3: 1e6, 4: -1e6}
    now, last, by_seconds = 5000.0, None, []
    saves = []
    for step in range(20):
        now += 60 + leap.get(step, 0)
        if EverySeconds(120).should_save(step, now, last):
            last = Saved(step=step, time=now)
            by_seconds.append(step)
        saves.append(Saved(step=step, time=now))
        kept = OnePerMinutes(2).kept(saves)
        saves = [save for save in saves if save.step in kept]
    for steps in (by_seconds, [save.step for save in saves]):
        assert all(1 <= later - earlier <= 2 for earlier, later in pairwise(steps))
        assert len(steps) <= 12


def test_what_is_no_policy_cannot_be_combined_with_one() -> None:
    for policy in (Latest(1), EverySteps(1)):
        with pytest.raises(TypeError):
            policy | 3  # type: ignore[operator]
