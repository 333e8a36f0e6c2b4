"""Pickles that ask for code: names x arguments x forms of calls, and random programs of opcodes, in every wrapping.

If one of them were believed, it would write a file, import a module or start a process.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from tools.faults.jobs import Job, Outcome
from tools.faults.strangers import Case, open_all, try_cases
from varstore.formats.binary.budget import Budget
from varstore.formats.pickles.arrays import PLAIN
from varstore.formats.torch.names import torch_table
from varstore.formats.torch.tensors import Storages

__all__ = ["jobs"]

_WHOLE, _PART, _AT_ONCE = 100_000, 600, 2500
_CODE: Final = "open('canary', 'w')"

_DANGEROUS: Final = [
    *(("os", name) for name in ("system", "popen", "execv", "remove", "environ", "spawnl", "fork", "_exit", "kill")),
    *(("posix", name) for name in ("system", "open", "unlink")),
    *((module, name) for module in ("builtins", "__builtin__") for name in (
        *("eval", "exec", "compile", "open", "__import__", "getattr", "setattr", "delattr", "map", "filter", "apply"),
        *("vars", "globals", "type", "input", "breakpoint", "exit", "print", "memoryview", "property", "classmethod"),
    )),
    *(("subprocess", name) for name in ("Popen", "run", "call", "check_output", "getoutput")),
    *(("importlib", name) for name in ("import_module", "reload", "__import__")),
    *(("operator", name) for name in ("attrgetter", "methodcaller", "itemgetter", "call")),
    *(("functools", name) for name in ("partial", "reduce")),
    *(("runpy", "run_path"), ("code", "interact"), ("pdb", "run"), ("timeit", "timeit"), ("cProfile", "run")),
    *(("pickle", name) for name in ("loads", "load", "Unpickler")),
    *(("shutil", "rmtree"), ("ctypes", "CDLL"), ("socket", "socket"), ("webbrowser", "open"), ("platform", "popen")),
    *(("torch", name) for name in ("load", "hub.load", "save", "jit.load", "ops.load_library")),
    *(("torch.storage", "_load_from_bytes"), ("torch.serialization", "load"), ("torch._dynamo", "optimize")),
    *(("numpy", name) for name in ("load", "save", "fromfile", "memmap", "vectorize", "f2py", "ndarray.tofile")),
    *(("numpy.testing._private.utils", "runstring"), ("numpy.distutils.exec_command", "exec_command")),
    *(("collections", name) for name in ("OrderedDict.__init__.__globals__", "namedtuple", "ChainMap", "__builtins__")),
    *(("varstore", name) for name in ("save", "load", "clean", "write", "convert", "seal")),
    *(("__main__", "Evil"), ("sys", "modules"), ("sys", "exit"), ("copyreg", "add_extension")),
    *(("types", "FunctionType"), ("paddle", "load"), ("oneflow", "load"), ("megengine", "load")),
    *(("pathlib", "Path.write_text"), ("", ""), (".", ".")),
]  # fmt: skip
_KNOWN: Final = [*{**PLAIN, **torch_table(Storages(Budget("", 0)))}]
_NAMES: Final = [*_DANGEROUS, *_KNOWN]
_PROTOCOLS: Final = (b"", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")


def jobs(*, whole: bool) -> Iterator[Job]:
    """Yield a job for a few thousand pickles of each kind, which are opened with unknown names refused and not."""
    for fault, make in (("calls", _call), ("random", _random)):
        count = (_WHOLE if whole else _PART) // 2
        for start in range(0, count, _AT_ONCE):
            run = partial(_try, make, start, min(_AT_ONCE, count - start))
            yield Job(scenario=f"{start}", fault=fault, run=run)


def _try(make: Callable[[random.Random], bytes], start: int, count: int, place: Path) -> Outcome:
    return try_cases(partial(_case, make, start), 2 * count, place)


def _case(make: Callable[[random.Random], bytes], start: int, number: int, place: Path) -> Case:
    seed, mode = start + number // 2, ("error", "opaque")[number % 2]
    choice = random.Random(f"{make.__name__} {seed}")
    wrap = choice.choice(_WRAPPINGS)
    path, format = wrap(make(choice), place)
    return f"{make.__name__} {seed} as {wrap.__name__}, {mode}", partial(open_all, path, format, unknown=mode)


# --- pickles that call -----------------------------------------------------------------------------------------------


def _call(choice: random.Random) -> bytes:
    """Return a pickle with one or a few calls of a name, somewhere in plain data."""
    body = _asked(choice, depth=choice.randrange(3))
    for _ in range(choice.randrange(3)):
        body = choice.choice((
            b"]" + body + b"a",
            b"}X\1\0\0\0k" + body + b"s",
            body + b"\x85",
            b"(" + body + b"N\x88t",
            body + b"q\0h\0\x86",
            b"ccollections\nOrderedDict\n)R" + body + b"b",
            b"}" + body + b"Ns",
            b"(" + body + b"\x91",
        ))  # fmt: skip
    return choice.choice(_PROTOCOLS) + body + b"."


def _asked(choice: random.Random, *, depth: int) -> bytes:
    module, name = choice.choice(_NAMES)
    arguments = [_argument(choice, depth) for _ in range(choice.randrange(4))]
    rest = b"".join(arguments)
    plain, stacked = f"c{module}\n{name}\n".encode(), _text(module) + _text(name) + b"\x93"
    function = choice.choice((plain, stacked))
    return choice.choice((
        function + b"(" + rest + b"tR",
        function + b"(" + rest + b"t\x81",
        function + b"(" + rest + b"t}\x92",
        function + b"(" + rest + b"t}X\1\0\0\0a" + _text(_CODE) + b"s\x92",
        b"(" + function + rest + b"o",
        b"(" + rest + f"i{module}\n{name}\n".encode(),
        function + b")\x81" + (rest or b"N") + b"b",
        function + b")R" + (rest or b"N") + b"b",
        function + (rest or b"N") + b"b",
        function,
        b"ccopyreg\n_reconstructor\n(" + function + b"cbuiltins\nobject\nNtR" + (rest or b"N") + b"b",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + function + b"(" + rest + b"tNtR",
        b"cnumpy.core.multiarray\n_reconstruct\n(" + function + b"K\0\x85C\1btR",
        b"ctorch._utils\n_rebuild_parameter_with_state\n(" + function + b"\x88)" + (rest or b"N") + b"tR",
        rest + function + b"Q",
        b"\x82" + bytes([choice.randrange(256)]),
    ))  # fmt: skip


def _argument(choice: random.Random, depth: int) -> bytes:
    if depth and choice.random() < 0.4:
        return _asked(choice, depth=depth - 1) if choice.random() < 0.9 else _in_bytes(choice, depth - 1)
    return choice.choice((
        _text(_CODE), _text("touch canary"), _text("os"), _text("system"), _text("data"), _text("w"), _text("canary"),
        b"N", b"\x88", b"K\1", b"M\xff\xff", b"]", b"}", b")", _text("touch canary") + b"\x85", b"C\4code",
        b"}X\4\0\0\0data" + _text(_CODE) + b"s", b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4t",
        _text("__reduce__"), b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"G" + b"\x7f\xf8" + b"\0" * 6,
    ))  # fmt: skip


def _in_bytes(choice: random.Random, depth: int) -> bytes:
    """Return a call of torch's function for a storage in bytes, with a pickle where the storage should be."""
    body = _asked(choice, depth=depth) if choice.random() < 0.5 else _stored(choice)
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    raw = head + body + b"." + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(raw)) + raw + b"\x85R"


def _stored(choice: random.Random) -> bytes:
    kind = choice.choice((b"storage", b"module", b"other"))
    return b"(" + _text(kind.decode()) + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\4NtQ"


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


# --- random programs -------------------------------------------------------------------------------------------------


def _random(choice: random.Random) -> bytes:
    """Return random opcodes with plausible operands; half of the programs begin with a stack of plain values."""
    parts = [choice.choice(_PROTOCOLS)]
    if choice.random() < 0.5:
        parts += [_argument(choice, 0) for _ in range(choice.randrange(8))]
    for _ in range(choice.randrange(1, 60)):
        parts.append(choice.choice(_OPCODES)(choice))
    parts.append(choice.choice((b".", b"t.", b"0.", b"", b"\x85.", b"e.")))
    data = bytearray(b"".join(parts))
    for _ in range(choice.choice((0, 0, 0, 1, 3))):
        data[choice.randrange(len(data))] = choice.randrange(256) if data else 0
    return bytes(data)


def _sized(code: bytes, width: int) -> Callable[[random.Random], bytes]:
    def make(choice: random.Random) -> bytes:
        raw = choice.randbytes(choice.choice((0, 1, 2, 8, 40, 300)))
        size = choice.choice((len(raw),) * 6 + (0, 255, (1 << 8 * width - 1) - 1, (1 << 8 * width) - 1))
        return code + (size % (1 << 8 * width)).to_bytes(width, "little") + raw

    return make


def _line(code: bytes, *texts: bytes) -> Callable[[random.Random], bytes]:
    return lambda choice: code + choice.choice(texts) + b"\n"


_NUMBERS = (
    b"0",
    b"1",
    b"-1",
    b"00",
    b"01",
    b"255",
    b"9" * 30,
    b"9" * 5000,
    b"1e308",
    b"nan",
    b"x",
    b"",
    b"1_0",
    b"0x1",
)
_OPCODES: Final[list[Callable[[random.Random], bytes]]] = [
    *(partial(lambda code, _: code, bytes([code])) for code in b"(012N\x88\x89]ledsut)\x85\x86\x87\x8f\x90\x91RQob}a"),
    *(partial(lambda code, _: code, bytes([code])) for code in b"\x93\x81\x92\x94\x97\x98}]((())N"),
    *(_line(code, *_NUMBERS) for code in (b"I", b"L", b"F", b"g", b"p")),
    *(_line(code, b"'a'", b'"b"', b"a", b"\\u0041", b"\\x", b"'\\N{DASH}'", b"") for code in (b"S", b"V", b"P")),
    *(partial(lambda code, choice: code + bytes([choice.randrange(6)]), code) for code in (b"K", b"h", b"q", b"\x82")),
    lambda choice: b"M" + choice.randbytes(2),
    lambda choice: b"J" + choice.randbytes(4),
    lambda choice: b"G" + choice.randbytes(8),
    lambda choice: choice.choice((b"j", b"r")) + struct.pack("<I", choice.choice((0, 1, 5, 1 << 31))),
    lambda choice: b"\x95" + struct.pack("<Q", choice.choice((0, 9, 1 << 63))),
    _sized(b"\x8a", 1),
    _sized(b"\x8b", 4),
    *(_sized(code, 1) for code in (b"U", b"C", b"\x8c")),
    *(_sized(code, 4) for code in (b"T", b"X", b"B")),
    *(_sized(code, 8) for code in (b"\x8d", b"\x8e", b"\x96")),
    lambda choice: "c{}\n{}\n".format(*choice.choice(_NAMES)).encode(),
    lambda choice: "c{}\n{}\n".format(*choice.choice(_KNOWN)).encode(),
    lambda choice: "i{}\n{}\n".format(*choice.choice(_NAMES)).encode(),
    lambda choice: _asked(choice, depth=1),
]


# --- the files that pickles are in -----------------------------------------------------------------------------------


def megengine(data: bytes, place: Path) -> tuple[Path, str]:
    """Write a file of MegEngine, which is the pickle alone."""
    return _written(place / "x.mge", data), "megengine"


def paddle(data: bytes, place: Path) -> tuple[Path, str]:
    """Write a file of PaddlePaddle."""
    return _written(place / "x.pdparams", data), "paddle"


def oneflow(data: bytes, place: Path) -> tuple[Path, str]:
    """Write a file of OneFlow, with the pickle's value in it."""
    body = data.removesuffix(b".")
    return _written(
        place / "x.of", b"}(" + _text("protocol_version") + b"K\1" + _text("data") + body + b"u."
    ), "oneflow"


def torch_zip(data: bytes, place: Path) -> tuple[Path, str]:
    """Write a file of PyTorch, with a storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", bytes(16))
    return _written(place / "x.pt", file.getvalue()), "torch"


def torch_legacy(data: bytes, place: Path) -> tuple[Path, str]:
    """Write a file of PyTorch before 1.6."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    rest = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    return _written(place / "x.pth", head + data + rest), "torch"


def torch_distributed(data: bytes, place: Path) -> tuple[Path, str]:
    """Write the metadata of a distributed checkpoint."""
    (place / "dcp").mkdir(exist_ok=True)
    _written(place / "dcp/.metadata", data)
    return place / "dcp", "torch"


def pdiparams(data: bytes, place: Path) -> tuple[Path, str]:
    """Write the pickle that has the structured names of a file of raw variables."""
    (place / "raw").mkdir(exist_ok=True)
    _written(place / "raw/x.pdiparams.info", data)
    _written(place / "raw/x.json", b'{"program":{"regions":[{"blocks":[{"ops":[{"#":"p","A":[0,0,0,"w"]}]}]}]}}')
    return _written(place / "raw/x.pdiparams", bytes(16) + b"\4\0\0\0\x08\x05\x10\1" + bytes(4)), "paddle"


_WRAPPINGS: Final = (megengine, paddle, oneflow, torch_zip, torch_legacy, torch_distributed, pdiparams)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
