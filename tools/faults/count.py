"""Compare the number of calls of each scenario, as the injector counts them, with strace's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tools.faults.calls import count_calls, fresh_home, shared_injector
from tools.faults.jobs import Job, Lost, Outcome
from tools.faults.scenarios import SCENARIOS, Scenario
from tools.faults.tracing import trace

__all__ = ["jobs"]

_TOLERANCE = 0.02


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for each scenario."""
    del whole
    for scenario in SCENARIOS:
        yield Job(scenario=scenario.name, fault="uncounted", run=partial(_compare, scenario))


def _compare(scenario: Scenario, place: Path) -> Outcome:
    injector = shared_injector()
    own = Counter(count_calls(injector, scenario, place))
    chosen = "trace=" + ",".join(f"?{name}" for name in injector.names)
    with fresh_home(scenario, place) as home:
        options = ["-c", "-U", "name,calls", "-e", chosen]
        table = trace(partial(scenario.act, home), options, place, start=scenario.start)
    rows = re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
    other = Counter({name: int(calls) for name, calls in rows if name != "total"})
    if abs(own.total() - other.total()) <= _TOLERANCE * max(own.total(), other.total()):
        return Outcome(points=own.total())
    counts = {name: f"{own[name]} counted, {other[name]} by strace" for name in own | other if own[name] != other[name]}
    return Outcome(points=own.total(), lost=[Lost(point="all calls", losses=counts)])
