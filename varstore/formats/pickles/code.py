"""The names in pickles that have no use but to run code; a file with one of them is refused in every mode.

Safety does not rest on this table, because no name in a file is ever imported or called. It only decides between a
refusal and an inert record: a file that names `os.system` was made to do harm, and its reader should know.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["runs_code"]


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_MODULES = _set(
    "_ctypes _pickle _posixsubprocess _socket _thread _winapi bdb cPickle cProfile cffi cloudpickle codeop ctypes dill "
    "ftplib imp importlib marshal mmap multiprocessing nt os pdb pickle popen2 posix pty runpy shutil smtplib socket "
    "socketserver subprocess sys timeit urllib webbrowser xmlrpc zipimport"
)
"""Modules of which every name, and every module in them, runs code or reaches the system."""

_OPERATOR = _set("attrgetter call itemgetter methodcaller")
_NAMES = {
    "builtins": _set(
        "__build_class__ __import__ apply breakpoint compile delattr eval exec execfile exit file filter getattr "
        "globals help input locals map open quit raw_input reduce reload setattr vars"
    ),
    "_codecs": _set("decode lookup register"),
    "_functools": _set("partial reduce"),
    "_io": _set("FileIO open open_code"),
    "_operator": _OPERATOR,
    "code": _set("InteractiveConsole InteractiveInterpreter interact"),
    "codecs": _set("decode encode lookup open register"),
    "commands": _set("getoutput getstatusoutput"),
    "copyreg": _set("add_extension constructor dispatch_table pickle remove_extension"),
    "functools": _set("partial partialmethod reduce"),
    "io": _set("FileIO open open_code"),
    "itertools": _set("starmap"),
    "joblib": _set("load"),
    "linecache": _set("getlines"),
    "megengine": _set("load save"),
    "numpy": _set("DataSource fromfile fromregex genfromtxt load loadtxt save savetxt savez vectorize"),
    "oneflow": _set("load save"),
    "operator": _OPERATOR,
    "paddle": _set("load save"),
    "pandas": _set("eval read_pickle"),
    "platform": _set("_syscmd_ver popen"),
    "profile": _set("run runctx"),
    "torch": _set("compile load save"),
    "torch.jit": _set("load save"),
    "torch.serialization": _set("load save"),
    "torch.storage": _set("_load_from_bytes"),
    "types": _set("CellType CodeType FrameType FunctionType LambdaType MethodType ModuleType new_class"),
}
_WITHIN = ("numpy.testing", "numpy.distutils", "numpy.f2py", "torch.hub", "torch.ops", "torch.utils.cpp_extension")
_LONGEST_KEPT = 256
"""The characters of a name whose answer is kept: the names are those of a file, and may be as long as it is."""
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def runs_code(module: str, name: str) -> bool:
    """Return whether a name has no use but to run code; one that leads through attributes is judged by each part."""
    judge = _runs_code if len(module) + len(name) <= _LONGEST_KEPT else _runs_code.__wrapped__
    return judge(module, name)


@lru_cache(maxsize=1024)
def _runs_code(module: str, name: str) -> bool:
    path = _PYTHON_2.get(module, module)
    if path.partition(".")[0] in _MODULES or any(f"{path}.".startswith(f"{top}.") for top in _WITHIN):
        return True
    *through, last = name.split(".")
    if not through:
        return name in _NAMES.get(path, ())
    return _is_hidden(last) or any(_is_hidden(part) or part in _MODULES for part in through)


def _is_hidden(part: str) -> bool:
    return part.startswith("__") and part.endswith("__")
