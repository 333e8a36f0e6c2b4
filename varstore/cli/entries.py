"""What the graphs of a checkpoint take and give, and the regions of its variables, for ``varstore show`` and ``ls``."""

from __future__ import annotations

from typing import Any

import varstore as vs
from varstore.text.hints import plural

__all__ = ["GRAPH", "entry_text", "regions_json", "regions_of"]

GRAPH = "graph"
"""The kind of a file that is a graph."""
_SHOWN = 8


def entry_text(file: vs.AttachedFile) -> str:
    """Return the name of a graph's entry, its format, how many variables it uses, its inputs and outputs."""
    said = file.attributes
    inputs, outputs = (_ports(said.get(key)) for key in ("inputs", "outputs"))
    ways = f": {inputs} -> {outputs}" if inputs or outputs else ""
    used = plural(len(said.get("bindings", ())), "variable")
    return f"{said.get('entry', file.name)} ({said.get('format', 'unknown')}), {used}{ways}"


def _ports(ports: Any) -> str:
    if not isinstance(ports, list):
        return ""
    shown = [f"{port.get('name')} {port.get('type')} {_shape(port.get('shape'))}" for port in ports[:_SHOWN]]
    return ", ".join([*shown, *(["…"] if len(ports) > _SHOWN else [])])


def _shape(shape: Any) -> str:
    if not isinstance(shape, list):
        return "of any shape"
    return f"[{', '.join('?' if extent is None else str(extent) for extent in shape)}]"


def regions_of(what: Any) -> tuple[Any, ...]:
    """Return the regions of a variable of a checkpoint that several processes wrote; none for all else."""
    return what.entry.regions if isinstance(what, vs.Variable) else ()


def regions_json(what: Any) -> list[dict[str, Any]]:
    """Return the regions of a variable for JSON."""
    return [
        {"offsets": list(one.offsets), "sizes": list(one.sizes), "digests": one.hex_digests} for one in regions_of(what)
    ]
