"""Create tests/data/golden: files of the format as this version writes them, and their content as JSON.

The files are created once for each version of the format. If they exist and would change, nothing is written and the
exit code is 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from varstore.layout.dtypes import BY_NAME
from varstore.layout.manifest import FORMAT_VERSION, Entry, Manifest
from varstore.layout.meta import Meta
from varstore.layout.names import Folder

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden"
DIGEST = "00112233445566778899aabbccddeeff"

MANIFEST: dict[str, Any] = {
    "writer": "varstore 0.1.0",
    "time_ns": 1_700_000_000_123_456_789,
    "attributes": {"step": 1000, "metrics": {"loss": 0.25}, "été": [None, True, "層"]},
    "tree": '{"dict":["w"]}',
    "variables": [
        {"name": "conv1/weight", "shape": [20, 1, 5, 5], "type": "kFloat", "nbytes": 2000, "digests": DIGEST},
        {"name": "tied", "shape": [20, 1, 5, 5], "type": "kFloat", "nbytes": 2000, "digests": DIGEST,
         "alias_of": "conv1/weight"},
        {"name": "a/../out", "folder": "a/.%2E/%6Fut", "shape": [0, 4], "type": "kFloat8E4M3FN", "nbytes": 0},
        {"name": "step", "shape": [], "type": "kInt64", "nbytes": 8, "digests": DIGEST,
         "attributes": {"unit": "batches"}, "meta_digest": DIGEST},
        {"name": "large", "shape": [16777217], "type": "kUInt8", "nbytes": 16777217, "digests": DIGEST * 2},
        {"name": "packed", "shape": [1000], "type": "kBFloat16", "nbytes": 300, "digests": DIGEST,
         "encoding": "zarr"},
    ],
}  # fmt: skip


def main() -> int:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / f"manifest_v{FORMAT_VERSION}"
    files = {path: _manifest().encode(), Path(f"{path}.json"): _json(MANIFEST)}
    stale = [path.name for path, data in files.items() if path.exists() and path.read_bytes() != data]
    if stale:
        print(f"would change {', '.join(stale)}: a changed format needs a new FORMAT_VERSION", file=sys.stderr)
        return 1
    for path, data in files.items():
        path.write_bytes(data)
    return 0


def _manifest() -> Manifest:
    entries = [_entry(**facts) for facts in MANIFEST["variables"]]
    return Manifest(
        writer=MANIFEST["writer"],
        time_ns=MANIFEST["time_ns"],
        attributes=MANIFEST["attributes"],
        tree=MANIFEST["tree"],
        entries={entry.name: entry for entry in entries},
    )


def _entry(
    *, name: str, shape: list[int], type: str, folder: str = "", digests: str = "", meta_digest: str = "", **others: Any
) -> Entry:
    return Entry(
        name=name,
        folder=Folder(folder or name),
        meta=Meta(shape=tuple(shape), data_type=BY_NAME[type]),
        digests=bytes.fromhex(digests),
        meta_digest=bytes.fromhex(meta_digest),
        **others,
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


if __name__ == "__main__":
    raise SystemExit(main())
