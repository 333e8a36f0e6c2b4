"""A checkpoint as several processes write it: the manifest lists regions, each with the digests of its own values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from hypothesis import strategies as st

from varstore.layout.manifest import BLOCK, Manifest
from varstore.layout.regions import Region

__all__ = ["bands", "flip", "record_regions", "tilings"]

Rectangles = Iterable[tuple[Sequence[int], Sequence[int]]]


def record_regions(path: str | os.PathLike[str], tilings: Mapping[str, Rectangles]) -> None:
    """Rewrite the manifest of a checkpoint so that these variables have regions: (offsets, sizes) of each."""
    file = Path(path) / "manifest"
    manifest = Manifest.decode(file.read_bytes(), path=str(file))
    entries = dict(manifest.entries)
    for name, rectangles in tilings.items():
        entry = entries[name]
        assert entry.meta is not None
        shape, out = entry.meta.shape, (Path(path) / entry.folder / "out").read_bytes()
        values = np.frombuffer(out, f"V{len(out) // max(entry.meta.elements, 1) or 1}").reshape(shape)
        regions = tuple(_hashed(values, Region(tuple(offsets), tuple(sizes))) for offsets, sizes in rectangles)
        entries[name] = entry._replace(digests=b"", regions=tuple(sorted(regions)))
    data = manifest._replace(entries=entries).encode()
    file.unlink()
    file.write_bytes(data)
    file.chmod(0o444)


def _hashed(values: np.ndarray, region: Region) -> Region:
    own = values[(*region.within(), ...)].tobytes()
    digests = (xxhash.xxh3_128_digest(own[start : start + BLOCK]) for start in range(0, len(own), BLOCK))
    return region._replace(digests=b"".join(digests))


def bands(shape: Sequence[int], axis: int, cuts: Iterable[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the rectangles that cuts across one axis leave."""
    edges = [0, *cuts, shape[axis]]
    found = []
    for start, stop in pairwise(edges):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = start, stop - start
        found.append((tuple(offsets), tuple(sizes)))
    return found


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file that cannot be written."""
    data = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(data.st_atime_ns, data.st_mtime_ns))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Cut a rectangle in two, again and again."""
    done = [Region((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        region = done.pop(draw(st.integers(0, len(done) - 1)))
        axes = [axis for axis, size in enumerate(region.sizes) if size > 1]
        if not axes:
            done.append(region)
            continue
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, region.sizes[axis] - 1))
        for start, size in ((0, at), (at, region.sizes[axis] - at)):
            offsets, sizes = list(region.offsets), list(region.sizes)
            offsets[axis] += start
            sizes[axis] = size
            done.append(Region(tuple(offsets), tuple(sizes)))
    return draw(st.permutations(done))
