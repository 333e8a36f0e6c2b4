"""Loads of arrays that several processes have: all processes load one checkpoint, or all raise one error.

Each of them opens the path by itself, and a save may replace the checkpoint meanwhile. An array that is old in one
process and new in another would be neither, so they compare what they opened. And a process that found damage would
leave the others to wait for it in their next step, so that none returns before all have what they need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Sharding

from varstore.adapters.jax.processes import Processes, client
from varstore.disk.read.checkpoint import Checkpoint, attempts, retry_if_replaced
from varstore.errors import VariableMismatch
from varstore.formats.verbs import open_source

__all__ = ["load_in_all"]

Result = TypeVar("Result")

_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds until processes look again that saw different checkpoints: one of them looked while it was being replaced."""


def load_in_all(load: Callable[[Any], Result], path: Any, wanted: Iterable[Any]) -> Result:
    """Return what `load` returns for what lies at a path, in each process that has devices of the wanted arrays.

    Args:
        load: may be called several times.
        wanted: leaves of a pytree, of which some are shardings or have them.

    Raises:
        VariableMismatch: the processes do not see the same checkpoint.
        StorageError: a process died, or does not make this call.
        VarstoreError: `load` failed, in this process or in another one.
    """
    members = _processes_of(wanted)
    if members <= {jax.process_index()} or jax.process_index() not in members or not client():
        source = open_source(path)
        return retry_if_replaced(load, source) if _is_checkpoint(source) else load(source)
    with Processes("load", members=members) as processes:
        return _load_agreed(load, open_source(path), processes)


def _processes_of(wanted: Iterable[Any]) -> set[int]:
    """Return the processes that have parts of the arrays which no process has whole."""
    found = {leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None) for leaf in wanted}
    spread = [one for one in found if isinstance(one, Sharding) and not one.is_fully_addressable]
    return {device.process_index for sharding in spread for device in sharding.device_set}


def _is_checkpoint(source: Any) -> bool:
    return isinstance(source, Checkpoint) or not isinstance(source, Mapping)


def _load_agreed(load: Callable[[Any], Result], source: Any, processes: Processes) -> Result:
    if not _is_checkpoint(source):
        result = load(source)
        processes.agree("read", "", _first_of_all)
        return result
    for number, attempt in enumerate(attempts(source)):
        with attempt as (checkpoint,):
            if not processes.agree(f"opened/{number}", checkpoint.content.fingerprint().hex(), _first_of_all):
                if number == len(_PAUSES):
                    raise VariableMismatch(
                        "the processes do not see the same checkpoint",
                        path=checkpoint.path,
                        hint="give all of them the same path, on a file system that they share",
                    )
                time.sleep(_PAUSES[number])
                continue
            result = load(checkpoint)
        if processes.agree(f"read/{number}", "replaced" if attempt.replaced else "read", _first_of_all) == "read":
            return result
    raise AssertionError  # attempts end with an error


def _first_of_all(texts: list[str]) -> str:
    """Return the text that all processes gave; nothing if they differ."""
    return texts[0] if len(set(texts)) == 1 else ""
