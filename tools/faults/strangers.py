"""Open files that nobody's program wrote, many in one child process, and find what should not happen.

Each case is a path that is opened and read whole. It must succeed, or raise an error of varstore's tree that is short.
It must not touch anything else: the child has an audit hook that notes each file that is opened outside the case's
folder, each import, each process and each call of `exec`. It must not exceed its memory, or `SECONDS` of processor
time. A case that ends the child is a loss, and the next case gets a new child.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import pickle
import pkgutil
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import varstore as vs
from tools.faults.jobs import FOREIGN, Lost, Outcome
from varstore.errors import VarstoreError
from varstore.values.nodes import leaves
from varstore.values.opaque import Opaque

__all__ = ["SECONDS", "open_all", "try_cases"]

SECONDS: Final = 10
_MEMORY: Final = 1 << 30
"""Bytes of address space beyond what a child has when it starts."""
_LONGEST_MESSAGE: Final = 2000
_EVENTS: Final = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.")
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Case = tuple[str, Callable[[], object]]
"""The name of a case, and what opens it."""


class _TooSlow(BaseException):
    """The processor time of a case is used up."""


def open_all(path: Path, format: str | None = None, **options: Any) -> None:
    """Open a file or folder and read everything in it, as `state`, `convert` and printing do."""
    opened = vs.read(path, format, **options)
    repr(opened)
    total = 0
    for name in opened:
        array = opened[name]
        total += array.nbytes
        with contextlib.suppress(VarstoreError):
            if total < _MEMORY // 4:
                array.numpy()
    if total < _MEMORY // 4:
        leaves_of = [leaf for _, leaf in leaves(opened.state()) if isinstance(leaf, Opaque)]
        assert len(repr(leaves_of)) <= 300 * (len(leaves_of) + 1)
        pickle.dumps(copy.deepcopy(leaves_of))


def try_cases(make: Callable[[int, Path], Case], count: int, place: Path) -> Outcome:
    """Try the cases of the numbers below `count`, and return those at which something was lost."""
    _import_all()
    lost: list[Lost] = []
    done = 0
    while done < count:
        for report in _in_child(make, done, count, place):
            done = report["next"]
            if report["losses"]:
                lost.append(Lost(point=f"{report['case']}", losses=report["losses"]))
    return Outcome(points=count, lost=lost)


def _in_child(make: Callable[[int, Path], Case], start: int, count: int, place: Path) -> Iterator[dict[str, Any]]:
    """Yield a report for each case with a loss and for the last one, which may have ended the child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reading)
            _work(make, range(start, count), place, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    current, name = start, ""
    with os.fdopen(reading) as reports:
        for line in reports:
            report = json.loads(line)
            current, name = report["number"], report["case"]
            if "losses" in report:
                yield report | {"next": current + 1}
    _, status = os.waitpid(pid, 0)
    if status:
        how = f"status {os.waitstatus_to_exitcode(status)}"
        yield {"case": name, "losses": {FOREIGN: f"the process ended: {how}"}, "next": current + 1}
    else:
        yield {"case": name, "losses": {}, "next": count}


def _work(make: Callable[[int, Path], Case], numbers: range, place: Path, pipe: int) -> None:
    warnings.simplefilter("ignore")
    os.chdir(place)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGVTALRM, _raise_too_slow)
    watch = _Watch(place)
    sys.addaudithook(watch)

    def report(**facts: Any) -> None:
        os.write(pipe, json.dumps(facts).encode() + b"\n")

    for number in numbers:
        name, act = make(number, place)
        report(number=number, case=name)
        losses = _losses(act, watch)
        canary = place / "canary"
        if canary.exists():
            losses["CANARY"] = "code of the file ran"
            canary.unlink()
        if losses:
            report(number=number, case=name, losses=losses)


def _losses(act: Callable[[], object], watch: _Watch) -> dict[str, str]:
    losses: dict[str, str] = {}
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with watch:
            act()
    except VarstoreError as error:
        if len(str(error)) > _LONGEST_MESSAGE:
            losses["LONG"] = f"{type(error).__name__} of {len(str(error)):,} characters: {str(error)[:200]}"
    except _TooSlow:
        losses["SLOW"] = f"more than {SECONDS} s"
    except BaseException as error:
        losses[FOREIGN] = f"{type(error).__name__}: {str(error)[:200]} {_place_of(error)}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if watch.seen:
        losses["TOUCHED"] = "; ".join(watch.seen[:5])
        watch.seen.clear()
    return losses


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"


def _raise_too_slow(*_: object) -> None:
    raise _TooSlow


class _Watch:
    """An audit hook that notes what a case does beside reading its own files, while it is entered."""

    def __init__(self, place: Path) -> None:
        self.seen: list[str] = []
        self._place = os.fspath(place.resolve())
        self._is_on = False

    def __enter__(self) -> None:
        self._is_on = True

    def __exit__(self, *_: object) -> None:
        self._is_on = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2]
            if (flags or 0) & _WRITES or not path.startswith((self._place, *_OF_PYTHON)):
                self.seen.append(f"open {path}")
        elif event == "import" and arguments[0] not in sys.modules and arguments[0].partition(".")[0] not in _MODULES:
            self.seen.append(f"import {arguments[0]}")
        elif event.startswith(_EVENTS) and not (event in ("exec", "compile") and _is_of_a_module(arguments)):
            self.seen.append(f"{event} {arguments!r}"[:100])


def _is_of_a_module(arguments: tuple[Any, ...]) -> bool:
    """Return whether code that is compiled or executed is that of an installed module, or a literal of numpy."""
    name = getattr(arguments[0], "co_filename", arguments[-1])
    return isinstance(name, str) and name.startswith((*_OF_PYTHON, "<frozen", "<unknown>"))


_OF_PYTHON: Final = (sys.prefix, sys.base_prefix, os.fspath(Path(vs.__file__).parent), "/proc/", "/sys/")
_MODULES: Final = {
    *sys.stdlib_module_names,
    "varstore",
    "numpy",
    "numcodecs",
    "google_crc32c",
    "tensorstore",
    "ml_dtypes",
    "google",
}


@cache
def _import_all() -> None:
    """Import what the library imports when it is first needed, so that only what a file causes is noted later."""
    for module in pkgutil.walk_packages(vs.__path__, "varstore."):
        if not module.name.startswith(("varstore.adapters.", "varstore.__main__")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("numcodecs", "google_crc32c", "varstore.formats.zarr.tree"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in vs.__all__:
        getattr(vs, name)
