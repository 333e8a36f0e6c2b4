"""A few rows of a large tensor in another system's file cost few bytes of reading."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

import varstore as vs
from varstore.formats.binary.wire import bytes_field, int_field
from varstore.formats.torch.write import write as write_torch

MIB = 1 << 20
ROWS, WIDTH = 65536, 1024
SIZE = 4 * ROWS * WIDTH
"""256 MiB of float32, most of them a hole."""


def extended(path, start):
    """Give the file a hole of the tensor's size from here on, in which three rows have values."""
    with open(path, "r+b") as file:
        file.truncate(start + SIZE)
        for row in (0, 500, ROWS - 1):
            file.seek(start + 4 * WIDTH * row)
            file.write((np.arange(WIDTH, dtype="<f4") + row).tobytes())


def safetensors(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [ROWS, WIDTH], "data_offsets": [0, SIZE]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    extended(path, 8 + len(header))


def npy(path, *, fortran=False):
    with open(path, "wb") as file:
        shape = (WIDTH, ROWS) if fortran else (ROWS, WIDTH)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": fortran, "shape": shape})
        start = file.tell()
    extended(path, start)


def with_stored_member(path, place, name):
    """Put the tensor's bytes in place of the bytes of the last member of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if info.filename != name}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        info = zipfile.ZipInfo(name)
        with archive.open(info, "w", force_zip64=True) as member:
            member.write(place)
            for _ in range(SIZE // MIB):
                member.write(bytes(MIB))
        start = info.header_offset + 30 + len(name) + 20 + len(place)
    with open(path, "r+b") as file:
        for row in (0, 500, ROWS - 1):
            file.seek(start + 4 * WIDTH * row)
            file.write((np.arange(WIDTH, dtype="<f4") + row).tobytes())


def npz(path):
    np.savez(path, other=np.ones(3))
    npy(path.with_suffix(".head"))
    head = path.with_suffix(".head").read_bytes()[: -SIZE or None]
    with_stored_member(path, head, "w.npy")


def torch(path):
    write_torch(path, {"w": np.zeros((ROWS, 0), np.float32)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    pickled = pickled.replace(number(ROWS) + number(0), number(ROWS) + number(WIDTH))
    pickled = pickled.replace(b"X\x03\0\0\0cpu" + number(0), b"X\x03\0\0\0cpu" + number(ROWS * WIDTH))
    pickled = pickled.replace(number(1) + number(1) + b"t", number(WIDTH) + number(1) + b"t")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    with_stored_member(path, b"", "archive/data/0")


def onnx(path):
    entries = {"location": "w.data", "offset": "4096"}
    tensor = b"".join(int_field(1, extent) for extent in (ROWS, WIDTH)) + int_field(2, 1) + bytes_field(8, b"w")
    tensor += b"".join(
        bytes_field(13, bytes_field(1, k.encode()) + bytes_field(2, v.encode())) for k, v in entries.items()
    )
    tensor += int_field(14, 1)
    path.write_bytes(int_field(1, 8) + bytes_field(7, bytes_field(5, tensor)))
    (path.parent / "w.data").write_bytes(b"")
    extended(path.parent / "w.data", 4096)


def paddle(path):
    description = int_field(1, 5) + int_field(2, ROWS) + int_field(2, WIDTH)
    head = struct.pack("<IQIi", 0, 0, 0, len(description)) + description
    path.write_bytes(head)
    extended(path, len(head))


def mindspore(path):
    def key(number, size):
        return bytes([number << 3 | 2]) + varint(size)

    head = int_field(1, ROWS) + int_field(1, WIDTH) + bytes_field(2, b"Float32") + key(3, SIZE)
    tag = bytes_field(1, b"w")
    inner = tag + key(2, len(head) + SIZE)
    path.write_bytes(key(1, len(inner) + len(head) + SIZE) + inner + head)
    extended(path, path.stat().st_size)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def oneflow(path):
    (path / "w").mkdir(parents=True)
    (path / "model.mlir").write_bytes(b"")
    (path / "w" / "meta").write_text(f"shape {{\n  dim: {ROWS}\n  dim: {WIDTH}\n}}\ndata_type: kFloat\n")
    (path / "w" / "out").write_bytes(b"")
    extended(path / "w" / "out", 0)


FILES = {
    "w.safetensors": safetensors, "w.npy": npy, "w.npz": npz, "w.pt": torch, "w.onnx": onnx, "w.bin": paddle,
    "w.ckpt": mindspore, "graph": oneflow,
}  # fmt: skip


def read_so_far():
    with open("/proc/self/io") as file:
        return int(file.read().split()[1])


@pytest.mark.parametrize("name", FILES)
def test_rows_are_read_alone(tmp_path, name):
    if not os.path.exists("/proc/self/io"):
        pytest.skip("/proc/self/io does not count reads here")
    FILES[name](tmp_path / name)
    opened = vs.read(tmp_path / name)
    lazy = opened[next(name for name in opened if opened[name].size == ROWS * WIDTH)]
    row = np.arange(WIDTH, dtype=np.float32)
    before = read_so_far()
    assert np.array_equal(lazy[500], row + 500)
    assert np.array_equal(lazy[[-1, 0, 500]][:, -2:], np.stack([row + ROWS - 1, row, row + 500])[:, -2:])
    assert np.array_equal(lazy[498:503:2, ::-1][1], (row + 500)[::-1])
    assert lazy[ROWS - 1, 7] == ROWS + 6
    assert lazy[100:200].sum() == 0
    assert read_so_far() - before < MIB


def test_columns_of_fortran_order_are_read_alone(tmp_path):
    npy(tmp_path / "w.npy", fortran=True)
    (lazy,) = vs.read(tmp_path / "w.npy").values()
    before = read_so_far()
    assert np.array_equal(lazy[:, 500], np.arange(WIDTH, dtype=np.float32) + 500)
    assert lazy[:2, :10].flags.f_contiguous
    assert read_so_far() - before < MIB
