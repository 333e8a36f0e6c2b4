"""Make the corpus of hostile pickles and zip files: ``hostile_pickles.py FOLDER [CANARY]``.

Each file would touch CANARY if it were believed. ``index.json`` beside them says for each which reader it is
for, which error it must be, and a word that the error must hold.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

Pickle = bytes

PAIR = b"\x86"
REDUCE = b"R"
UNWRAPPED = {"no_stop", "dup_of_nothing"}
"""Pickles that are whole once something stands around them."""

STOP = b"."
LAUGHING_TUPLES = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + PAIR for i in range(60))
"""What takes 2**60 steps to print or to hash."""


def text(value: str) -> bytes:
    """Return a string as BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    """Return GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """Return GLOBAL, its arguments and REDUCE."""
    return named(module, name) + b"(" + b"".join(arguments) + b"t" + REDUCE


def number(value: int) -> bytes:
    """Return an int as LONG1."""
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def doubled(start: bytes, step: bytes, times: int) -> bytes:
    """Return `start`, memoized, and `step` applied to it over and over."""
    return start + b"".join(b"2" + step for _ in range(times))


def array(shape: bytes, kind: str, data: bytes) -> bytes:
    """Return a pickled numpy array."""
    made = called("numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), b"K\0\x85", b"C\1b")
    dtype = called("numpy", "dtype", text(kind), b"\x89", b"\x88") + b"(K\3" + text("<") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\0tb"
    return made + b"(K\1" + shape + dtype + b"\x89" + b"B" + struct.pack("<I", len(data)) + data + b"tb"


def routes(canary: str) -> dict[str, tuple[Pickle, str, str]]:
    """Return name -> (pickle, error, word): every way a pickle has to call what it names."""
    shell = f"touch {canary}"
    code = f"open({canary!r}, 'w')"
    line = f"S{shell!r}\n".encode()
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    calls = {
        "reduce_global": (named("os", "system") + b"(" + line + b"tR.", "os.system"),
        "reduce_stack_global": (
            b"\x80\4" + short("posix") + short("system") + b"\x93" + text(shell) + b"\x85R.",
            "posix.system",
        ),
        "inst": (b"(" + line + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(" + named("os", "system") + line + b"o.", "os.system"),
        "newobj": (named("os", "system") + text(shell) + b"\x85\x81.", "os.system"),
        "newobj_ex": (
            named("subprocess", "Popen") + b")}" + text("args") + text(shell) + b"s\x92.",
            "subprocess.Popen",
        ),
        "newobj_ex_of_known": (named("collections", "OrderedDict") + b")}" + text("a") + b"Ns\x92.", "OrderedDict"),
        "newobj_empty": (named("subprocess", "Popen") + b")\x81.", "subprocess.Popen"),
        "build_setstate": (named("__main__", "Evil") + b")\x81}" + text("a") + b"Nsb.", "__main__.Evil"),
        "build_of_name": (named("os", "environ") + b"}" + text("PATH") + text("/evil") + b"sb.", "os.environ"),
        "build_of_dict": (b"}}" + text("__class__") + named("os", "system") + b"sb.", "set the state"),
        "ext1": (b"\x82\7.", "extension"),
        "ext2": (b"\x83\7\0.", "extension"),
        "ext4": (b"\x84\7\0\0\0.", "extension"),
        "exec": (called("builtins", "exec", text(code)) + STOP, "builtins.exec"),
        "exec_python2": (called("__builtin__", "exec", text(code)) + STOP, "__builtin__.exec"),
        "eval": (called("builtins", "eval", text(code)) + STOP, "builtins.eval"),
        "eval_of_data": (
            called("builtins", "eval", text("data"), b"}" + text("data") + text(code) + b"s") + STOP,
            "builtins.eval",
        ),
        "eval_with_more": (
            called(
                "builtins",
                "eval",
                text("data"),
                b"}" + text("data") + array(b"K\1\x85", "u1", b"a") + b"s" + text("x") + b"Ns",
            )
            + STOP,
            "builtins.eval",
        ),
        "eval_of_code": (
            called("builtins", "eval", text(code), b"}" + text("data") + array(b"K\1\x85", "u1", b"a") + b"s") + STOP,
            "builtins.eval",
        ),
        "compile": (called("builtins", "compile", text(code), text("f"), text("exec")) + STOP, "builtins.compile"),
        "import": (called("builtins", "__import__", text("antigravity")) + STOP, "builtins.__import__"),
        "getattr_chain": (
            called("builtins", "getattr", called("builtins", "__import__", text("os")), text("system"))
            + text(shell)
            + b"\x85R.",
            "builtins.__import__",
        ),
        "getattr_of_known": (
            called("builtins", "getattr", named("collections", "OrderedDict"), text("__init__")) + STOP,
            "builtins.getattr",
        ),
        "dotted_name": (
            b"\x80\4" + short("collections") + short("OrderedDict.__init__.__globals__") + b"\x93)R.",
            "__globals__",
        ),
        "attrgetter": (
            called("operator", "attrgetter", text("system")) + named("os", "path") + b"\x85R.",
            "operator.attrgetter",
        ),
        "methodcaller": (
            called("operator", "methodcaller", text("system"), text(shell)) + STOP,
            "operator.methodcaller",
        ),
        "partial": (called("functools", "partial", named("os", "system"), text(shell)) + b")R.", "functools.partial"),
        "map": (called("builtins", "map", named("os", "system"), b"]" + text(shell) + b"a") + STOP, "builtins.map"),
        "code_object": (called("types", "CodeType", b"K\0") + STOP, "types.CodeType"),
        "marshal": (called("marshal", "loads", b"C\1N") + STOP, "marshal.loads"),
        "pickle_in_pickle": (called("pickle", "loads", b"C\1N") + STOP, "pickle.loads"),
        "runpy": (called("runpy", "run_path", text(canary)) + STOP, "runpy.run_path"),
        "numpy_runstring": (called("numpy.testing._private.utils", "runstring", text(code), b"}") + STOP, "runstring"),
        "numpy_load": (called("numpy", "load", text(canary)) + STOP, "numpy.load"),
        "numpy_fromfile": (called("numpy", "fromfile", text("/etc/passwd")) + STOP, "numpy.fromfile"),
        "torch_hub": (called("torch.hub", "load", text("a/b"), text("c")) + STOP, "torch.hub.load"),
        "torch_nested_load": (called("torch.storage", "_load_from_bytes", b"C\1N") + STOP, "_load_from_bytes"),
        "codec": (called("_codecs", "encode", text("aa"), text("hex_codec")) + STOP, "encode"),
        "codec_decode": (called("_codecs", "decode", b"C\2aa", text("zlib_codec")) + STOP, "_codecs.decode"),
        "reconstruct_other": (
            called("numpy.core.multiarray", "_reconstruct", named("os", "system"), b")", b"C\1b") + STOP,
            "os.system",
        ),
        "copyreg": (
            called("copyreg", "_reconstructor", named("subprocess", "Popen"), named("builtins", "object"), b"N") + STOP,
            "Popen",
        ),
        "copyreg_of_list": (
            called("copyreg", "_reconstructor", named("subprocess", "Popen"), named("builtins", "list"), b"]") + STOP,
            "copyreg",
        ),
        "setitem_of_name": (named("os", "environ") + text("PATH") + text("/evil") + b"s.", "os.environ"),
        "append_to_name": (named("sys", "path") + text("/evil") + b"a.", "sys.path"),
        "add_to_name": (named("sys", "path") + b"(" + text("/evil") + b"\x90.", "sys.path"),
        "call_of_list": (b"])R.", "call"),
        "persistent_id": (text("os.system") + b"Q.", ""),
        "persistent_id_line": (b"Pos.system\n.", ""),
        "import_alone": (named("antigravity", "x") + STOP, "antigravity.x"),
        "import_dropped": (named("antigravity", "x") + b"0N.", "antigravity.x"),
        "import_kept_in_list": (b"]" + named("os", "system") + b"a.", "os.system"),
        "default_factory": (called("collections", "defaultdict", named("os", "system")) + STOP, "os.system"),
        "module_inside": (
            named("__main__", "Net")
            + b")\x81}("
            + text("_parameters")
            + b"}"
            + text("_buffers")
            + b"}"
            + text("_modules")
            + b"}"
            + text("a")
            + called("os", "system", text(shell))
            + b"sub.",
            "would",
        ),
    }
    return {name: (data, "UnsafeContent", word) for name, (data, word) in calls.items()}


def bombs() -> dict[str, tuple[Pickle, str, str]]:
    """Return name -> (pickle, error, word): what is torn, endless, or lies about a size."""
    laugh = b"]" + b"".join(
        b"q" + bytes([i]) + b"0](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )
    tuples = LAUGHING_TUPLES
    wide = b"](" + b"K\1" * 4000 + b"eq\0"
    pairs = b"](" + (b"K\1K\2" + PAIR) * 4000 + b"eq\0"
    huge = 1 << 62
    return {
        "empty": (b"", "FormatError", ""),
        "one_byte": (b"\x80", "FormatError", ""),
        "no_stop": (b"\x80\2}", "FormatError", "STOP"),
        "unknown_opcode": (b"\x80\2\xff.", "FormatError", "0xff"),
        "protocol_9": (b"\x80\x09N.", "FormatError", "protocol"),
        "out_of_band": (b"\x80\5\x97.", "FormatError", "buffers"),
        "readonly_buffer": (b"\x80\5\x98.", "FormatError", "buffers"),
        "stack_underflow": (b"\x80\2s.", "FormatError", ""),
        "tuple_underflow": (b"\x80\2N\x87.", "FormatError", ""),
        "mark_underflow": (b"\x80\2t.", "FormatError", ""),
        "dup_of_nothing": (b"2.", "FormatError", ""),
        "left_on_stack": (b"NN.", "FormatError", "stack"),
        "left_mark": (b"(N.", "FormatError", "stack"),
        "memo_missing": (b"h\7.", "FormatError", ""),
        "memo_not_a_number": (b"gabc\n.", "FormatError", ""),
        "odd_dict": (b"(Nd.", "FormatError", "key"),
        "no_quotes": (b"Sabc\n.", "FormatError", "quotes"),
        "torn_line": (b"Sabc", "FormatError", "line"),
        "bytes_huge": (b"\x8e" + struct.pack("<Q", huge) + b"a.", "FormatError", "ends early"),
        "bytes_4g": (b"B\xff\xff\xff\xffa.", "FormatError", "ends early"),
        "text_huge": (b"\x8d" + struct.pack("<Q", huge) + b"a.", "FormatError", "ends early"),
        "bytearray_huge": (b"\x80\5\x96" + struct.pack("<Q", huge) + b"a.", "FormatError", "ends early"),
        "frame_huge": (b"\x80\4\x95" + struct.pack("<Q", huge) + b"N.", "FormatError", "frame"),
        "long4_huge": (b"\x8b\xff\xff\xff\x7fa.", "FormatError", "integer"),
        "long4_negative": (b"\x8b\xff\xff\xff\xffa.", "FormatError", "integer"),
        "long4_long": (b"\x8b" + struct.pack("<I", 1 << 20) + b"\1" * (1 << 20) + b".", "FormatError", "integer"),
        "long_text": (b"L" + b"9" * (1 << 20) + b"L\n.", "FormatError", "number"),
        "int_text": (b"I" + b"9" * (1 << 20) + b"\n.", "FormatError", "number"),
        "int_text_4000": (b"I" + b"9" * 4090 + b"\n.", "", ""),
        "put_far": (b"Nr\xff\xff\xff\xff0p99999999999999999999\n.", "FormatError", ""),
        "laughing_lists": (laugh + STOP, "FormatError", "repeats"),
        "laughing_tuples": (tuples + STOP, "FormatError", "repeats"),
        "laughing_keys": (b"}" + tuples + b"Ns.", "FormatError", "key"),
        "laughing_set": (b"(" + tuples + b"\x91.", "FormatError", "key"),
        "laughing_modules": (
            b"".join(
                named("m", "M")
                + b")\x81q"
                + bytes([i])
                + b"}("
                + text("_parameters")
                + b"}"
                + text("_buffers")
                + b"}"
                + text("_modules")
                + b"}("
                + (text("a") + b"h" + bytes([i - 1]) + text("b") + b"h" + bytes([i - 1]) if i else b"")
                + b"uub"
                + b"0" * (i < 59)
                for i in range(60)
            )
            + STOP,
            "UnsafeContent",
            "",
        ),
        "copied_dicts": (
            b"](" + pairs + (named("collections", "OrderedDict") + b"h\0\x85R") * 2000 + b"e.",
            "UnsafeContent",
            "proportion",
        ),
        "copied_sets": (
            b"](" + wide + (named("builtins", "set") + b"h\0\x85R") * 4000 + b"e.",
            "UnsafeContent",
            "proportion",
        ),
        "copied_texts": (
            b"](X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\0" + b"}h\0Ns" * 200 + b"e.",
            "UnsafeContent",
            "proportion",
        ),
        "colliding_keys": (
            b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 60)) + b"u.",
            "FormatError",
            "key",
        ),
        "deep_lists": (b"(l" + b"(l" * 30_000 + b"a" * 30_000 + STOP, "FormatError", "deeper"),
        "deep_tuples": (b")" + b"\x85" * 50_000 + STOP, "FormatError", "deeper"),
        "deep_dicts": (b"}K\1" * 20_000 + b"}" + b"s" * 20_000 + STOP, "FormatError", "deeper"),
        "deep_key": (b"}" + b")" + b"\x85" * 20_000 + b"Ns.", "FormatError", "key"),
        "cycle_list": (b"]q\0h\0a.", "FormatError", "itself"),
        "cycle_dict": (b"}q\0K\1h\0s.", "FormatError", "itself"),
        "list_as_key": (b"}]Ns.", "FormatError", "key"),
        "array_shape_lies": (array(number(1 << 40) + b"\x85", "f4", b"abcd") + STOP, "FormatError", "shape"),
        "array_shape_negative": (array(number(-1) + b"\x85", "f4", b"abcd") + STOP, "FormatError", "shape"),
        "array_shape_text": (array(text("a") + b"\x85", "f4", b"abcd") + STOP, "FormatError", "shape"),
        "array_shape_overflows": (array(b"(" + number(1 << 40) * 3 + b"t", "f4", b"") + STOP, "FormatError", "shape"),
        "array_zero_huge": (array(b"(K\0" + number(huge) * 3 + b"t", "f4", b"") + STOP, "FormatError", "shape"),
        "array_65_dimensions": (array(b"(" + b"K\1" * 65 + b"t", "u1", b"a") + STOP, "FormatError", "shape"),
        "array_of_empty_texts": (array(number(1 << 50) + b"\x85", "U0", b"") + STOP, "UnsupportedDtype", ""),
        "array_of_objects": (array(b"K\1\x85", "O8", b"abcdefgh") + STOP, "UnsupportedDtype", "O8"),
        "array_of_records": (array(b"K\1\x85", "(2,2)f4,i8", b"abcdefgh") + STOP, "UnsupportedDtype", ""),
        "encoded_tuple": (called("_codecs", "encode", b")", text("latin1")) + STOP, "FormatError", "not text"),
        "scalar_lies": (
            called("numpy.core.multiarray", "scalar", called("numpy", "dtype", text("f8"), b"\x89", b"\x88"), b"C\2ab")
            + STOP,
            "FormatError",
            "scalar",
        ),
    }


def storage(kind: str, key: str, count: int) -> bytes:
    """Return torch's persistent id of a storage."""
    module, name = kind.rsplit(".", 1)
    return b"(" + text("storage") + named(module, name) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(stored: bytes, offset: int, shape: list[int], stride: list[int]) -> bytes:
    """Return a call of torch's _rebuild_tensor_v2."""
    extents = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    return called("torch._utils", "_rebuild_tensor_v2", stored, number(offset), *extents, b"\x89", b"}")


def torch_zip(pickled: bytes, members: dict[str, bytes] | None = None, **options: int) -> bytes:
    """Return a torch zip file around a pickle; storage 0 has 16 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in (members or {"archive/data/0": bytes(16), "archive/version": b"3\n"}).items():
            archive.writestr(name, data)
    return file.getvalue()


def torch_files() -> dict[str, tuple[bytes, str, str]]:
    """Return name -> (file, error, word): zip files and tensors that lie."""
    plain = storage("torch.FloatStorage", "0", 4)
    good = torch_zip(tensor(plain, 0, [4], [1]) + STOP)
    patched = {}
    directory = good.index(b"PK\1\2")
    last = good.rindex(b"PK\1\2")
    for name, at, value in (
        ("zip_overlap", last + 42, struct.pack("<I", 0)),
        ("zip_offset_outside", last + 42, struct.pack("<I", 1 << 30)),
        ("zip_size_outside", directory + 20, struct.pack("<II", 1 << 30, 1 << 30)),
        ("zip_encrypted", directory + 8, b"\1\0"),
        ("zip_other_method", directory + 10, b"\x0e\0"),
        ("zip_name_differs_in_size", 26, struct.pack("<H", 60000)),
        ("zip_directory_outside", len(good) - 6, struct.pack("<I", 1 << 30)),
    ):
        patched[name] = (good[:at] + value + good[at + len(value) :], "FormatError", "")
    zeros = bytes(1 << 28)
    pickles = {
        "view_outside": (tensor(plain, 1, [4], [1]), "beyond its storage"),
        "view_stride_outside": (tensor(plain, 0, [2, 2], [1 << 40, 1]), "beyond its storage"),
        "view_negative_offset": (tensor(plain, -1, [2], [1]), "integers of 0 or more"),
        "view_negative_stride": (tensor(plain, 3, [4], [-1]), "integers of 0 or more"),
        "view_negative_shape": (tensor(plain, 0, [-4], [1]), "shape"),
        "view_ranks_differ": (tensor(plain, 0, [2, 2], [1]), "integers of 0 or more"),
        "view_expanded": (tensor(plain, 0, [1 << 40], [0]), "proportion"),
        "view_expanded_overflow": (tensor(plain, 0, [1 << 40, 1 << 40], [0, 0]), "shape"),
        "view_of_nothing": (tensor(b"N", 0, [4], [1]), "storage"),
        "storage_too_long": (tensor(storage("torch.FloatStorage", "0", 1 << 40), 0, [4], [1]), "size"),
        "storage_too_short": (tensor(storage("torch.FloatStorage", "0", 2), 0, [2], [1]), "size"),
        "storage_negative": (tensor(storage("torch.FloatStorage", "0", -4), 0, [0], [1]), "persistent id"),
        "storage_missing": (tensor(storage("torch.FloatStorage", "../0", 4), 0, [4], [1]), "storage"),
        "storage_of_system": (tensor(storage("os.system", "0", 4), 0, [4], [1]), "os.system"),
        "storage_of_dict": (tensor(storage("collections.OrderedDict", "0", 4), 0, [4], [1]), "persistent id"),
        "persistent_text": (text("storage") + b"Q", "persistent id"),
        "persistent_short": (b"(" + text("storage") + b"tQ", "persistent id"),
        "persistent_other": (b"(" + text("module") + b"NNNNtQ", "persistent id"),
        "subclass_by_system": (
            called(
                "torch._tensor",
                "_rebuild_from_type_v2",
                named("os", "system"),
                named("a", "B"),
                text("x") + b"\x85",
                b"N",
            ),
            "os.system",
        ),
        "shape_laughing": (
            called(
                "torch._utils", "_rebuild_tensor_v2", plain, number(0), LAUGHING_TUPLES + b"\x85", number(1) + b"\x85"
            ),
            "integers of 0 or more",
        ),
        "scheme_laughing": (
            called(
                "torch._utils",
                "_rebuild_qtensor",
                plain,
                number(0),
                b"K\4\x85",
                b"K\1\x85",
                b"(" + LAUGHING_TUPLES + b"K\1" + LAUGHING_TUPLES + b"t",
            ),
            "scheme",
        ),
        "subclass_of_subclasses": (
            named("torch._tensor", "_rebuild_from_type_v2") + b"q\0" + b"(h\0N" * 5000 + b")" + b"t" * 5000 + b"R",
            "recursion",
        ),
        "long_names": (
            tensor(plain, 0, [4], [1]) + b"q\0" + b"0}(" + text("k" * 200_000) + b"](" + b"h\0" * 100_000 + b"eu",
            "names",
        ),
        "sparse_of_nothing": (called("torch._utils", "_rebuild_sparse_tensor", text("torch.magic"), b")"), "layout"),
    }
    return {
        **patched,
        **{name: (torch_zip(data + STOP), "FormatError", word) for name, (data, word) in pickles.items()},
        "zip_cut": (good[:-30], "FormatError", ""),
        "zip_cut_start": (good[40:], "FormatError", ""),
        "zip_absolute": (torch_zip(b"N.", {"/etc/passwd": b"x"}), "UnsafeContent", "leads out"),
        "zip_dots": (torch_zip(b"N.", {"archive/../../x": b"x"}), "UnsafeContent", "leads out"),
        "zip_backslash": (torch_zip(b"N.", {"archive\\..\\x": b"x"}), "UnsafeContent", "leads out"),
        "zip_drive": (torch_zip(b"N.", {"c:/x": b"x"}), "UnsafeContent", "leads out"),
        "zip_two_roots": (torch_zip(b"N.", {"other/data.pkl": b"N."}), "FormatError", "data.pkl"),
        "zip_no_root": (torch_zip(b"N.").replace(b"data.pkl", b"date.pkl"), "FormatError", "data.pkl"),
        "zip_one_name_twice": (
            torch_zip(b"N.", {"archive/a": b"1", "archive/b": b"2"}).replace(b"archive/b", b"archive/a"),
            "UnsafeContent",
            "same name",
        ),
        "zip_pickle_bomb": (
            torch_zip(b"B" + struct.pack("<I", len(zeros)) + zeros + b".", compression=zipfile.ZIP_DEFLATED),
            "UnsafeContent",
            "bomb",
        ),
        "zip_pickle_of_sets": (
            torch_zip(b"(" + b"\x8f" * (1 << 24) + b"t.", compression=zipfile.ZIP_DEFLATED),
            "UnsafeContent",
            "bomb",
        ),
        "zip_storage_bomb": (
            torch_zip(
                tensor(storage("torch.FloatStorage", "0", len(zeros) // 4), 0, [len(zeros) // 4], [1]) + STOP,
                {"archive/data/0": zeros},
                compression=zipfile.ZIP_DEFLATED,
            ),
            "FormatError",
            "bomb",
        ),
        "torchscript": (
            torch_zip(b"N.", {"archive/constants.pkl": b"N.", "archive/code/a.py": b""}),
            "FormatError",
            "TorchScript",
        ),
        "tar": (b"pickle".ljust(257, b"\0") + b"ustar" + bytes(250), "FormatError", "tar"),
    }


def legacy_files() -> dict[str, tuple[bytes, str, str]]:
    """Return name -> (file, error, word): torch's older format, whose counts lie."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    stored = storage("torch.FloatStorage", "0", 4)[:-2] + b"NtQ"
    keys = pickle.dumps(["0"], 2)
    body = head + tensor(stored, 0, [4], [1]) + STOP
    rest = struct.pack("<q", 4) + bytes(16)
    viewed = storage("torch.FloatStorage", "0", 4)[:-2] + b"(" + text("1") + number(3) + number(9) + b"ttQ"
    return {
        "legacy_no_keys": (body + pickle.dumps([], 2) + rest, "FormatError", "storages"),
        "legacy_other_keys": (body + pickle.dumps(["1"], 2) + rest, "FormatError", "storages"),
        "legacy_count_lies": (body + keys + struct.pack("<q", 1 << 60) + bytes(16), "FormatError", "size"),
        "legacy_count_negative": (body + keys + struct.pack("<q", -4) + bytes(16), "FormatError", "size"),
        "legacy_cut": (body + keys + rest[:-1], "FormatError", "size"),
        "legacy_cut_early": (body + keys, "FormatError", ""),
        "legacy_view_outside": (head + tensor(viewed, 0, [4], [1]) + STOP + keys + rest, "FormatError", "view"),
        "legacy_view_laughing": (
            head + tensor(viewed.replace(text("1"), LAUGHING_TUPLES), 0, [4], [1]) + STOP + keys + rest,
            "FormatError",
            "not have a name",
        ),
        "legacy_other_magic": (pickle.dumps(7, 2) * 5, "FormatError", "torch.save"),
    }


def paddle_files() -> dict[str, tuple[bytes, str, str]]:
    """Return name -> (file, error, word): a table of names that is none."""
    names = text("StructuredToParameterName@@") + b"}(" + text("a") + LAUGHING_TUPLES + b"u"
    return {"names_laughing": (b"}(" + names + b"u.", "", "")}


def oneflow_files() -> dict[str, tuple[bytes, str, str]]:
    """Return name -> (file, error, word): data types that are no numbers."""
    head = b"}(" + text("protocol_version") + b"K\1" + text("data") + named("oneflow._oneflow_internal", "dtype")
    kinds = {"dtype_list": b"]", "dtype_laughing": LAUGHING_TUPLES}
    return {name: (head + b")\x81" + kind + b"bu.", "FormatError", "number") for name, kind in kinds.items()}


def pdiparams_files() -> dict[str, tuple[bytes, str, str]]:
    """Return name -> (file, error, word): raw variables of Paddle that lie."""

    def stream(levels: int, size: int, message: bytes, data: bytes) -> bytes:
        return struct.pack("<IQIi", 0, levels, 0, size) + message + data

    return {
        "stream_cut": (stream(0, 4, b"\x08\x05\x10\x04", bytes(15)), "FormatError", "ends"),
        "stream_dimension_lies": (stream(0, 11, b"\x08\x05\x10" + b"\xff" * 7 + b"\x7f", bytes(16)), "FormatError", ""),
        "stream_dimension_negative": (
            stream(0, 13, b"\x08\x05\x10" + b"\xff" * 9 + b"\x01", bytes(16)),
            "FormatError",
            "shape",
        ),
        "stream_many_levels": (stream(1 << 60, 4, b"\x08\x05\x10\x04", bytes(16)), "FormatError", "header"),
        "stream_level_lies": (struct.pack("<IQQ", 0, 1, (1 << 63) + 5) + bytes(40), "FormatError", ""),
        "stream_description_lies": (stream(0, 1 << 30, b"\x08\x05\x10\x04", bytes(16)), "FormatError", "description"),
        "stream_description_negative": (stream(0, -4, b"\x08\x05\x10\x04", bytes(16)), "FormatError", "description"),
        "stream_field_lies": (stream(0, 4, b"\x08\x05\x12\x7f", bytes(16)), "FormatError", "message"),
        "stream_endless_number": (stream(0, 12, b"\x08" + b"\xff" * 11, bytes(16)), "FormatError", "message"),
        "stream_unknown_type": (stream(0, 4, b"\x08\x63\x10\x04", bytes(16)), "UnsupportedDtype", ""),
    }


def main(folder: Path, canary: str) -> None:
    """Write every file and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []

    def put(reader: str, name: str, data: bytes, error: str, word: str) -> None:
        path = folder / f"{reader}-{name}"
        path.write_bytes(data)
        index.append({"file": path.name, "reader": reader, "error": error, "word": word})

    for name, (data, error, word) in {**routes(canary), **bombs()}.items():
        for reader in ("paddle", "megengine"):
            put(reader, name, data, error, word)
        put("torch", f"{name}-zip", torch_zip(data), error, word)
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        put("torch", f"{name}-legacy", head + data + pickle.dumps([], 2), error, "" if name in UNWRAPPED else word)
        put("torch", f"{name}-first", data, "FormatError", "")
        if name in UNWRAPPED:
            continue
        wrapped = b"}(" + text("protocol_version") + b"K\1" + text("data") + data.removesuffix(STOP) + b"u."
        put("oneflow", name, wrapped, error, "")
    for reader, files in (
        ("torch", torch_files()),
        ("torch", legacy_files()),
        ("paddle", {**paddle_files(), **pdiparams_files()}),
        ("oneflow", oneflow_files()),
    ):
        for name, (data, error, word) in files.items():
            put(reader, name, data, error, word)
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/tmp/varstore-canary")
